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
    some: list[tuple[ChunkJob, int, int]] = []
    size = 0
    for job in jobs:
        stored, room = _staged_bytes(job)
        if some and (size + stored + room > limit or len(some) == JOBS_MAX):
            yield _batch(some)
            some, size = [], 0
        some.append((job, stored, room))
        size += stored + room
    if some:
        yield _batch(some)


def _staged_bytes(job: ChunkJob) -> tuple[int, int]:
    """Return the bytes that it needs in a region, stored and decoded."""
    if job.codec == RAW:
        return (0 if job.digest is None else align_up(job.size, PAGE)), 0
    return align_up(job.size, PAGE), 0 if job.is_whole else align_up(job.decoded_size, PAGE)


def _batch(jobs: Sequence[tuple[ChunkJob, int, int]]) -> Batch:
    direct, staged = [], []
    stored_end, room_end = 0, sum(stored for _, stored, _ in jobs)
    for job, stored, room in jobs:
        if stored:
            staged.append(Staged(job, stored_end, room_end if room else None))
            stored_end, room_end = stored_end + stored, room_end + room
        else:
            direct.append(job)
    staged.sort(key=lambda one: one.job.codec)
    return Batch(tuple(staged), tuple(direct), room_end)


class Ring(Generic[TokenT]):
    """Memory of which regions are taken in turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0
        self._taken: list[tuple[int, int, TokenT]] = []

    def take(self, size: int) -> tuple[int, list[TokenT], list[TokenT]]:
        """Return where the next region begins, whom to wait for, and who is forgotten with that.

        Whoever read memory of the region is to be waited for, and remembered as long as there is
        other memory that he read: the next one to take that may come by another link.
        """
        assert size <= self.size
        start = self._next if self._next + size <= self.size else 0
        end = self._next = start + size
        kept: list[tuple[int, int, TokenT]] = []
        waits, ended = [], []
        for low, high, token in self._taken:
            if end <= low or high <= start:
                kept.append((low, high, token))
                continue
            waits.append(token)
            rest = [(low, start, token)] * (low < start) + [(end, high, token)] * (end < high)
            kept += rest
            if not rest:
                ended.append(token)
        self._taken = kept
        return start, waits, ended

    def give(self, start: int, size: int, token: TokenT) -> None:
        """Whoever takes this region later must wait for `token`."""
        self._taken.append((start, start + size, token))

    def tokens(self) -> list[TokenT]:
        """Return and forget what is left."""
        left, self._taken = self._taken, []
        return list(dict.fromkeys(token for _, _, token in left))
