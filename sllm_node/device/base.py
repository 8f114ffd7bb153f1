"""What the store asks of an accelerator, and nothing more. Two implementations: cpu, and cuda to come.

Memory comes in two kinds: device memory, which models are served from, and pinned host memory,
which copies start from. A stream carries out its items one after another, beside the caller; an
event tells when everything enqueued before it is done.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self


class DeviceBuffer(Protocol):
    """Device memory of one owner; `close` gives it back."""

    @property
    def size(self) -> int: ...

    @property
    def array(self) -> object:
        """The bytes as something `torch.as_tensor` takes without a copy: (size,) uint8.

        A numpy array, or an object with `__cuda_array_interface__`. Views made of it must be gone
        before `close`; the implementation may raise `BufferError` otherwise.
        """

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""


class PinnedBuffer(Protocol):
    """Page-locked host memory, aligned to 4 KiB at least, so that direct I/O takes it."""

    @property
    def size(self) -> int: ...

    @property
    def view(self) -> memoryview:
        """All of it, writable, format 'B'."""

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""


Done = Callable[[BaseException | None], None]
"""Called once when an event happens, with the stream's failure if there was one.

From any thread: hand over to the event loop at once.
"""


class Event(Protocol):
    """A point in a stream."""

    def on_done(self, done: Done) -> None:
        """Call `done` once, from any thread, when all items before this point have ended."""


class Stream(Protocol):
    """Copies in order, beside the caller."""

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        """Enqueue a copy of `source`, pinned memory, to `destination` at byte `offset`.

        `source` must stay untouched until an event recorded afterwards happens.
        """

    def record(self) -> Event:
        """Return an event that happens when everything enqueued so far has ended.

        An item that failed makes every event recorded after it, until the next `record`, fail.
        """

    def close(self) -> None:
        """Wait for what is enqueued, then free the stream."""


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
        """Bytes allocated now."""

    def allocate(self, size: int) -> DeviceBuffer:
        """Take `size` bytes, which is positive.

        Raises:
            DeviceMemoryError: there is no room.
        """

    def pin(self, size: int, *, huge_pages: bool) -> PinnedBuffer:
        """Take `size` bytes of page-locked host memory, touched, so that no copy faults.

        Raises:
            DeviceError: the system refuses, with the remedy.
        """

    def stream(self) -> Stream: ...

    def close(self) -> None:
        """Free what is left. Streams and buffers must have been closed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
