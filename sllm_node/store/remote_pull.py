"""A pull: what is missing of a checkpoint onto NVMe, past the pool and the device."""

import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import RemoteError
from sllm_node.store.reader import close_shards, open_shards, stop_reads
from sllm_node.store.remote_file import RemoteFileSystem, RemoteShardFile
from sllm_node.store.residency import Unit, units_of

LANES: Final = 4
"""Ranges under way, with a buffer each; the remote's own threads share each range."""


class Pull:
    """One pull; `run` in a thread, `stop` from any."""

    def __init__(self, checkpoint: Checkpoint, files: RemoteFileSystem) -> None:
        self._checkpoint = checkpoint
        self._files = files
        self._is_stopped = threading.Event()
        self._opened: tuple[RemoteShardFile, ...] = ()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Let `run` end soon, with an error; what has come stays."""
        self._is_stopped.set()
        stop_reads(self._opened)

    def run(self) -> None:
        """Fetch what is missing; returns when the checkpoint is an ordinary one.

        Raises:
            InterruptedError: it was stopped.
            SllmError: bytes can't be fetched or kept.
        """
        opened = open_shards(self._checkpoint, self._files)
        shards = tuple(file for file in opened if isinstance(file, RemoteShardFile))
        if len(shards) < len(opened):
            close_shards(opened)  # it has just become an ordinary one
            return
        self._opened = shards
        partial = shards[0].partial
        try:
            self._fetch(shards)
        finally:
            close_shards(shards)
        partial.wait_settled()
        if not partial.is_complete:
            raise partial.problem or RemoteError(
                self._checkpoint.remote or "", self._checkpoint.model, "was not fetched whole"
            )

    def _fetch(self, shards: tuple[RemoteShardFile, ...]) -> None:
        index = self._checkpoint.index
        range_bytes = max(index.chunk_bytes, 16 << 20) // index.chunk_bytes * index.chunk_bytes
        units = iter(units_of(index, range_bytes))
        with ThreadPoolExecutor(LANES, "sllm-pull-lane") as lanes:
            jobs = [lanes.submit(self._lane, shards, units, range_bytes) for _ in range(LANES)]
            errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, InterruptedError)), errors[0])

    def _lane(
        self, shards: tuple[RemoteShardFile, ...], units: Iterator[Unit], range_bytes: int
    ) -> None:
        try:
            view = memoryview(mmap.mmap(-1, range_bytes))
            while (unit := self._next(units)) is not None:
                shards[unit.shard].bring(view[: unit.size], unit.offset)
        except BaseException:
            self.stop()  # the other lanes need not go on
            raise

    def _next(self, units: Iterator[Unit]) -> Unit | None:
        if self._is_stopped.is_set():
            raise InterruptedError(0, "the pull was stopped")
        problem = self._opened[0].partial.problem
        if problem is not None:
            raise problem
        with self._lock:
            return next(units, None)
