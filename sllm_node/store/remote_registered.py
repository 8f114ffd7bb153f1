"""Models that are registered in the cluster's directory: one more remote, each model with an address of its own.

Addresses come and go while the node runs. One that does not answer costs its own model only: that is told as
wrong about that model, not as a remote that is down. Looks are made by one thread, so they don't wait for many
that are silent: the host of one is asked no more in that look, and such models are looked at behind all others,
in turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Final

from sllm_node.checkpoint.cards import REGISTERED
from sllm_node.core.clock import Clock
from sllm_node.core.config import RemoteConfig
from sllm_node.core.errors import RemoteNotFoundError, RemoteUnreachableError
from sllm_node.core.types import ModelId
from sllm_node.store.remote_fetch import Files

_WAIT_S: Final = 15.0
"""A look that has waited so long for silent hosts ends: other remotes are looked at behind it."""


class RegisteredFiles:
    """As `store.remote_fetch.Files`; `set` from the event loop, all else from threads."""

    def __init__(self, connect: Callable[[str, RemoteConfig], Files], clock: Clock) -> None:
        self.name = REGISTERED
        self._connect = connect
        self._clock = clock
        self._urls: dict[str, str] = {}
        self._opened: dict[tuple[str, str], Files] = {}
        self._looks = 0
        self._unreachable: dict[str, tuple[int, str]] = {}
        """Of models: in which look, and what was wrong."""

    def set(self, urls: Mapping[ModelId, str]) -> None:
        """Take which models are registered, and where each can be fetched."""
        self._urls = {str(model): url for model, url in urls.items()}
        opened = dict(self._opened)  # threads may add to it meanwhile
        kept = self._urls.items()
        self._opened = {key: files for key, files in opened.items() if key in kept}

    def models(self) -> tuple[str, ...]:
        """Return the registered models."""
        return tuple(sorted(self._urls))

    def read_all(self, path: str, limit: int, stop: Event) -> bytes:
        """Return a whole file.

        Raises:
            RemoteError: it can't be had, or is larger than `limit`.
        """
        return self._files(path).read_all(path, limit, stop)

    def read_some(self, path: str, view: memoryview, offset: int, stop: Event) -> Iterator[int]:
        """Fill `view` from byte `offset` of a file; yield how many bytes came each time.

        Raises:
            RemoteError: the rest can't be had now.
        """
        yield from self._files(path).read_some(path, view, offset, stop)

    def _files(self, path: str) -> Files:
        model = path.partition("/")[0]
        url = self._urls.get(model)
        if url is None:
            raise RemoteNotFoundError(self.name, path, "its model is not registered any more")
        files = self._opened.get((model, url))
        if files is None:
            files = self._connect(self.name, RemoteConfig(url=url, models=(model,)))
            self._opened[model, url] = files
        return files

    def look(self, models: Sequence[str], look: Callable[[str], str | None]) -> list[str]:
        """Call `look` for models; return what is wrong, as far as it is known.

        In the one thread that looks at remotes.
        """
        self._looks += 1
        known, silent = self._unreachable, set[str]()
        self._unreachable = {model: known[model] for model in models if model in known}
        wrong, waited_s = dict[str, str](), 0.0
        for model in sorted(models, key=lambda one: (known.get(one, (0, ""))[0], one)):
            host = self._urls.get(model, "").partition("://")[2].partition("/")[0]
            if waited_s >= _WAIT_S:
                break
            if host in silent:
                continue
            began, problem = self._clock.now(), None
            try:
                problem = look(model)
                self._unreachable.pop(model, None)
            except RemoteUnreachableError as error:
                self._unreachable[model] = self._looks, str(error)
                waited_s += self._clock.now() - began
                if error.is_silent:
                    silent.add(host)
            if problem is not None:
                wrong[model] = problem
        wrong |= {model: problem for model, (_, problem) in self._unreachable.items()}
        return [problem for _, problem in sorted(wrong.items())]
