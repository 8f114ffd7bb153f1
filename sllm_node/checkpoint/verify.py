"""Reads every byte of a checkpoint again and names what is damaged."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.core.units import MIB

_THREADS: Final = 4
_WINDOW_BYTES: Final = 256 * MIB
"""What threads may hold at once; with it comes how many chunks are read ahead."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of a shard that is not what was written."""

    shard: str
    offset: int
    size: int
    tensors: tuple[str, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class _Chunk:
    path: Path
    shard: int
    offset: int
    size: int
    digest: int


def verify(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Compare every chunk with its digest; return what differs, in the order of the shards.

    `progress` is called with bytes done and bytes in all, in the caller's thread.
    """
    index = checkpoint.index
    _forget_cached(checkpoint)
    chunks = _chunks(checkpoint)
    batch = max(_THREADS, min(64, _WINDOW_BYTES // index.chunk_bytes))
    done = 0
    found: list[Damage] = []
    with ThreadPoolExecutor(_THREADS, "verify") as threads:
        while window := list(islice(chunks, batch)):
            for chunk, problem in zip(window, threads.map(_problem, window), strict=True):
                done += chunk.size
                if problem is not None:
                    tensors = index.tensors_in(chunk.shard, chunk.offset, chunk.size)
                    shard = index.shards[chunk.shard].name
                    found.append(Damage(shard, chunk.offset, chunk.size, tensors, problem))
            if progress is not None:
                progress(done, index.size)
    return found


def _chunks(checkpoint: Checkpoint) -> Iterator[_Chunk]:
    index = checkpoint.index
    for number, shard in enumerate(index.shards):
        for position, digest in enumerate(shard.digests):
            offset = position * index.chunk_bytes
            size = min(index.chunk_bytes, shard.size - offset)
            yield _Chunk(checkpoint.path / shard.name, number, offset, size, digest)


def _problem(chunk: _Chunk) -> str | None:
    """Return what is wrong with `chunk`. Runs in any thread."""
    try:
        data = _read(chunk)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if len(data) < chunk.size:
        return f"the file ends {chunk.size - len(data)} bytes too early"
    if chunk_digest(data) != chunk.digest:
        return "the bytes are not those written"
    return None


def _read(chunk: _Chunk) -> bytearray:
    data = bytearray(chunk.size)
    view = memoryview(data)
    done = 0
    descriptor = os.open(chunk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while done < chunk.size:
            count = os.preadv(descriptor, [view[done:]], chunk.offset + done)
            if count == 0:
                break
            done += count
    finally:
        os.close(descriptor)
    return bytearray(view[:done]) if done < chunk.size else data


def _forget_cached(checkpoint: Checkpoint) -> None:
    """Ask the system to read from the disk and not from memory."""
    for shard in checkpoint.index.shards:
        try:
            descriptor = os.open(checkpoint.path / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # reported with its chunks
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
