"""Models that are registered in the cluster's directory: one more remote, each model with an address of its own.

Addresses come and go while the node runs. One that does not answer costs its own model only: what is asked
of it at a look is told as wrong about that model, not as a remote that is down.
"""

from collections.abc import Callable, Iterator, Mapping
from threading import Event

from sllm_node.checkpoint.cards import REGISTERED
from sllm_node.core.config import RemoteConfig
from sllm_node.core.errors import RemoteError, RemoteNotFoundError, RemoteUnreachableError
from sllm_node.core.types import ModelId
from sllm_node.store.remote_fetch import Files


class RegisteredFiles:
    """As `store.remote_fetch.Files`; `set` from the event loop, all else from threads."""

    def __init__(self, connect: Callable[[str, RemoteConfig], Files]) -> None:
        self.name = REGISTERED
        self._connect = connect
        self._urls: dict[str, str] = {}
        self._opened: dict[tuple[str, str], Files] = {}

    def set(self, urls: Mapping[ModelId, str]) -> None:
        """Take which models are registered, and where each can be fetched."""
        self._urls = {str(model): url for model, url in urls.items()}
        self._opened = {
            key: files for key, files in self._opened.items() if key in self._urls.items()
        }

    def models(self) -> tuple[str, ...]:
        """Return the registered models."""
        return tuple(sorted(self._urls))

    def read_all(self, path: str, limit: int) -> bytes:
        """Return a whole file.

        Raises:
            RemoteError: it can't be had, or is larger than `limit`.
        """
        files = self._files(path)
        try:
            return files.read_all(path, limit)
        except RemoteUnreachableError as error:
            raise RemoteError(self.name, path, error.problem) from error

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
