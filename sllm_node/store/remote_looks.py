"""Looks at remotes: what each has by now, kept as cards.

All remotes are looked at in one thread, now and again. A look asks a remote for its list, and for the
index of each checkpoint; a card is made, with all texts, where the index is another one than before.
One look proves little: what a remote does not list any more is kept if bytes of it have come.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from sllm_node.checkpoint.cards import REGISTERED, TEXT_FILES, Cards, clear
from sllm_node.checkpoint.index import INDEX_FILE, from_json
from sllm_node.core.errors import (
    RemoteDeniedError,
    RemoteNotFoundError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.names import MODEL_NAMES, is_model_name
from sllm_node.core.types import ModelId
from sllm_node.store.remote_fetch import INDEX_BYTES_MAX, Remote
from sllm_node.store.remote_registered import RegisteredFiles

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""Between two looks at remotes that answer."""
RETRY_S: Final = 15.0
"""Between two looks while one does not."""
_CONFIG_FILE: Final = "config.json"
"""The text without which no checkpoint can be used."""
_LOOK_AGAIN_S: Final = 10.0
"""A load that was told of another checkpoint waits no longer for the look at it."""
_TEXT_BYTES_MAX: Final = 256 << 20


@dataclass(slots=True)
class _Seen:
    """A remote as the last look at it was."""

    models: tuple[str, ...] = ()
    not_offered: tuple[str, ...] = ()
    """It had them, and bytes of them have come: they are kept, it may offer them again."""
    problem: str | None = "not asked yet"
    is_down: bool = True
    missed: tuple[str, ...] = ()
    """Of the models, those of which index or texts could not be had, the last one last."""
    left_out: tuple[str, ...] = ()
    """What it lists that can be no checkpoint's name."""


@dataclass(slots=True)
class _Found:
    """What a look at the models of a remote found."""

    problems: list[str]
    missed: list[str] = field(default_factory=list)
    is_down: bool = False


