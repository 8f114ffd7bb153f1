"""Plans staging memory for a decoder: which chunks go together, and where they lie. Pure.

Each *batch* of chunks gets a region of the ring: the chunks as they are stored, and room for those
chunks that go to their destination in part. Regions are taken in turn.
What reads a region is known by a token, which whoever takes the same memory later must wait for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from sllm_node.codec.names import RAW
from sllm_node.core.units import PAGE, align_up
from sllm_node.device.base import ChunkJob

JOBS_MAX: Final = 120
"""Of one batch; one launch decodes as many."""

TokenT = TypeVar("TokenT")


@dataclass(frozen=True, slots=True)
class Staged:
    """A chunk in a region."""

    job: ChunkJob
    stored_at: int
    """From the start of the region."""
    decoded_at: int | None
    """Too; None: it is decoded to its place."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that are staged and decoded together."""

    staged: tuple[Staged, ...]
    """Those of one codec lie together."""
    direct: tuple[ChunkJob, ...]
    """These go to their place at once."""
    size: int
    """Of the region."""

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (place in the source, place in the region, size) of each copy."""
        begin, at, size = 0, 0, 0
        for one in sorted(self.staged, key=lambda one: one.stored_at):
            if size and (begin + size, at + size) == (one.job.offset, one.stored_at):
                size += one.job.size
                continue
            if size:
                yield begin, at, size
            begin, at, size = one.job.offset, one.stored_at, one.job.size
        if size:
            yield begin, at, size


def batches(jobs: Sequence[ChunkJob], limit: int) -> Iterator[Batch]:
    """Yield `jobs` in batches of at most `limit` bytes; one that needs more is alone."""
    some: list[ChunkJob] = []
    size = 0
    for job in jobs:
        needed = _staged_bytes(job)
        if some and (size + needed > limit or len(some) == JOBS_MAX):
            yield _batch(some)
            some, size = [], 0
        some.append(job)
        size += needed
    if some:
        yield _batch(some)


def _is_direct(job: ChunkJob) -> bool:
    return job.codec == RAW and job.digest is None


def _needs_room(job: ChunkJob) -> bool:
    return job.codec != RAW and not job.is_whole


def _staged_bytes(job: ChunkJob) -> int:
    if _is_direct(job):
        return 0
    return align_up(job.size, PAGE) + (align_up(job.decoded_size, PAGE) if _needs_room(job) else 0)


def _batch(jobs: Sequence[ChunkJob]) -> Batch:
    direct = tuple(job for job in jobs if _is_direct(job))
    others = [job for job in jobs if not _is_direct(job)]
    stored: dict[int, int] = {}
    end = 0
    for job in others:
        stored[job.offset] = end
        end += align_up(job.size, PAGE)
    staged = []
    for job in sorted(others, key=lambda job: job.codec):
        room = None
        if _needs_room(job):
            room = end
            end += align_up(job.decoded_size, PAGE)
        staged.append(Staged(job, stored[job.offset], room))
    return Batch(tuple(staged), direct, end)


class Ring(Generic[TokenT]):
    """Memory of which regions are taken in turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0
        self._taken: list[tuple[int, int, TokenT]] = []

    def take(self, size: int) -> tuple[int, list[TokenT]]:
        """Return where the next region begins, and the tokens to wait for, which are forgotten."""
        assert size <= self.size
        start = self._next if self._next + size <= self.size else 0
        end = self._next = start + size
        over = [taken for taken in self._taken if taken[0] < end and start < taken[1]]
        self._taken = [taken for taken in self._taken if taken not in over]
        return start, [token for _, _, token in over]

    def give(self, start: int, size: int, token: TokenT) -> None:
        """Whoever takes this region later must wait for `token`."""
        self._taken.append((start, start + size, token))

    def tokens(self) -> list[TokenT]:
        """Return and forget what is left."""
        left, self._taken = self._taken, []
        return [token for _, _, token in left]
