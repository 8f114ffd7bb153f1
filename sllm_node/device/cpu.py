"""The CPU as an accelerator: ordinary memory, one thread a stream.

It is a device for machines without one, and the place where everything above the Device protocol is
tested. Copies are real and asynchronous, and so are mapping and unmapping, so the store meets the
same orders of events as on a GPU. There may be several, `cpu:0` and `cpu:1`.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from sllm_node.core.errors import DeviceError
from sllm_node.core.units import PAGE, align_up
from sllm_node.device.base import Device, DeviceBuffer, Done
from sllm_node.device.cpu_decoder import CpuDecoder
from sllm_node.device.host import discard, map_memory, touch
from sllm_node.device.ledger import Ledger

MemoryT = TypeVar("MemoryT")


class CpuEvent:
    """A marker in a thread's queue."""

    def __init__(self, marker: "Future[BaseException | None]") -> None:
        self._marker = marker

    def on_done(self, done: Done) -> None:
        self._marker.add_done_callback(lambda marker: done(marker.result()))


class CpuRange:
    """Anonymous memory; pages come when they are written to, and go when they are unmapped."""

    def __init__(
        self, size: int, piece_bytes: int, ledger: Ledger, memory: ThreadPoolExecutor
    ) -> None:
        self._size = size
        self._piece_bytes = align_up(piece_bytes, PAGE)
        self._ledger = ledger
        self._memory = memory
        self._view = memoryview(map_memory(size, huge_pages=True))
        self._array: npt.NDArray[np.uint8] | None = np.frombuffer(self._view, np.uint8, size)
        self._mapped: set[int] = set()

    @property
    def size(self) -> int:
        return self._size

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        assert self._array is not None, "the range is closed"
        return self._array

    @property
    def piece_bytes(self) -> int:
        return self._piece_bytes

    @property
    def mapped(self) -> Collection[int]:
        return self._mapped

    def map(self, pieces: Collection[int]) -> CpuEvent:
        assert not self._mapped & set(pieces)
        self._ledger.take(self._bytes(pieces))
        self._mapped |= set(pieces)
        return CpuEvent(self._memory.submit(_nothing))

    def unmap(self, pieces: Collection[int]) -> CpuEvent:
        assert self._mapped >= set(pieces)
        self._ledger.give_back(self._bytes(pieces))
        self._mapped -= set(pieces)
        parts = [self._view[slice(*self._ends(piece))] for piece in pieces]
        return CpuEvent(self._memory.submit(_discard, parts))

    def close(self) -> None:
        if self._array is None:
            return
        self.unmap(set(self._mapped))
        self._array = None  # the addresses go with the last view

    def _bytes(self, pieces: Collection[int]) -> int:
        return sum(end - start for start, end in map(self._ends, pieces))

    def _ends(self, piece: int) -> tuple[int, int]:
        start = piece * self._piece_bytes
        assert 0 <= start < len(self._view)
        return start, min(start + self._piece_bytes, len(self._view))


def _nothing() -> BaseException | None:
    return None


def _discard(parts: list[memoryview]) -> BaseException | None:
    for part in parts:
        discard(part)
    return None


class CpuPinnedBuffer:
    """Host memory, page-aligned and touched; on a CPU nothing needs to be locked for copies."""

    def __init__(self, size: int, *, huge_pages: bool) -> None:
        self._size = size
        self._view = memoryview(map_memory(size, huge_pages=huge_pages))[:size]
        touch(self._view, huge_pages=huge_pages)

    @property
    def size(self) -> int:
        return self._size

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        # The region goes with its last view: the traceback of a failed read may still hold one.
        self._view = memoryview(b"")


class CpuStream:
    """One thread that copies in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "sllm-copy")
        self._failure: BaseException | None = None

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        self._thread.submit(self._copy, destination, offset, np.frombuffer(source, np.uint8))

    def copy_device(
        self,
        destination: DeviceBuffer,
        offset: int,
        source: DeviceBuffer,
        source_range: tuple[int, int],
    ) -> None:
        assert isinstance(source, CpuRange)
        self._thread.submit(self._copy, destination, offset, source.array[slice(*source_range)])

    def record(self) -> CpuEvent:
        return CpuEvent(self._thread.submit(self._mark))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _copy(self, destination: DeviceBuffer, offset: int, source: npt.NDArray[np.uint8]) -> None:
        try:
            assert isinstance(destination, CpuRange)
            target = destination.array[offset : offset + len(source)]
            np.copyto(target, source)  # releases the GIL
        except Exception as error:  # noqa: BLE001 - the root of this thread's work: told to the event
            self._failure = self._failure or error

    def _mark(self) -> BaseException | None:
        failure, self._failure = self._failure, None
        return failure


class CpuDevice:
    """`memory_bytes` of host memory as device memory."""

    def __init__(self, memory_bytes: int, name: str = "cpu") -> None:
        self._name = name
        self._ledger = Ledger(name, memory_bytes)
        self._memory = ThreadPoolExecutor(1, "sllm-memory")

    @property
    def name(self) -> str:
        return self._name

    @property
    def memory_total(self) -> int:
        return self._ledger.total

    @property
    def memory_used(self) -> int:
        return self._ledger.used

    @property
    def granularity(self) -> int:
        return PAGE

    def free_bytes(self) -> int:
        return self._ledger.total - self._ledger.used

    def reserve(self, size: int, piece_bytes: int) -> CpuRange:
        assert size > 0
        assert piece_bytes > 0
        return self._take(
            lambda: CpuRange(size, piece_bytes, self._ledger, self._memory), size, "device"
        )

    def allocate(self, size: int) -> CpuRange:
        made = self.reserve(size, size)
        made.map((0,))
        return made

    def pin(self, size: int, *, huge_pages: bool) -> CpuPinnedBuffer:
        return self._take(lambda: CpuPinnedBuffer(size, huge_pages=huge_pages), size, "host")

    def stream(self) -> CpuStream:
        return CpuStream()

    def relay(self, sibling: Device) -> CpuStream:
        assert sibling is not self
        return CpuStream()

    def decoder(self) -> CpuDecoder:
        return CpuDecoder()

    def can_reach(self, sibling: Device) -> bool:
        return isinstance(sibling, CpuDevice)

    def check(self) -> None:
        """Do nothing: a CPU that failed would not get here."""

    def close(self) -> None:
        assert self._ledger.used == 0, f"{self._ledger.used} bytes of memory are still allocated"
        self._memory.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def _take(self, take: Callable[[], MemoryT], size: int, kind: str) -> MemoryT:
        try:
            return take()
        except OSError as error:
            raise DeviceError(
                self._name,
                f"the system refuses {size} bytes of {kind} memory ({error.strerror}); lower "
                "store.pool_bytes or device.memory_bytes, or raise the service's memory limit",
            ) from error
