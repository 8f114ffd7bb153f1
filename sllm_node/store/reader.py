"""From a shard to a chunk: direct I/O in reader threads, checksums in others.

Reading and checking are two jobs for two groups of threads: a reader that stopped to check would
leave the disk with less to do. Threads get values (a file, a range, a view) and return or raise;
they touch no state of ours.

With `store.read_block_bytes` a read goes through a buffer of the reader's thread and is copied from
there to its chunk. The buffer stays in the processor's caches, into which the host of a virtual disk
copies 1.6 times as fast as into memory that was not touched lately (4.5 against 2.8 GB/s, see
scripts/bench/results/h200/x1_disk.json). A block should be a whole chunk: disks want long reads, and
many of them at a time.

O_DIRECT wants file offset, size and address aligned to 4 KiB: shards are padded to it, chunks begin
at it, and it is asserted here, because tmpfs would accept less and hide the mistake.
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash

from sllm_node.checkpoint.catalog import Checkpoint, ShardIdentity, identity_of
from sllm_node.checkpoint.index import FileChunk
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import CheckpointChangedError, ChecksumError, StorageReadError
from sllm_node.core.types import ModelId
from sllm_node.core.units import PAGE
from sllm_node.store.residency import Unit

log = logging.getLogger(__name__)


class ShardFile(Protocol):
    """An open shard."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset`; return the bytes read, fewer only at the end of the file.

        Raises:
            OSError: the file system's own.
        """

    def identity(self) -> ShardIdentity:
        """Return what tells this file from another in its place."""

    def close(self) -> None: ...


@runtime_checkable
class FetchedFile(Protocol):
    """A shard whose bytes may come from afar: a read can take long, and is counted."""

    fetched_bytes: int

    def stop(self) -> None:
        """Let reads under way end soon, with an error."""


class FileSystem(Protocol):
    """Where shards are opened."""

    def open(self, path: Path) -> ShardFile: ...


class DirectFile:
    """A shard opened with O_DIRECT, or without where the file system refuses."""

    def __init__(
        self,
        path: Path,
        refused: Callable[[Path, OSError], None],
        *,
        direct: bool,
        blocks: "Blocks | None" = None,
    ) -> None:
        self._path = path
        self._refused = refused
        self._blocks = blocks
        self._descriptor = self._open(os.O_DIRECT if direct else 0)

    def _open(self, direct: int) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self._refused(self._path, error)
            return self._open(0)

    def read_into(self, view: memoryview, offset: int) -> int:
        _assert_aligned(view, offset)
        if self._blocks is None:
            done = self._read_all(view, offset)
        else:
            done = self._read_through(self._blocks.mine(), view, offset)
        if not self._is_direct():
            os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def _read_through(self, block: memoryview, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            piece = block[: len(view) - done]
            count = self._read_all(piece, offset + done)
            np.copyto(  # without the GIL
                np.frombuffer(view[done : done + count], np.uint8),
                np.frombuffer(piece[:count], np.uint8),
            )
            done += count
            if count < len(piece):
                break
        return done

    def _read_all(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view) and (count := self._read(view[done:], offset + done)):
            done += count
        return done

    def _read(self, view: memoryview, offset: int) -> int:
        try:
            return self._preadv(view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if offset % PAGE:
                return 0  # behind the end of a file that was cut
            self._go_buffered(error)
        return self._preadv(view, offset)

    def _preadv(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor, [view], offset)

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def _go_buffered(self, error: OSError) -> None:
        """Go on without O_DIRECT, on the same open file: the path may lead to another by now."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if flags & os.O_DIRECT:  # else another thread was faster
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._refused(self._path, error)

    def identity(self) -> ShardIdentity:
        return identity_of(os.fstat(self._descriptor))

    def close(self) -> None:
        os.close(self._descriptor)


class Blocks:
    """A buffer for each reader thread, `size` bytes, aligned for direct I/O."""

    def __init__(self, size: int) -> None:
        assert size > 0
        assert size % PAGE == 0
        self._size = size
        self._local = threading.local()

    def mine(self) -> memoryview:
        """Return the buffer of the calling thread."""
        block: memoryview | None = getattr(self._local, "block", None)
        if block is None:
            block = self._local.block = memoryview(mmap.mmap(-1, self._size))
        return block


class DirectFileSystem:
    """The system's files; says once for each file system that it can't do direct I/O.

    Reads go through blocks of `block_bytes`; 0: straight to where they belong.
    """

    def __init__(self, *, direct: bool = True, block_bytes: int = 0) -> None:
        self._direct = direct
        self._blocks = Blocks(block_bytes) if block_bytes else None
        self._warned: set[int] = set()
        self._warning = threading.Lock()

    def open(self, path: Path) -> DirectFile:
        return DirectFile(path, self._warn, direct=self._direct, blocks=self._blocks)

    def _warn(self, path: Path, error: OSError) -> None:
        """Tell the log; from any thread."""
        device = path.parent.stat().st_dev
        with self._warning:
            is_known = device in self._warned
            self._warned.add(device)
        if not is_known:
            fields = {"path": str(path), "reason": error.strerror}
            log.warning("no direct I/O here, reading through the page cache", extra=fields)


