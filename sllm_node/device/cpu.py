"""The CPU as an accelerator: ordinary memory, one thread a stream.

It is a device for machines without one, and the place where everything above the Device protocol is
tested. Copies are real and asynchronous, so the store meets the same orders of events as on a GPU.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from sllm_node.core.errors import DeviceError, DeviceMemoryError
from sllm_node.core.units import MIB, PAGE, align_up
from sllm_node.device.base import DeviceBuffer, Done

_TOUCH_THREADS_MAX = 16
_TOUCH_BYTES = 64 * MIB
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14): fault pages in without writing to them one by one."""


class CpuBuffer:
    """Anonymous memory that counts against its device."""

    def __init__(self, size: int, give_back: Callable[[int], None]) -> None:
        self._size = size
        self._give_back = give_back
        self._region: mmap.mmap | None = _map(size, huge_pages=True)
        self._array: npt.NDArray[np.uint8] | None = np.frombuffer(self._region, np.uint8, size)

    @property
    def size(self) -> int:
        return self._size

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        assert self._array is not None, "the buffer is closed"
        return self._array

    def close(self) -> None:
        if self._region is None:
            return
        self._array = None
        try:
            self._region.close()
        except BufferError:
            self._array = np.frombuffer(self._region, np.uint8, self._size)
            raise BufferError("views of this device buffer are still in use") from None
        self._region = None
        self._give_back(self._size)


class CpuPinnedBuffer:
    """Host memory, page-aligned and touched; on a CPU nothing needs to be locked for copies."""

    def __init__(self, size: int, *, huge_pages: bool) -> None:
        self._size = size
        region = _map(size, huge_pages=huge_pages)
        self._view = memoryview(region)[:size]
        _touch(self._view)

    @property
    def size(self) -> int:
        return self._size

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        # The region goes with its last view: the traceback of a failed read may still hold one.
        self._view = memoryview(b"")


class CpuEvent:
    """A marker in a stream's queue."""

    def __init__(self, marker: "Future[BaseException | None]") -> None:
        self._marker = marker

    def on_done(self, done: Done) -> None:
        self._marker.add_done_callback(lambda marker: done(marker.result()))


class CpuStream:
    """One thread that copies in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "sllm-copy")
        self._failure: BaseException | None = None

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        self._thread.submit(self._copy, destination, offset, source)

    def record(self) -> CpuEvent:
        return CpuEvent(self._thread.submit(self._mark))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _copy(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        try:
            assert isinstance(destination, CpuBuffer)
            target = destination.array[offset : offset + len(source)]
            np.copyto(target, np.frombuffer(source, np.uint8))  # releases the GIL
        except Exception as error:  # noqa: BLE001 - the root of this thread's work: told to the event
            self._failure = self._failure or error

    def _mark(self) -> BaseException | None:
        failure, self._failure = self._failure, None
        return failure


class CpuDevice:
    """`memory_bytes` of host memory as device memory."""

    def __init__(self, memory_bytes: int, name: str = "cpu") -> None:
        self._name = name
        self._total = memory_bytes
        self._used = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def memory_total(self) -> int:
        return self._total

    @property
    def memory_used(self) -> int:
        return self._used

    def allocate(self, size: int) -> CpuBuffer:
        assert size > 0
        if size > self._total - self._used:
            raise DeviceMemoryError(self._name, size, self._total - self._used, self._total)
        self._used += size
        try:
            return CpuBuffer(size, self._give_back)
        except OSError as error:
            self._used -= size
            raise DeviceError(self._name, f"the system refuses {size} bytes: {error}") from error

    def pin(self, size: int, *, huge_pages: bool) -> CpuPinnedBuffer:
        try:
            return CpuPinnedBuffer(size, huge_pages=huge_pages)
        except OSError as error:
            raise DeviceError(
                self._name,
                f"the system refuses {size} bytes of host memory ({error.strerror}); "
                "lower store.pool_bytes or raise the memory limit of the service",
            ) from error

    def stream(self) -> CpuStream:
        return CpuStream()

    def close(self) -> None:
        assert self._used == 0, f"{self._used} bytes of device memory are still allocated"

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

    def _give_back(self, size: int) -> None:
        self._used -= size


def _map(size: int, *, huge_pages: bool) -> mmap.mmap:
    region = mmap.mmap(-1, align_up(size, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        with suppress(OSError):  # a kernel without them: small pages do, more slowly
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _touch(view: memoryview) -> None:
    """Fault every page in, by several threads: one thread clears about 2 GB/s."""
    threads_count = min(_TOUCH_THREADS_MAX, os.cpu_count() or 1)
    pieces = [view[start : start + _TOUCH_BYTES] for start in range(0, len(view), _TOUCH_BYTES)]
    with ThreadPoolExecutor(threads_count, "sllm-touch") as threads:
        list(threads.map(_touch_piece, pieces))


def _touch_piece(piece: memoryview) -> None:
    # Not mmap.madvise: that one keeps the GIL, and with it the event loop, for the whole time.
    if _madvise(ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece), _POPULATE_WRITE):
        np.frombuffer(piece, np.uint8)[::PAGE] = 0  # an older kernel


def _libc_madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int], int]", function)


_madvise = _libc_madvise()
