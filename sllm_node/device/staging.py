"""Plans staging memory for a decoder: which chunks go together, where they lie, what kernels do. Pure.

Each *batch* of chunks gets a region of the ring: the chunks as they are stored, and room for those
chunks that go to their destination in part. A batch is planned once and used for every load: its
places are counted from the start of a region and from where the piece goes, which are added when it
is used. Regions are taken in turn. What reads a region is known by a token, which whoever takes the
same memory later must wait for.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from sllm_node.codec.names import RAW
from sllm_node.core.units import PAGE, align_up
from sllm_node.device.base import ChunkJob, WrongChunkError

Rows = npt.NDArray[np.void]

CHUNK: Final = np.dtype(
    [("encoded", "<u8"), ("encoded_size", "<u8"), ("output", "<u8"), ("output_size", "<u8")]
)
"""What a kernel decodes: addresses, aligned to 16 bytes, and sizes. The result is a u32, 0 if all is well."""
PIECE: Final = np.dtype([("bytes", "<u8"), ("size", "<u8")])
"""What a kernel takes a digest of: address and size, multiples of 64. The result is a u64."""
PROBLEMS: Final = {
    1: "its header does not fit its size",
    2: "its codes do not fit its counts",
}
"""What a decoder's results mean."""

JOBS_MAX: Final = 120
"""Of one batch; one launch decodes as many."""

_NO_ONE: Final = np.zeros(0, np.bool_)
_NO_DIGESTS: Final = np.zeros(0, np.uint64)
_NO_PIECES: Final = np.zeros(0, PIECE)

TokenT = TypeVar("TokenT")


class Staged(Struct, frozen=True, gc=False):
    """A chunk in a region."""

    job: ChunkJob
    stored_at: int
    """From the start of the region."""
    decoded_at: int | None
    """Too; None: it is decoded to its place."""


class Copy(Struct, frozen=True, gc=False):
    """`size` bytes from one place to another."""

    start: int
    to: int
    size: int


class Decoding:
    """The chunks of a batch that have one codec."""

    def __init__(self, codec: str, row: int, staged: Sequence[Staged]) -> None:
        self.codec = codec
        self.row = row
        """Of its first chunk in the batch."""
        self.largest = max(one.job.decoded_size for one in staged)
        """Decoded bytes of its largest chunk."""
        self._chunks = np.array([_chunk(one) for one in staged], np.uint64)
        in_room = np.array([one.decoded_at is not None for one in staged])
        self._in_room = in_room if in_room.any() else None

    def chunks(self, region: int, place: int) -> Rows:
        """Return (n,) `CHUNK` for a region and a place at these addresses."""
        made = self._chunks + np.array((region, 0, place, 0), np.uint64)
        if self._in_room is not None:
            made[self._in_room, 2] = self._chunks[self._in_room, 2] + np.uint64(region)
        return made.view(CHUNK)[:, 0]