class Looks:
    """Those of one node at its remotes."""

    def __init__(
        self,
        cards: Cards,
        remotes: Mapping[str, Remote],
        joined: Mapping[str, Remote],
        registered: RegisteredFiles,
        addresses: Mapping[str, str],
    ) -> None:
        self._cards = cards
        self._remotes = remotes
        self._joined = joined
        """Others that have cards; they make them themselves."""
        self._registered = registered
        self._addresses = addresses
        self._seen = {name: _Seen() for name in remotes}
        self._threads = ThreadPoolExecutor(1, "sllm-cards")
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._again: dict[tuple[str, ModelId], Future[None]] = {}
        for remote in remotes.values():
            remote.on_changed = partial(self._look_again, remote)

    def stop(self) -> None:
        """Let a look under way end after the request that it waits for."""
        self._closing.set()

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _look_again(self, remote: Remote, model: ModelId) -> None:
        """Look at a model that is another one by now; called in threads, returns when that was done.

        So who is told of it, and asks again, has the new one.
        """
        key = (remote.name, model)
        with self._lock:
            looking = self._again.get(key)
            if looking is None or looking.done():
                looking = self._again[key] = self._threads.submit(self._look_at_one, remote, model)
        wait([looking], timeout=_LOOK_AGAIN_S)

    async def refresh(self) -> None:
        """Look at every remote, and make or drop cards as it says."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._refresh)

    async def keep_fresh(self, then: Callable[[], None]) -> None:
        """Look at the remotes now and again, until cancelled; call `then` after the first look."""
        await self._look_around()
        then()
        while True:
            await asyncio.sleep(self.pause_s())
            await self._look_around()

    def pause_s(self) -> float:
        """Return how long to wait for the next look. A model's own problem is nobody's reason to hurry.

        Registered models have an address each: a problem of one may be that its host is down.
        """
        is_wrong = any(seen.is_down for seen in self._seen.values())
        is_wrong |= self._seen[REGISTERED].problem is not None
        return RETRY_S if is_wrong else REFRESH_S

    async def _look_around(self) -> None:
        try:
            await self.refresh()
        except Exception:
            log.exception("looking at the remotes failed")

    def status(self) -> list[dict[str, Any]]:
        """Return how each remote was when it was looked at last."""
        shown = [name for name in self._seen if name != REGISTERED or self._registered.models()]
        return [
            {
                "name": name,
                "url": self._address(name),
                "state": "down" if seen.is_down else "ok",
                "problem": seen.problem,
                "models": list(seen.models),
                "not_offered": list(seen.not_offered),
            }
            for name in shown
            for seen in [self._seen[name]]
        ]

    def _address(self, name: str) -> str:
        return self._addresses.get(name, "the directory's models")

    # --- in the thread -----------------------------------------------------------------------

    def _refresh(self) -> None:
        self._clear_completed()
        taken: set[str] = set()
        for name, remote in self._remotes.items():
            if self._closing.is_set():
                return
            before = self._seen[name].problem
            self._seen[name] = seen = self._look_around_at(remote, taken)
            if not seen.is_down:
                taken.update({*seen.models} - {*seen.missed})
            if seen.problem is not None and seen.problem != before and not self._closing.is_set():
                fields = {"remote": name, "url": self._address(name), "problem": seen.problem}
                log.warning("remote not usable", extra=fields)

    def _look_around_at(self, remote: Remote, taken: set[str]) -> _Seen:
        """Make or drop cards of a remote as it says; those of `taken` are another's."""
        before = self._seen[remote.name]
        try:
            names = remote.files.models()
        except SllmError as error:
            return replace(before, problem=str(error), is_down=True)
        listed = tuple(name for name in names if is_model_name(name))
        left_out = tuple(name for name in names if not is_model_name(name))
        if left_out and left_out != before.left_out:
            fields = {"remote": remote.name, "left_out": left_out[:8], "allowed": MODEL_NAMES}
            log.warning("remote lists names that no model can have", extra=fields)
        wanted = [name for name in listed if name not in taken]
        if remote.files is self._registered:
            found = _Found(self._registered.look(wanted, partial(self._look, remote)))
        else:
            found = self._look_at_each(remote, wanted)
        kept = self._drop_gone(remote.name, {*wanted})
        problem = next(iter(found.problems), None)
        missed = tuple(found.missed)
        return _Seen(listed, kept, problem, found.is_down, missed, left_out)

    def _look_at_one(self, remote: Remote, model: ModelId) -> None:
        """Make the card of `model` anew if it is still this remote's; what is wrong, the next look tells."""
        if self._cards.remote_of(model) == remote.name:
            with suppress(RemoteUnreachableError):
                self._look(remote, model)

    def _look_at_each(self, remote: Remote, wanted: Sequence[str]) -> "_Found":
        """Look at all of `wanted`, those that were not to be had last time behind the others.

        A remote that is silent is asked no more. It is down if it gave nothing of any.
        """
        missed = [model for model in self._seen[remote.name].missed if model in wanted]
        problems: list[str] = []
        is_down = bool(wanted)
        for model in [*(model for model in wanted if model not in missed), *missed]:
            missed = [other for other in missed if other != model]
            try:
                problem = self._look(remote, model)
                is_down = False
            except RemoteUnreachableError as error:
                missed.append(model)
                problem = str(error)
                if error.is_silent:
                    problems.append(problem)
                    break
            if problem is not None:
                problems.append(problem)
        return _Found(problems, missed, is_down=is_down)

    def _clear_completed(self) -> None:
        """Delete what a crash in the moment of completion left: second names of the same bytes."""
        for model in self._cards.all():
            if (self._cards.store / model).is_dir():
                clear(self._cards.root / model)

    def _look(self, remote: Remote, model: str) -> str | None:
        """Make the card of one checkpoint, or leave it as it is; return what is wrong with it."""
        try:
            index = self._read(remote, f"{model}/{INDEX_FILE}", INDEX_BYTES_MAX)
            from_json(index, f"remote {remote.name}: {model}/{INDEX_FILE}")
            known = self._cards.root / model / INDEX_FILE
            asked = self._cards.remote_of(model)
            if asked is not None and known.is_file() and known.read_bytes() == index:
                if asked != remote.name:
                    self._cards.move(ModelId(model), remote.name)
            elif asked is not None and self._is_kept_for(asked, remote.name, ModelId(model)):
                return (
                    f"{model} is another one than that of remote {asked}, of which bytes have come; "
                    f"delete them with rm {model} to have this one"
                )
            else:
                texts, refused = self._texts(remote, model)
                self._cards.write(ModelId(model), remote.name, {**texts, INDEX_FILE: index})
                fields = {"model": model, "remote": remote.name, "refused": refused}
                log.info("remote checkpoint", extra=fields)
        except RemoteUnreachableError:
            raise  # perhaps there is no need to ask it for the others
        except SllmError as error:
            return str(error)
        except OSError as error:
            return f"{self._cards.root / model}: {error.strerror or error}"
        return None

    def _texts(self, remote: Remote, model: str) -> tuple[dict[str, bytes], list[str]]:
        """Return the texts of a checkpoint, and the names of those that are refused.

        No checkpoint has all of them. Of one that is not there, a bucket says so only to those who
        may list it; to others it is refused, as the index was not.
        """
        found: dict[str, bytes] = {}
        refused: list[str] = []
        for name in TEXT_FILES:
            try:
                found[name] = self._read(remote, f"{model}/{name}", _TEXT_BYTES_MAX)
            except RemoteNotFoundError:
                continue
            except RemoteDeniedError:
                if name == _CONFIG_FILE:
                    raise
                refused.append(name)
        return found, refused

    def _read(self, remote: Remote, path: str, limit: int) -> bytes:
        """Return a whole file, if the node does not stop: it would wait for everything that a look asks for."""
        if self._closing.is_set():
            raise RemoteUnreachableError(remote.name, path, "the node stops", is_silent=True)
        return remote.files.read_all(path, limit, self._closing)

    def _is_kept_for(self, owner: str, other: str, model: ModelId) -> bool:
        """Tell whether bytes from `owner` go before what `other` offers under that name."""
        order = [*self._joined, *self._remotes]
        return (
            owner in order
            and order.index(owner) < order.index(other)
            and not (self._cards.store / model).is_dir()
            and self._cards.has_come(model)
        )

    def _drop_gone(self, remote: str, listed: set[str]) -> tuple[str, ...]:
        """Drop cards of what `remote` does not offer; return those kept for their bytes.

        One look proves little: a remote that restarts may list nothing for a moment.
        """
        kept: list[str] = []
        for model in self._cards.all():
            if model in listed or self._cards.remote_of(model) != remote:
                continue
            if self._cards.has_come(model):
                kept.append(model)
                if model not in self._seen[remote].not_offered:
                    log.warning(
                        "remote checkpoint not offered; its bytes are kept",
                        extra={"model": model, "remote": remote},
                    )
            else:
                self._cards.drop(model)
                log.info("remote checkpoint gone", extra={"model": model, "remote": remote})
        return tuple(kept)
