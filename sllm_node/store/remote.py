"""The tier REMOTE: checkpoints that this node can load without having them.

A remote is a peer node, a plain HTTP server or a bucket. Of each of its checkpoints the node fetches
index and texts at start, and then again from time to time, as a *card* (`checkpoint.cards`): enough
to list it, to build its module, to estimate its load. Its bytes come when it is loaded
(`store.remote_file`), or when an operator has it pulled. A remote that is down costs its own
checkpoints only: the cards of an earlier start still stand, and it is asked again.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from sllm_node.checkpoint.cards import CARDS_FOLDER, REGISTERED, TEXT_FILES, Cards, clear
from sllm_node.checkpoint.catalog import Checkpoint, is_model_name
from sllm_node.checkpoint.index import INDEX_FILE, from_json
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import RemoteConfig, StoreConfig
from sllm_node.core.errors import (
    CancelledByOperatorError,
    ModelNotFoundError,
    RemoteNotFoundError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.core.urls import plain
from sllm_node.store.reader import file_system
from sllm_node.store.remote_disk import CardDisk, Writers
from sllm_node.store.remote_fetch import INDEX_BYTES_MAX, Files, Remote
from sllm_node.store.remote_file import RemoteFileSystem
from sllm_node.store.remote_partial import FLUSH_BYTES, Partial
from sllm_node.store.remote_pull import Pull
from sllm_node.store.remote_registered import RegisteredFiles
from sllm_node.store.remote_transport import Transport

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""Between two looks at remotes that answer."""
RETRY_S: Final = 15.0
"""Between two looks while one does not."""
_TEXT_BYTES_MAX: Final = 256 << 20
_WRITERS: Final = 2
_BUFFERS: Final = 4
_THREADS: Final = 16
_RETRIES: Final = 4
"""Of models that are registered; others have their config's."""
_PULLS_MAX: Final = 2
"""At once; others wait."""


@dataclass(slots=True)
class _Seen:
    """A remote as the last look at it was."""

    models: tuple[str, ...] = ()
    not_offered: tuple[str, ...] = ()
    """It had them, and bytes of them have come: they are kept, it may offer them again."""
    problem: str | None = "not asked yet"
    is_down: bool = True


class _Pulling:
    """A pull under way and how many wait for it."""

    ended: asyncio.Future[None]

    def __init__(self, job: Pull) -> None:
        self.job = job
        self.waiters = 0


