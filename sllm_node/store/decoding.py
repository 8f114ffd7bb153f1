"""From units to the jobs of a decoder, and back from its failures to errors that say where."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import CheckpointError, CodecError
from sllm_node.device.base import ChunkJob, ChunkJobs, WrongChunkError
from sllm_node.store.pipeline import Slice, Target
from sllm_node.store.reader import checksum_error
from sllm_node.store.residency import Unit


def by_target(slices: Iterable[Slice]) -> Iterator[tuple[Target, list[Slice]]]:
    """Yield each target with its slices, which lie one after another."""
    for _, some in groupby(slices, key=lambda cut: id(cut.target)):
        found = list(some)
        yield found[0].target, found


def jobs_of(unit: Unit, slices: list[Slice], *, verify: bool) -> tuple[int, ChunkJobs]:
    """Return where a unit begins on the target of `slices`, and what a decoder has to do for them.

    A chunk that reaches beyond them is decoded whole and written in part: beside it may be what the
    device has kept, or the end of its part. What is done for a unit that goes there whole, which is
    the rule, is kept with the unit.
    """
    base = unit.device_offset
    place = base - slices[0].target.part.start
    ranges = tuple((cut.start - base, cut.end - base) for cut in slices)
    if ranges != ((0, unit.device_size),):
        return place, ChunkJobs(_jobs(unit, ranges, verify=verify))
    if verify not in unit.whole:
        unit.whole[verify] = ChunkJobs(_whole_jobs(unit, verify=verify))
    return place, unit.whole[verify]


def _whole_jobs(unit: Unit, *, verify: bool) -> Iterator[ChunkJob]:
    base, chunks = unit.offset, unit.chunks
    for chunk in chunks:
        begin, size = chunk.start - chunks[0].start, chunk.decoded_size
        digest, writes = chunk.digest if verify else None, ((begin, begin + size),)
        yield ChunkJob(chunk.codec, chunk.offset - base, chunk.size, begin, size, writes, digest)


def _jobs(unit: Unit, ranges: tuple[tuple[int, int], ...], *, verify: bool) -> Iterator[ChunkJob]:
    chunks = unit.chunks
    for chunk in chunks:
        begin = chunk.start - chunks[0].start
        end = begin + chunk.decoded_size
        writes = tuple(
            (max(begin, low), min(end, high)) for low, high in ranges if low < end and begin < high
        )
        if writes:
            digest = chunk.digest if verify else None
            offset = chunk.offset - unit.offset
            yield ChunkJob(
                chunk.codec, offset, chunk.size, begin, chunk.decoded_size, writes, digest
            )


def named(checkpoint: Checkpoint, unit: Unit, error: WrongChunkError) -> CheckpointError:
    """Return what a decoder found wrong with a chunk of `unit`, with the place in its shard."""
    offset = unit.offset + error.job.offset
    (chunk,) = checkpoint.index.chunks_within(unit.shard, offset, error.job.size)
    if error.problem is None:
        return checksum_error(checkpoint, chunk)
    shard = checkpoint.index.shards[unit.shard].name
    where = f"model {checkpoint.model!r}, {shard}, bytes {offset} to {offset + chunk.size}"
    return CodecError(chunk.codec, f"{where}: {error.problem}")
