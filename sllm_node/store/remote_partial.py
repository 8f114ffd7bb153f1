"""One checkpoint on its way from a remote onto NVMe: which of its file chunks are here.

Theory of operation. A file chunk is MISSING, COMING (somebody fetches or writes it) or HERE. Who
wants a range takes it run by run: what is HERE is read from the disk; what is MISSING becomes COMING
and is theirs to fetch; for what is COMING they wait, holding nothing, so nobody can wait in a ring.
A fetched run is copied to a writer's buffer if one is free, so that the load goes on at once; else
the fetching thread writes it, which is what holds memory and a network faster than the disk in
bounds. A disk that takes no more costs the copy, not the load: what is fetched is then only loaded.

Bits on the disk follow behind: shards are flushed first, then the bits of what was HERE before. So
a crash loses some of what was fetched, and never promises what is not there. When the last reader
has left and the last run is written, the partial *settles*: it flushes, and if all is HERE it
becomes an ordinary checkpoint.
"""

import errno
import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.cards import chunk_sizes, complete, read_bits
from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import CheckpointError, StorageWriteError, StoreFullError
from sllm_node.store.remote_disk import CardDisk, Writers

log = logging.getLogger(__name__)

FLUSH_BYTES: Final = 256 << 20
"""Written between two flushes: what a crash can cost."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class _State(Enum):
    MISSING = "missing"
    COMING = "coming"
    HERE = "here"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive file chunks of one shard that are all here, or all the asker's to fetch."""

    shard: int
    offset: int
    size: int
    is_here: bool


