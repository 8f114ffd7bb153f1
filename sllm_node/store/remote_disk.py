"""Writes what comes from a remote: the shards of a card, and the bits that say what is on the disk.

Everything goes through descriptors that were opened together and checked, so that a card that is
replaced or removed meanwhile is never written to by those who still fetch for the one before: what
they write goes to files that have no name any more.
"""

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from sllm_node.checkpoint.cards import BITS_FILE, pack_bits
from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import CheckpointChangedError


class Writers:
    """The threads that write what was fetched, and the buffers that they write from."""

    def __init__(self, threads: int, buffers: int, buffer_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "sllm-write")
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(buffers):
            self._buffers.put(mmap.mmap(-1, buffer_bytes))  # takes memory when first used

    def write_later(self, view: memoryview, write: Callable[[memoryview], None]) -> bool:
        """Call `write` with a copy of `view` in another thread; False: no buffer is free."""
        try:
            buffer = self._buffers.get_nowait()
        except Empty:
            return False
        if len(view) > len(buffer):
            self._buffers.put(buffer)
            return False
        memoryview(buffer)[: len(view)] = view
        self._threads.submit(self._write, buffer, len(view), write)
        return True

    def do_later(self, act: Callable[[], None]) -> None:
        """Call `act` in one of the threads; after `close` nobody does."""
        with suppress(RuntimeError):
            self._threads.submit(act)

    def _write(self, buffer: mmap.mmap, size: int, write: Callable[[memoryview], None]) -> None:
        try:
            write(memoryview(buffer)[:size])
        finally:
            self._buffers.put(buffer)

    def close(self) -> None:
        """Write what is to be written and end the threads."""
        self._threads.shutdown(wait=True)


class CardDisk:
    """The files of one card, open for writing. Used from threads; `close` when nobody else does."""

    def __init__(self, checkpoint: Checkpoint, *, direct: bool) -> None:
        self._bits = -1
        self._shards: list[int] = []
        try:
            # Before the shards: if the card is cleared in between, these bits are out of sight.
            self._bits = os.open(checkpoint.path / BITS_FILE, os.O_WRONLY | os.O_CLOEXEC)
            for shard in checkpoint.index.shards:
                self._shards.append(_open(checkpoint.path / shard.name, direct=direct))
            self._check_inodes(checkpoint)
        except BaseException:
            self.close()
            raise

    def _check_inodes(self, checkpoint: Checkpoint) -> None:
        wanted = checkpoint.identities
        for i, shard in enumerate(checkpoint.index.shards):
            if os.fstat(self._shards[i]).st_ino != wanted[i].inode:
                raise CheckpointChangedError(checkpoint.model, shard.name, "was replaced")

    def write(self, shard: int, view: memoryview, offset: int) -> None:
        """Write all of `view`, which is made of whole pages, as `offset` is.

        Raises:
            OSError: the file system's own.
        """
        done = 0
        while done < len(view):
            done += os.pwrite(self._shards[shard], view[done:], offset + done)

    def flush(self, bits: list[bool]) -> None:
        """Put what was written to the disk, then the `bits`.

        Raises:
            OSError: the file system's own.
        """
        for descriptor in self._shards:
            os.fdatasync(descriptor)
        os.pwrite(self._bits, pack_bits(bits), 0)  # torn, it would still name only what is there
        os.fdatasync(self._bits)

    def close(self) -> None:
        """Close all; what was not flushed may be lost."""
        for descriptor in (self._bits, *self._shards):
            if descriptor >= 0:
                os.close(descriptor)
        self._bits, self._shards = -1, []


def _open(path: Path, *, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0))
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
        return os.open(path, flags)  # the file system takes none