class RemoteTier:
    """The remotes of one node, their cards, and what is on its way from them."""

    def __init__(
        self,
        remotes: Mapping[str, RemoteConfig],
        store: StoreConfig,
        metrics: Metrics,
        *,
        connect: Callable[[str, RemoteConfig], Files] = Transport,
        open_disk: Callable[[Checkpoint], CardDisk] | None = None,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self.path = Path(store.path)
        self.cards = Cards(self.path, frozenset({*remotes, REGISTERED}))
        self._config = dict(remotes)
        self._remotes = {
            name: Remote(
                connect(name, config),
                threads=config.fetch_threads,
                retries=config.retries,
                metrics=metrics,
            )
            for name, config in remotes.items()
        }
        self._registered = RegisteredFiles(connect, MonotonicClock())
        self._remotes[REGISTERED] = Remote(
            self._registered, threads=_THREADS, retries=_RETRIES, metrics=metrics
        )
        self._seen = {name: _Seen() for name in self._remotes}
        self._metrics = metrics
        self._joined: dict[str, Remote] = {}
        """Remotes that no config names: the peers of a cluster."""
        self._chunk_bytes = store.chunk_bytes
        self._writers = Writers(_WRITERS, _BUFFERS, store.chunk_bytes)
        self._open_disk = open_disk or partial(CardDisk, direct=store.direct_io)
        self._flush_bytes = flush_bytes
        self._lock = threading.Lock()
        self._partials: dict[ModelId, Partial] = {}
        self._pulls: dict[ModelId, _Pulling] = {}
        local = file_system(store)
        self.files = RemoteFileSystem(self.path / CARDS_FOLDER, self, local)
        self.readers = ThreadPoolExecutor(store.reader_threads, "sllm-read-remote")
        """For loads: a slow remote must not keep those waiting that read the disk."""
        self._threads = ThreadPoolExecutor(_PULLS_MAX, "sllm-pull")
        self._refreshing = ThreadPoolExecutor(1, "sllm-cards")
        self._closing = threading.Event()

    async def close(self) -> None:
        """End pulls and threads; loads must have ended."""
        self._closing.set()
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.job.stop()
        await asyncio.gather(*(pull.ended for pull in pulls), return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._close_threads)

    def _close_threads(self) -> None:
        self._refreshing.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True)
        self.readers.shutdown(wait=True)
        self._writers.close()
        for remote in (*self._remotes.values(), *self._joined.values()):
            remote.close()

    def join(
        self, files: Files, *, threads: int, retries: int, offers: Callable[[ModelId], bool]
    ) -> None:
        """Load from `files`, too; its cards are made by others, and show while it offers them."""
        self._joined[files.name] = Remote(
            files, threads=threads, retries=retries, metrics=self._metrics
        )
        self.cards.offers[files.name] = offers

    async def register(self, urls: Mapping[ModelId, str]) -> None:
        """Load these models from these addresses, too, where no remote of the config has them."""
        self._registered.set(urls)
        await self.refresh()

    # --- what is there ------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Look at every remote, and make or drop cards as it says."""
        await asyncio.get_running_loop().run_in_executor(self._refreshing, self._refresh)

    async def keep_fresh(self, then: Callable[[], None]) -> None:
        """Look at the remotes now and again, until cancelled; call `then` after the first look."""
        await self._look_around()
        then()
        while True:
            is_down = any(seen.problem is not None for seen in self._seen.values())
            await asyncio.sleep(RETRY_S if is_down else REFRESH_S)
            await self._look_around()

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
        return plain(self._config[name].url) if name in self._config else "the directory's models"

    def bytes_come(self, model: ModelId) -> int | None:
        """Return how many bytes of `model` have come; None: it is here, or at no remote."""
        if (self.path / model).is_dir():
            return None
        checkpoint = self.cards.get(model, is_hidden=True)
        return None if checkpoint is None else self._partial(checkpoint).bytes_here

    # --- cards, in the refreshing thread ------------------------------------------------------

    def _refresh(self) -> None:
        self._clear_completed()
        taken: set[str] = set()
        for name, remote in self._remotes.items():
            if self._closing.is_set():
                return
            before = self._seen[name].problem
            self._seen[name] = seen = self._look_around_at(remote, taken)
            if not seen.is_down:
                taken.update(seen.models)
            if seen.problem is not None and seen.problem != before and not self._closing.is_set():
                fields = {"remote": name, "url": self._address(name), "problem": seen.problem}
                log.warning("remote not usable", extra=fields)

    def _look_around_at(self, remote: Remote, taken: set[str]) -> _Seen:
        """Make or drop cards of a remote as it says; those of `taken` are another's."""
        try:
            listed = tuple(m for m in remote.files.models() if is_model_name(m))
            wanted = [m for m in listed if m not in taken]
            look = partial(self._look, remote)
            if remote.files is self._registered:
                problems = self._registered.look(wanted, look)
            else:
                problems = [p for m in wanted if (p := look(m))]
            kept = self._drop_gone(remote.name, {*wanted})
            return _Seen(listed, kept, next(iter(problems), None), is_down=False)
        except SllmError as error:
            seen = self._seen[remote.name]
            return _Seen(seen.models, seen.not_offered, str(error))

    def _clear_completed(self) -> None:
        """Delete what a crash in the moment of completion left: second names of the same bytes."""
        for model in self.cards.all():
            if (self.path / model).is_dir():
                clear(self.cards.root / model)

    def _look(self, remote: Remote, model: str) -> str | None:
        """Make the card of one checkpoint, or leave it as it is; return what is wrong with it."""
        try:
            index = self._read(remote, f"{model}/{INDEX_FILE}", INDEX_BYTES_MAX)
            from_json(index, f"remote {remote.name}: {model}/{INDEX_FILE}")
            known = self.cards.root / model / INDEX_FILE
            asked = self.cards.remote_of(model)
            if asked is not None and known.is_file() and known.read_bytes() == index:
                if asked != remote.name:
                    self.cards.move(ModelId(model), remote.name)
            elif asked is not None and self._is_kept_for(asked, remote.name, ModelId(model)):
                return (
                    f"{model} is another one than that of remote {asked}, of which bytes have come; "
                    f"delete them with rm {model} to have this one"
                )
            else:
                texts = self._texts(remote, model)
                self.cards.write(ModelId(model), remote.name, {**texts, INDEX_FILE: index})
                log.info("remote checkpoint", extra={"model": model, "remote": remote.name})
        except RemoteUnreachableError:
            raise  # no need to ask it for the others
        except SllmError as error:
            return str(error)
        except OSError as error:
            return f"{self.cards.root / model}: {error.strerror or error}"
        return None

    def _texts(self, remote: Remote, model: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name in TEXT_FILES:
            try:
                found[name] = self._read(remote, f"{model}/{name}", _TEXT_BYTES_MAX)
            except RemoteNotFoundError:
                continue  # no checkpoint has all of them
        return found

    def _read(self, remote: Remote, path: str, limit: int) -> bytes:
        """Return a whole file, if the node does not stop: it would wait for everything that a look asks for."""
        if self._closing.is_set():
            raise RemoteUnreachableError(remote.name, path, "the node stops")
        return remote.files.read_all(path, limit)

    def _is_kept_for(self, owner: str, other: str, model: ModelId) -> bool:
        """Tell whether bytes from `owner` go before what `other` offers under that name."""
        order = [*self._joined, *self._remotes]
        return (
            owner in order
            and order.index(owner) < order.index(other)
            and not (self.path / model).is_dir()
            and self.cards.has_come(model)
        )

    def _drop_gone(self, remote: str, listed: set[str]) -> tuple[str, ...]:
        """Drop cards of what `remote` does not offer; return those kept for their bytes.

        One look proves little: a remote that restarts may list nothing for a moment.
        """
        kept: list[str] = []
        for model in self.cards.all():
            if model in listed or self.cards.remote_of(model) != remote:
                continue
            if self.cards.has_come(model):
                kept.append(model)
                if model not in self._seen[remote].not_offered:
                    log.warning(
                        "remote checkpoint not offered; its bytes are kept",
                        extra={"model": model, "remote": remote},
                    )
            else:
                self.cards.drop(model)
                log.info("remote checkpoint gone", extra={"model": model, "remote": remote})
        return tuple(kept)

    # --- for the file system ------------------------------------------------------------------

    def at(self, card: Path) -> tuple[Partial, Remote] | None:
        """Return the partial of the card at `card` and its remote; None: it is complete."""
        if self.completed(card).is_dir():
            return None
        checkpoint = self.cards.get(ModelId(card.name), is_hidden=True)
        if self.completed(card).is_dir():
            return None  # in between: what the card says now is of no use
        name = (checkpoint and checkpoint.remote) or ""
        remote = self._remotes.get(name) or self._joined.get(name)
        if checkpoint is None or remote is None:
            raise FileNotFoundError(str(card))
        return self._partial(checkpoint), remote

    def completed(self, card: Path) -> Path:
        """Return the folder of the checkpoint that the card at `card` became."""
        return self.path / card.name

    def _partial(self, checkpoint: Checkpoint) -> Partial:
        with self._lock:
            known = self._partials.get(checkpoint.model)
            # Not `!=`: shards made anew may have the inodes of those that were removed.
            if known is None or known.checkpoint.identities is not checkpoint.identities:
                known = Partial(
                    checkpoint, self.path, self._writers, self._open_disk, self._flush_bytes
                )
                self._partials[checkpoint.model] = known
            return known

    # --- pulls --------------------------------------------------------------------------------

    async def pull(self, model: str) -> None:
        """Bring what is missing of `model` onto NVMe; returns when it is an ordinary checkpoint.

        The last caller who is cancelled stops the pull; what has come stays.

        Raises:
            ModelNotFoundError: no remote has it, and it is not here.
            SllmError: it can't be fetched or kept.
        """
        name = ModelId(model)
        if is_model_name(name) and (self.path / name).is_dir():
            return
        if name not in self.cards.models():
            await self.refresh()
        checkpoint = self.cards.get(name) if name in self.cards.models() else None
        if checkpoint is not None:
            await self._join(checkpoint)
        elif not (is_model_name(name) and (self.path / name).is_dir()):  # or it has just come
            raise ModelNotFoundError(model, self.cards.models())

    async def _join(self, checkpoint: Checkpoint) -> None:
        """Wait for the pull of `checkpoint`, begun if there is none."""
        model = checkpoint.model
        while (pull := self._pulls.get(model)) is not None and not pull.waiters:
            await asyncio.gather(
                asyncio.shield(pull.ended), return_exceptions=True
            )  # it was stopped
        if pull is None:
            pull = self._begin_pull(checkpoint)
        pull.waiters += 1
        try:
            await asyncio.shield(pull.ended)
        except InterruptedError as error:
            raise CancelledByOperatorError("the pull was stopped") from error
        finally:
            pull.waiters -= 1
            if not pull.waiters:
                pull.job.stop()

    def _begin_pull(self, checkpoint: Checkpoint) -> _Pulling:
        pull = self._pulls[checkpoint.model] = _Pulling(Pull(checkpoint, self.files))
        pull.ended = asyncio.get_running_loop().run_in_executor(self._threads, pull.job.run)

        def ended(job: asyncio.Future[None]) -> None:
            del self._pulls[checkpoint.model]
            if not job.cancelled():
                job.exception()  # looked at even when nobody waits any more

        pull.ended.add_done_callback(ended)
        return pull
