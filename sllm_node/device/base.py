"""What the store asks of an accelerator, and nothing more. Two implementations: cpu and cuda.

Memory comes in two kinds: device memory, which models are served from, and pinned host memory,
which copies start from. Device memory is *mapped* into ranges of addresses, piece by piece, and
unmapped again; a range keeps its addresses for life, so that what points into it (a module's
parameters, a CUDA graph) holds across an eviction and the next load.

A stream carries out its items one after another, beside the caller; an event tells when everything
enqueued before it is done. Mapping is such a sequence too: what is unmapped is there for what is
mapped afterwards. Every method returns at once unless it says that it waits.
"""

from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

from msgspec import Struct

Done = Callable[[BaseException | None], None]
"""Called once when an event happens, with the failure if there was one.

From any thread: hand over to the event loop at once.
"""
Decoded = Callable[[BaseException | None, float], None]
"""Called once, from any thread, when chunks are decoded: the failure, and the seconds it took.

A failure that is a chunk's own is a `WrongChunkError`.
"""


class Event(Protocol):
    """A point in a sequence of work."""

    def on_done(self, done: Done) -> None:
        """Call `done` once, from any thread, when all items before this point have ended."""


class DeviceBuffer(Protocol):
    """Device memory of one owner; `close` gives it back."""

    @property
    def size(self) -> int: ...

    @property
    def array(self) -> object:
        """The bytes as something `torch.as_tensor` takes without a copy: (size,) uint8.

        A numpy array, or an object with `__cuda_array_interface__`. Views made of it may outlive
        the memory, but must not be looked at any more then.
        """

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""


class DeviceRange(DeviceBuffer, Protocol):
    """A range of device addresses, with memory behind those of its pieces that are mapped."""

    @property
    def piece_bytes(self) -> int:
        """Size of a piece; the last one of a range may be smaller."""

    @property
    def mapped(self) -> Collection[int]:
        """The pieces that are mapped, or will be when the work enqueued is done."""

    def map(self, pieces: Collection[int]) -> Event:
        """Put memory behind `pieces`, none of which is mapped.

        If the event tells of a failure, they are to be unmapped all the same.

        Raises:
            DeviceMemoryError: there is no room; nothing was changed.
        """

    def unmap(self, pieces: Collection[int]) -> Event:
        """Give the memory behind `pieces`, all of which are mapped, back to the system."""


class PinnedBuffer(Protocol):
    """Page-locked host memory, aligned to 4 KiB at least, so that direct I/O takes it."""

    @property
    def size(self) -> int: ...

    @property
    def view(self) -> memoryview:
        """All of it, writable, format 'B'."""

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""


class Stream(Protocol):
    """Copies in order, beside the caller."""

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        """Enqueue a copy of `source`, pinned memory, to `destination` at byte `offset`.

        `source` must stay untouched until an event recorded afterwards happens.
        """

    def copy_device(
        self,
        destination: DeviceBuffer,
        offset: int,
        source: DeviceBuffer,
        source_range: tuple[int, int],
    ) -> None:
        """Enqueue a copy of bytes [start, end) of `source`, on this device or a sibling."""

    def record(self) -> Event:
        """Return an event that happens when everything enqueued so far has ended.

        An item that failed makes every event recorded after it, until the next `record`, fail.

        Raises:
            DeviceError: no event can be had; everything enqueued has ended then.
        """

    def close(self) -> None:
        """Wait for what is enqueued, then free the stream."""


class ChunkJob(Struct, frozen=True, gc=False):
    """A file chunk in pinned memory and where its decoded bytes go.

    A model has tens of thousands, kept for its next load, so they are none of the collector's.
    """

    codec: str
    offset: int
    """In the source, a multiple of 4 KiB."""
    size: int
    place: int
    """Of the first decoded byte, from where the whole piece goes."""
    decoded_size: int
    writes: tuple[tuple[int, int], ...]
    """Bytes [start, end) that may be written, from there too, in order; the others are kept."""
    digest: int | None = None
    """What the stored bytes must have, as they lie on the device; None: don't look."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the chunk goes to the destination."""
        return self.writes == ((self.place, self.place + self.decoded_size),)


