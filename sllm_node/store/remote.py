"""The tier REMOTE: checkpoints that this node can load without having them.

A remote is a peer node, a plain HTTP server or a bucket. Of each of its checkpoints the node fetches
index and texts at start, and then again from time to time, as a *card* (`checkpoint.cards`): enough
to list it, to build its module, to estimate its load. Its bytes come when it is loaded
(`store.remote_file`), or when an operator has it pulled. A remote that is down costs its own
checkpoints only: the cards of an earlier start still stand, and it is asked again.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from sllm_node.checkpoint.cards import CARDS_FOLDER, REGISTERED, Cards
from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import RemoteConfig, StoreConfig
from sllm_node.core.errors import CancelledByOperatorError, ModelNotFoundError
from sllm_node.core.metrics import Metrics
from sllm_node.core.names import is_model_name
from sllm_node.core.types import ModelId
from sllm_node.core.urls import plain
from sllm_node.store.reader import file_system
from sllm_node.store.remote_disk import CardDisk, Writers
from sllm_node.store.remote_fetch import Files, Remote
from sllm_node.store.remote_file import RemoteFileSystem
from sllm_node.store.remote_looks import Looks
from sllm_node.store.remote_partial import FLUSH_BYTES, Partial
from sllm_node.store.remote_pull import Pull
from sllm_node.store.remote_registered import RegisteredFiles
from sllm_node.store.remote_transport import Transport

_WRITERS: Final = 2
_BUFFERS: Final = 4
_THREADS: Final = 16
_RETRIES: Final = 4
"""Of models that are registered; others have their config's."""
_PULLS_MAX: Final = 2
"""At once; others wait."""


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
        self._metrics = metrics
        self._joined: dict[str, Remote] = {}
        """Remotes that no config names: the peers of a cluster."""
        addresses = {name: plain(config.url) for name, config in remotes.items()}
        self._looks = Looks(self.cards, self._remotes, self._joined, self._registered, addresses)
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

    async def close(self) -> None:
        """End pulls and threads; loads must have ended."""
        self._looks.stop()
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.job.stop()
        await asyncio.gather(*(pull.ended for pull in pulls), return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._close_threads)

    def _close_threads(self) -> None:
        self._looks.close()
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
        await self._looks.refresh()

    async def keep_fresh(self, then: Callable[[], None]) -> None:
        """Look at the remotes now and again, until cancelled; call `then` after the first look."""
        await self._looks.keep_fresh(then)

    def status(self) -> list[dict[str, Any]]:
        """Return how each remote was when it was looked at last."""
        return self._looks.status()

    def bytes_come(self, model: ModelId) -> int | None:
        """Return how many bytes of `model` have come; None: it is here, or at no remote."""
        if (self.path / model).is_dir():
            return None
        checkpoint = self.cards.get(model, is_hidden=True)
        return None if checkpoint is None else self._partial(checkpoint).bytes_here

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