class Partial:
    """The bytes of one checkpoint that have come. Used from threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: Path,
        writers: Writers,
        open_disk: Callable[[Checkpoint], CardDisk],
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self.checkpoint = checkpoint
        self.problem: CheckpointError | None = None
        """Why what is fetched is not kept any more; the next reader tries again."""
        self.is_complete = False
        """All of it is an ordinary checkpoint by now."""
        self._store = store
        self._writers = writers
        self._open_disk = open_disk
        self._flush_bytes = flush_bytes
        index = checkpoint.index
        counts = [len(shard.digests) for shard in index.shards]
        self._offsets = [
            [*(chunk.offset for chunk in index.file_chunks(number)), shard.file_size]
            for number, shard in enumerate(index.shards)
        ]
        """Where the chunks of each shard begin in its file, and where the last one ends."""
        self._first = [sum(counts[:number]) for number in range(len(counts))]
        bits = read_bits(checkpoint.path, index)
        self._states = [_State.HERE if bit else _State.MISSING for bit in bits]
        self._change = threading.Condition()
        """Of everything here but `_disk`."""
        self._flushed = bits
        """What of it is known to be on the disk; only `_life`'s holder looks at it."""
        self._sizes = chunk_sizes(index)
        self._bytes_here = sum(size for size, bit in zip(self._sizes, bits, strict=True) if bit)
        self._unflushed = 0
        self._users = 0
        self._coming = 0
        self._life = threading.Lock()
        """Of `_disk`: opened by the first reader, closed when settled. Taken before `_change`."""
        self._disk: CardDisk | None = None
        self._settled = threading.Event()

    @property
    def bytes_here(self) -> int:
        """Bytes on NVMe."""
        return self._bytes_here

    # --- who wants bytes ----------------------------------------------------------------------

    def enter(self) -> bool:
        """Somebody begins to read, and ends with `leave`; False: it is an ordinary checkpoint now.

        Raises:
            CheckpointChangedError: the card is another one now.
            OSError: the file system's own.
        """
        with self._life:
            if self.is_complete:
                return False
            if self._disk is None:
                self._disk = self._open_disk(self.checkpoint)
                self._settled.clear()
                self.problem = None
            with self._change:
                self._users += 1
            return True

    def leave(self) -> None:
        """Let what has come be flushed, and completed if that is all; beside the caller."""
        with self._change:
            self._users -= 1
        self._writers.do_later(self._settle)

    def wait_settled(self) -> None:
        """Return when nobody reads any more and what has come is flushed or completed."""
        self._settled.wait()

    def take(self, shard: int, offset: int, size: int, stop: threading.Event) -> Run:
        """Return the first run of a range that begins and ends with file chunks.

        Raises:
            InterruptedError: `stop` was set.
        """
        begin, end = self._numbers(shard, offset, size)
        with self._change:
            self._change.wait_for(lambda: self._states[begin] is not _State.COMING or stop.is_set())
            if stop.is_set():
                raise InterruptedError(0, "the load was cancelled")
            found, last = self._states[begin], begin
            while last < end and self._states[last] is found:
                last += 1
            if found is _State.MISSING:
                self._states[begin:last] = [_State.COMING] * (last - begin)
                self._coming += last - begin
        ends_at = self._offsets[shard][last - self._first[shard]]
        return Run(shard, offset, ends_at - offset, found is _State.HERE)

    def wake(self) -> None:
        """Let those who wait look at their `stop` again."""
        with self._change:
            self._change.notify_all()

    def give_up(self, run: Run) -> None:
        """A run was not fetched."""
        self._set(run, _State.MISSING)

    def keep(self, run: Run, view: memoryview) -> None:
        """Write a run that was fetched and checked; `view` is free again on return."""
        if self.problem is not None:
            self._set(run, _State.MISSING)
        elif not self._writers.write_later(view, partial(self._write, run)):
            self._write(run, view)

    def lose(self, run: Run) -> bool:
        """What was read of a run is wrong: it is the asker's to fetch; False: somebody else's."""
        begin, end = self._chunks(run)
        with self._change:
            if any(state is not _State.HERE for state in self._states[begin:end]):
                return False
            self._states[begin:end] = [_State.COMING] * (end - begin)
            self._coming += end - begin
            self._bytes_here -= run.size
        fields = {"model": self.checkpoint.model, "shard": run.shard, "offset": run.offset}
        log.warning("what was fetched is damaged, fetching it again", extra=fields)
        return True

    def _chunks(self, run: Run) -> tuple[int, int]:
        return self._numbers(run.shard, run.offset, run.size)

    def _numbers(self, shard: int, offset: int, size: int) -> tuple[int, int]:
        """Return the first chunk of a range, and the one behind its last, as `_states` has them."""
        first, offsets = self._first[shard], self._offsets[shard]
        return first + bisect_left(offsets, offset), first + bisect_left(offsets, offset + size)

    def _set(self, run: Run, state: _State) -> None:
        begin, end = self._chunks(run)
        with self._change:
            self._states[begin:end] = [state] * (end - begin)
            self._coming -= end - begin
            if state is _State.HERE:
                self._bytes_here += run.size
                self._unflushed += run.size
            self._change.notify_all()

    # --- the disk -----------------------------------------------------------------------------

    def _write(self, run: Run, view: memoryview) -> None:
        assert self._disk is not None
        state = _State.MISSING
        try:
            self._disk.write(run.shard, view, run.offset)
            state = _State.HERE
        except OSError as error:
            self._stop_keeping(error)
        finally:
            self._set(run, state)
        if self._unflushed >= self._flush_bytes:
            with self._life:
                self._flush()
        self._settle()

    def _settle(self) -> None:
        """Once nobody reads and nothing is on its way: flush, and complete if all is here."""
        with self._life:
            if self._disk is None or not self._is_idle():
                return
            self._flush()
            if self.problem is None and all(state is _State.HERE for state in self._states):
                self._complete()  # before the close: a shard held open is no other of its inode
            self._disk.close()
            self._disk = None
            self._settled.set()

    def _is_idle(self) -> bool:
        with self._change:
            return not self._users and not self._coming

    def _flush(self) -> None:
        with self._change:
            bits = [state is _State.HERE for state in self._states]
            size, self._unflushed = self._unflushed, 0
        if self._disk is None or not size:
            return
        try:
            self._disk.flush(bits)
            self._flushed = bits
        except OSError as error:
            self._take_back()
            self._stop_keeping(error)

    def _take_back(self) -> None:
        """A flush failed: the system may have lost what was written since the one before."""
        with self._change:
            for chunk, state in enumerate(self._states):
                if state is _State.HERE and not self._flushed[chunk]:
                    self._states[chunk] = _State.MISSING
                    self._bytes_here -= self._sizes[chunk]

    def _complete(self) -> None:
        try:
            complete(self.checkpoint, self._store)
        except OSError as error:
            self._stop_keeping(error)
            return
        self.is_complete = True
        size = self.checkpoint.index.file_size
        log.info("fetched", extra={"model": self.checkpoint.model, "bytes": size})

    def _stop_keeping(self, error: OSError) -> None:
        if error.errno in _FULL:
            status = os.statvfs(self._store)
            missing = self.checkpoint.index.file_size - self._bytes_here
            free = status.f_bavail * status.f_frsize
            problem: CheckpointError = StoreFullError(str(self._store), missing, free)
        else:
            reason = error.strerror or str(error)
            problem = StorageWriteError(str(error.filename or self.checkpoint.path), reason)
        with self._change:
            is_news, self.problem = self.problem is None, problem
        if is_news:
            fields = {"model": self.checkpoint.model, "reason": str(problem)}
            log.warning("what is fetched is not kept", extra=fields)