class Batch:
    """Chunks that are staged and decoded together."""

    def __init__(self, staged: Sequence[Staged], direct: Sequence[ChunkJob], size: int) -> None:
        self.staged = tuple(sorted(staged, key=lambda one: one.job.codec))
        self.size = size
        """Of the region."""
        self.decoded_size = sum(one.job.decoded_size for one in staged)
        self.runs = tuple(_runs(self.staged))
        """From the source to the region."""
        self.direct = tuple(_direct(direct))
        """From the source to the place."""
        self.moves = tuple(_moves(self.staged))
        """From the region to the place, when kernels have run."""
        self.decodings = tuple(_decodings(self.staged))
        digests = [one.job.digest for one in self.staged]
        self.is_checked = any(digest is not None for digest in digests)
        self._is_asked, self._digests = _NO_ONE, _NO_DIGESTS
        self._pieces = _NO_PIECES
        if self.is_checked:
            self._is_asked = np.array([digest is not None for digest in digests], np.bool_)
            self._digests = np.array([digest or 0 for digest in digests], np.uint64)
            pieces = [(one.stored_at, one.job.size) for one in self.staged]
            self._pieces = np.array(pieces, PIECE)

    def pieces(self, region: int) -> Rows:
        """Return (n,) `PIECE` for a region at this address."""
        made = self._pieces.copy()
        made["bytes"] += np.uint64(region)
        return made

    def wrong(
        self, digests: npt.NDArray[np.uint64], errors: npt.NDArray[np.uint32]
    ) -> WrongChunkError | None:
        """Return the first thing that the kernels found wrong, by their results for each chunk."""
        count = len(self.staged)
        if self.is_checked:
            found = np.flatnonzero(self._is_asked & (digests[:count] != self._digests))
            if len(found):
                return WrongChunkError(self.staged[found[0]].job, None)
        if errors[:count].any():
            found = np.flatnonzero(errors[:count])
            number = int(errors[found[0]])
            problem = PROBLEMS.get(number, f"the kernel says {number}")
            return WrongChunkError(self.staged[found[0]].job, problem)
        return None


def _chunk(one: Staged) -> tuple[int, int, int, int]:
    output = one.job.place if one.decoded_at is None else one.decoded_at
    return one.stored_at, one.job.size, output, one.job.decoded_size


def _runs(staged: Sequence[Staged]) -> Iterator[Copy]:
    begin, at, size = 0, 0, 0
    for one in sorted(staged, key=lambda one: one.stored_at):
        if size and (begin + size, at + size) == (one.job.offset, one.stored_at):
            size += one.job.size
            continue
        if size:
            yield Copy(begin, at, size)
        begin, at, size = one.job.offset, one.stored_at, one.job.size
    if size:
        yield Copy(begin, at, size)


def _direct(jobs: Sequence[ChunkJob]) -> Iterator[Copy]:
    for job in jobs:
        for low, high in job.writes:
            yield Copy(job.offset + low - job.place, low, high - low)


def _moves(staged: Sequence[Staged]) -> Iterator[Copy]:
    for one in staged:
        origin = one.stored_at if one.job.codec == RAW else one.decoded_at
        if origin is not None:
            for low, high in one.job.writes:
                yield Copy(origin + low - one.job.place, low, high - low)


def _decodings(staged: Sequence[Staged]) -> Iterator[Decoding]:
    row = 0
    for codec, group in groupby(staged, key=lambda one: one.job.codec):
        some = list(group)
        if codec != RAW:
            yield Decoding(codec, row, some)
        row += len(some)


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
    return Batch(staged, direct, room_end)


class Ring(Generic[TokenT]):
    """Memory of which regions are taken in turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0
        self._taken: deque[tuple[int, int, TokenT]] = deque()
        """In the order in which they are met from `_next` on, once around."""

    def take(self, size: int) -> tuple[int, list[TokenT], list[TokenT]]:
        """Return where the next region begins, whom to wait for, and who is forgotten with that.

        Whoever read memory of the region is to be waited for, and remembered as long as there is
        other memory that he read: the next one to take that may come by another link.
        """
        assert size <= self.size
        taken, start = self._taken, self._next
        if start + size > self.size:
            behind = sum(low >= start for low, _, _ in taken)
            taken.rotate(-behind)  # they are passed over: met again at the end of this turn
            start = 0
        end = self._next = start + size
        waits, ended = [], []
        while taken and start <= taken[0][0] < end:
            _, high, token = taken.popleft()
            waits.append(token)
            if high > end:
                taken.appendleft((end, high, token))
            else:
                ended.append(token)
        return start, waits, ended

    def give(self, start: int, size: int, token: TokenT) -> None:
        """Whoever takes this region later must wait for `token`."""
        self._taken.append((start, start + size, token))

    def tokens(self) -> list[TokenT]:
        """Return and forget what is left."""
        left, self._taken = self._taken, deque()
        return list(dict.fromkeys(token for _, _, token in left))