def file_system(config: StoreConfig) -> DirectFileSystem:
    """Return the file system that the config asks for."""
    return DirectFileSystem(direct=config.direct_io, block_bytes=config.read_block_bytes)


def open_shards(checkpoint: Checkpoint, files: FileSystem) -> tuple[ShardFile, ...]:
    """Open every shard and make sure that it is the file whose index was read.

    Raises:
        CheckpointChangedError: a shard is another file, or of another size, than it was.
        StorageReadError: it can't be opened.
    """
    opened: list[ShardFile] = []
    try:
        for shard, identity in zip(checkpoint.index.shards, checkpoint.identities, strict=True):
            opened.append(_open(checkpoint, shard.name, files))
            check_identity(checkpoint.model, shard.name, opened[-1], identity)
    except BaseException:
        close_shards(tuple(opened))
        raise
    return tuple(opened)


def _open(checkpoint: Checkpoint, shard: str, files: FileSystem) -> ShardFile:
    try:
        return files.open(checkpoint.path / shard)
    except FileNotFoundError as error:
        raise CheckpointChangedError(checkpoint.model, shard, "was removed") from error
    except OSError as error:
        raise _read_error(checkpoint.model, shard, 0, error) from error


def check_identity(model: ModelId, shard: str, file: ShardFile, expected: ShardIdentity) -> None:
    """Make sure that `file` is the one whose index was read, and not written to since.

    Raises:
        CheckpointChangedError: it is not.
        StorageReadError: the file system failed.
    """
    try:
        found = file.identity()
    except OSError as error:
        raise _read_error(model, shard, 0, error) from error
    if found != expected:
        raise CheckpointChangedError(model, shard, _what_happened(found, expected))


def _what_happened(found: ShardIdentity, expected: ShardIdentity) -> str:
    if found.size < expected.size:
        return "was truncated"
    is_same_file = (found.device, found.inode) == (expected.device, expected.inode)
    return "was written to" if is_same_file else "was replaced"


def close_shards(files: tuple[ShardFile, ...]) -> None:
    """Close all of `files`; a failure to close says nothing about what was read."""
    for file in files:
        with suppress(OSError):
            file.close()


def stop_reads(files: tuple[ShardFile, ...]) -> None:
    """Let reads that may take long end soon: nobody wants their bytes any more."""
    for file in files:
        if isinstance(file, FetchedFile):
            file.stop()


def fetched_bytes(files: tuple[ShardFile, ...]) -> int:
    """Return how many bytes of what was read from `files` came from afar."""
    return sum(file.fetched_bytes for file in files if isinstance(file, FetchedFile))


def read_unit(checkpoint: Checkpoint, file: ShardFile, unit: Unit, view: memoryview) -> None:
    """Fill `view` with `unit`; in a reader thread.

    Raises:
        StorageReadError: the file system failed.
        CheckpointChangedError: the file was written to, or cut, since its index was read.
    """
    model, shard = checkpoint.model, checkpoint.index.shards[unit.shard].name
    try:
        count = file.read_into(view, unit.offset)
    except OSError as error:
        raise _read_error(model, shard, unit.offset, error) from error
    # After the read, so that what was changed before or during it is never taken for the old bytes.
    check_identity(model, shard, file, checkpoint.identities[unit.shard])
    if count != unit.size:
        problem = f"only {count} of {unit.size} bytes came"
        raise StorageReadError(model, shard, unit.offset + count, problem)


def check_unit(checkpoint: Checkpoint, unit: Unit, view: memoryview) -> None:
    """Compare the checksum of each file chunk in `view` with the index; in a checker thread.

    Raises:
        ChecksumError: naming the first file chunk that differs.
    """
    for chunk in unit.chunks:
        start = chunk.offset - unit.offset
        if xxhash.xxh3_64_intdigest(view[start : start + chunk.size]) != chunk.digest:
            raise checksum_error(checkpoint, chunk)


def checksum_error(checkpoint: Checkpoint, chunk: FileChunk) -> ChecksumError:
    """Return what says that the bytes of `chunk` are not those that were written."""
    index = checkpoint.index
    tensors = index.tensors_in(chunk.shard, chunk.start, chunk.decoded_size)
    shard = index.shards[chunk.shard].name
    return ChecksumError(checkpoint.model, shard, chunk.offset, chunk.size, tensors)


def _read_error(model: ModelId, shard: str, offset: int, error: OSError) -> StorageReadError:
    name = errno.errorcode.get(error.errno or 0, "")
    return StorageReadError(model, shard, offset, f"{error.strerror or error} ({name})")


def _assert_aligned(view: memoryview, offset: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert address % PAGE == 0, "chunks begin at a page"
    assert offset % PAGE == 0, "file chunks begin at a page"
    assert len(view) % PAGE == 0, "shards are padded to a page"