class ChunkJobs:
    """The chunks of a piece of pinned memory that go to one destination; made once, decoded often."""

    __slots__ = ("jobs", "plans", "size")

    def __init__(self, jobs: Iterable[ChunkJob]) -> None:
        self.jobs = tuple(jobs)
        self.size = sum(job.size for job in self.jobs)
        """Stored bytes."""
        self.plans: dict[int, Any] = {}
        """What a decoder has made of them, by the staging memory that it had."""


class WrongChunkError(Exception):
    """A chunk that is not what it should be. Never leaves the store."""

    def __init__(self, job: ChunkJob, problem: str | None) -> None:
        super().__init__(problem or "the digest is another one")
        self.job = job
        self.problem = problem
        """What its codec says; None: the digest is another one."""


class Decoder(Protocol):
    """Decodes chunks onto one device, behind the copies that bring them."""

    @property
    def needs_staging(self) -> bool:
        """Whether it wants device memory for encoded bytes before it decodes the first ones."""

    @property
    def verifies(self) -> bool:
        """Whether it is the better place to compare digests than the host."""

    def stage_in(self, staging: DeviceBuffer) -> None:
        """Use this memory, which stays the caller's; it is there before anything is decoded."""

    def decode(
        self,
        link: Stream,
        destination: DeviceBuffer,
        place: int,
        source: memoryview,
        jobs: ChunkJobs,
        done: Decoded,
    ) -> None:
        """Enqueue the copy of `jobs` from `source` by `link`, and their decoding behind it.

        The piece begins at byte `place` of the destination, or would, if only a part goes there.
        `source`, pinned memory, must stay untouched until `done` is called.
        """

    def close(self) -> None:
        """Wait for what is enqueued, then free the rest."""


class Device(Protocol):
    """One accelerator."""

    @property
    def name(self) -> str:
        """As in the config: `cpu`, `cuda:0`. Also a name that torch knows."""

    @property
    def memory_total(self) -> int:
        """Bytes that this node may use of it."""

    @property
    def memory_used(self) -> int:
        """Bytes mapped now."""

    @property
    def granularity(self) -> int:
        """Every range and buffer takes a multiple of this many bytes."""

    def free_bytes(self) -> int:
        """Return how much memory can be taken now; waits for what was enqueued."""

    def reserve(self, size: int, piece_bytes: int) -> DeviceRange:
        """Take a range of addresses for `size` bytes, in pieces, without memory yet.

        `piece_bytes` is rounded up to the granularity.

        Raises:
            DeviceError: the system refuses.
        """

    def allocate(self, size: int) -> DeviceBuffer:
        """Take `size` bytes, which is positive; waits until they are there.

        Raises:
            DeviceMemoryError: there is no room.
        """

    def pin(self, size: int, *, huge_pages: bool) -> PinnedBuffer:
        """Take `size` bytes of page-locked host memory; waits until they are touched.

        Copies to any device of the process may start from it.

        Raises:
            DeviceError: the system refuses, with the remedy.
        """

    def stream(self) -> Stream:
        """Return a stream of this device's own link."""

    def relay(self, sibling: "Device") -> Stream:
        """Return a stream to this device through the link of `sibling`, which passes bytes on.

        Raises:
            DeviceMemoryError: the sibling has no room for the relay's staging memory.
        """

    def decoder(self) -> Decoder:
        """Return a decoder to this device; waits until its kernels are compiled.

        Raises:
            KernelError: they can't be.
            DeviceError: the driver refuses.
        """

    def can_reach(self, sibling: "Device") -> bool:
        """Tell whether bytes go between the two without passing the host."""

    def check(self) -> None:
        """Wait for what is under way and make sure that the device still works.

        Raises:
            DeviceLostError: nothing works on it any more in this process.
        """

    def close(self) -> None:
        """Free what is left. Streams and buffers must have been closed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
