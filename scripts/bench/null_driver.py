"""A CUDA driver that moves no bytes: what is left of a load is what the host does for it.

`install` puts it in the place of the real bindings, so the device's own code runs unchanged and no
GPU is needed. Streams keep a time instead of doing work: a copy from the host adds its bytes at the
rate of its link, an event is the time at which it happens, and waiting for one sleeps until then.
With a rate of 0 everything happens at once. Kernels and copies between devices take no time.
"""

import itertools
import mmap
import time
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver
from typing_extensions import override

from sllm_node.core.units import GIB, MIB
from sllm_node.device.cuda import CudaDevice

_OK = driver.CUresult.CUDA_SUCCESS
_GRANULARITY = 2 * MIB
_FIRST_ADDRESS = 1 << 50
_NO_RESERVE = 0x4000
"""MAP_NORESERVE, which Python 3.11 has no name for."""


class _Stream:
    """When it has done all that was enqueued."""

    def __init__(self) -> None:
        self.until = 0.0


class _Event:
    """When it happens."""

    def __init__(self) -> None:
        self.at = 0.0


class NullDriver:
    """The driver's calls that devices and decoders make, each as cheap as it can be.

    `rate`: bytes/s of a device's link; 0: copies take no time. `map_s`: seconds to map a piece.
    """

    def __init__(self, devices: int, rate: float = 0.0, map_s: float = 0.0) -> None:
        self._devices = devices
        self._seconds_a_byte = 1 / rate if rate else 0.0
        self._map_s = map_s
        self._handles = itertools.count(1)
        self._addresses = itertools.count(_FIRST_ADDRESS, 1 << 40)

    def install(self, put: Callable[[Any, str, Any], None] = setattr) -> None:
        """Take the place of the real calls, in this process; for good, unless `put` knows better."""
        answers: dict[str, Any] = {
            "cuInit": (_OK,), "cuDeviceGetCount": (_OK, self._devices),
            "cuDevicePrimaryCtxRetain": (_OK, 1), "cuMemGetAllocationGranularity": (_OK, _GRANULARITY),
            "cuDeviceCanAccessPeer": (_OK, 1), "cuDeviceGetPCIBusId": (_OK, b"none"),
            "cuMemGetInfo": (_OK, 140 * GIB, 140 * GIB),
            "cuModuleLoadData": (_OK, 1), "cuModuleGetFunction": (_OK, 1),
            "cuEventElapsedTime": (_OK, 1.0),
        }  # fmt: skip
        for name in (
            "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxSetCurrent", "cuCtxSynchronize",
            "cuDevicePrimaryCtxRelease", "cuEventDestroy", "cuLaunchKernel", "cuMemAddressFree",
            "cuMemHostRegister", "cuMemHostUnregister", "cuMemMap", "cuMemRelease", "cuMemSetAccess",
            "cuMemUnmap", "cuMemcpyDtoDAsync", "cuModuleUnload", "cuStreamDestroy",
        ):  # fmt: skip
            answers[name] = (_OK,)
        for name, answer in answers.items():
            put(driver, name, _answering(answer))
        for name, call in {
            "cuDeviceGetAttribute": lambda which, _: (_OK, 9 if "MAJOR" in which.name else 0),
            "cuDeviceGet": lambda ordinal: (_OK, ordinal),
            "cuStreamCreate": lambda _: (_OK, _Stream()),
            "cuEventCreate": lambda _: (_OK, _Event()),
            "cuMemAddressReserve": lambda *_: (_OK, next(self._addresses)),
            "cuMemCreate": self._create_memory,
            "cuMemcpyHtoDAsync": self._copy_in,
            "cuEventRecord": self._record,
            "cuStreamWaitEvent": self._wait_event,
            "cuEventSynchronize": lambda event: self._wait_until(event.at),
            "cuStreamSynchronize": lambda stream: self._wait_until(stream.until),
        }.items():
            put(driver, name, call)

    def _create_memory(self, *_: Any) -> tuple[Any, int]:
        if self._map_s:
            time.sleep(self._map_s)
        return _OK, next(self._handles)

    def _copy_in(self, _: int, __: int, size: int, stream: _Stream) -> tuple[Any]:
        stream.until = max(stream.until, time.perf_counter()) + size * self._seconds_a_byte
        return (_OK,)

    def _record(self, event: _Event, stream: _Stream) -> tuple[Any]:
        event.at = stream.until
        return (_OK,)

    def _wait_event(self, stream: _Stream, event: _Event, _: int) -> tuple[Any]:
        stream.until = max(stream.until, event.at)
        return (_OK,)

    def _wait_until(self, until: float) -> tuple[Any]:
        left = until - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return (_OK,)


def _answering(answer: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    return lambda *_: answer


class _Untouched:
    """Host memory that is never touched, so it may be larger than the machine's."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self.size = size
        self.view = memoryview(mmap.mmap(-1, size, flags=flags))

    def close(self) -> None:
        """Leave it to the collector."""
        self.view = memoryview(b"")


class NullDevice(CudaDevice):
    """A device of the null driver; its pool has addresses only."""

    @override
    def pin(self, size: int, *, huge_pages: bool) -> Any:
        """Return memory that nobody touched."""
        return _Untouched(size)
