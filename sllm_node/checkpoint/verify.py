"""Reads every byte of a checkpoint again, decodes it and names what is damaged."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.stored import all_chunks, is_replaced, problem_of
from sllm_node.core.errors import CheckpointReplacedError
from sllm_node.core.units import MIB

_THREADS: Final = 4
_WINDOW_BYTES: Final = 256 * MIB
"""What threads may hold at once; with it comes how many chunks are read ahead."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of a shard's file that is not what was written."""

    shard: str
    offset: int
    size: int
    tensors: tuple[str, ...]
    problem: str


def verify(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Compare every chunk with its digest and decode it; return what is wrong, in order.

    So is a file with more bytes than its chunks have: no checkpoint with one is opened.

    `progress` is called with bytes done and bytes in all, in the caller's thread.

    Raises:
        CheckpointReplacedError: what is wrong is that another one took its place meanwhile.
    """
    index = checkpoint.index
    _forget_cached(checkpoint)
    chunks = all_chunks(checkpoint)
    batch = max(_THREADS, min(64, _WINDOW_BYTES // index.chunk_bytes))
    paths = [checkpoint.path / shard.name for shard in index.shards]
    places = {shard.name: place for place, shard in enumerate(index.shards)}
    done = 0
    found: list[Damage] = []
    with ThreadPoolExecutor(_THREADS, "verify") as threads:
        while window := list(islice(chunks, batch)):
            problems = threads.map(lambda chunk: problem_of(paths[chunk.shard], chunk), window)
            for chunk, problem in zip(window, problems, strict=True):
                done += chunk.size
                if problem is not None:
                    tensors = index.tensors_in(chunk.shard, chunk.start, chunk.decoded_size)
                    shard = index.shards[chunk.shard].name
                    found.append(Damage(shard, chunk.offset, chunk.size, tensors, problem))
            if progress is not None:
                progress(done, index.file_size)
    found += _too_long(checkpoint)
    if found and is_replaced(checkpoint):
        raise CheckpointReplacedError(checkpoint.model)
    return sorted(found, key=lambda damage: (places[damage.shard], damage.offset))


def _too_long(checkpoint: Checkpoint) -> Iterator[Damage]:
    """Yield what files have beyond their last chunks."""
    for shard in checkpoint.index.shards:
        with suppress(OSError):  # reported with its chunks
            more = (checkpoint.path / shard.name).stat().st_size - shard.file_size
            if more > 0:
                problem = f"the file has {more} bytes too many"
                yield Damage(shard.name, shard.file_size, more, (), problem)


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
