"""An NVIDIA GPU through the CUDA driver, which only this module and its siblings of `device` call.

`cuda_context` tells what the driver's answers mean, `cuda_memory` maps memory, `cuda_stream` copies;
this module opens a GPU and puts them together. Also in `device`: the decoder, and the kernels.
"""

import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cuda.bindings import driver

from sllm_node.core.errors import DeviceError, DeviceLostError
from sllm_node.device.base import Device
from sllm_node.device.cuda_context import RESULT, CudaContext, OnLost, name_of
from sllm_node.device.cuda_decoder import CudaDecoder
from sllm_node.device.cuda_memory import CudaPinnedBuffer, CudaRange
from sllm_node.device.cuda_stream import CudaRelay, CudaStream
from sllm_node.device.ledger import Ledger

log = logging.getLogger(__name__)


class CudaDevice:
    """GPU number `ordinal` of those that this process sees.

    `memory_bytes` of it may be used; None: what is free now, less `reserve_bytes` for what torch
    and the driver take besides. `siblings` are the ordinals that are to reach its memory.
    """

    def __init__(
        self,
        ordinal: int,
        memory_bytes: int | None = None,
        *,
        reserve_bytes: int = 0,
        siblings: Collection[int] = (),
        on_lost: OnLost = lambda error: log.critical("device lost", extra={"error": str(error)}),
    ) -> None:
        self._name = f"cuda:{ordinal}"
        self.ordinal = ordinal
        handle = _open(self._name, ordinal)
        code, context = driver.cuDevicePrimaryCtxRetain(handle)
        if code != RESULT.CUDA_SUCCESS:
            raise DeviceError(self._name, f"no context: {name_of(code)}")
        self.cuda = CudaContext(self._name, handle, context, on_lost)
        self.memory = ThreadPoolExecutor(
            1, "sllm-memory", initializer=driver.cuCtxSetCurrent, initargs=(context,)
        )
        self.properties = _properties(ordinal)
        option = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self._granularity = int(
            self.cuda.check(
                "ask for the granularity",
                driver.cuMemGetAllocationGranularity(self.properties, option),
            )
        )
        self._reachable = {other for other in siblings if _can_reach(other, ordinal)}
        self.access = [_access(number) for number in sorted({ordinal, *self._reachable})]
        self.nodes = {node for n in (ordinal, *siblings) if (node := _numa_node(n)) is not None}
        total = memory_bytes
        if total is None:
            total = (self.driver_free() - reserve_bytes) // self._granularity * self._granularity
        if total <= 0:
            raise DeviceError(self._name, "has no free memory; is another process using it?")
        self.ledger = Ledger(self._name, total)

    @property
    def name(self) -> str:
        return self._name

    @property
    def memory_total(self) -> int:
        return self.ledger.total

    @property
    def memory_used(self) -> int:
        return self.ledger.used

    @property
    def granularity(self) -> int:
        return self._granularity

    def driver_free(self) -> int:
        """Return the bytes that the driver says are free, after all that was enqueued."""
        self.memory.submit(_nothing).result()
        with self.cuda:
            return int(self.cuda.check("ask for free memory", driver.cuMemGetInfo())[0])

    def free_bytes(self) -> int:
        return min(self.ledger.total - self.ledger.used, self.driver_free())

    def reserve(self, size: int, piece_bytes: int) -> CudaRange:
        assert size > 0
        assert piece_bytes > 0
        return CudaRange(self, size, piece_bytes)

    def allocate(self, size: int) -> CudaRange:
        made = self.reserve(size, size)
        made.map((0,)).wait()
        return made

    def pin(self, size: int, *, huge_pages: bool) -> CudaPinnedBuffer:
        try:
            return CudaPinnedBuffer(self, size, huge_pages=huge_pages)
        except OSError as error:
            raise DeviceError(
                self._name,
                f"the system refuses {size} bytes of host memory ({error.strerror}); "
                "lower store.pool_bytes or raise the memory limit of the service",
            ) from error

    def stream(self) -> CudaStream:
        return CudaStream(self.cuda)

    def relay(self, sibling: Device) -> CudaRelay:
        assert isinstance(sibling, CudaDevice)
        return CudaRelay(self, sibling)

    def decoder(self) -> CudaDecoder:
        stream = self.stream()
        try:
            return CudaDecoder(self.cuda, stream, lambda size: self.pin(size, huge_pages=False))
        except BaseException:  # or each encoded load that is refused would leave a thread behind
            stream.close()
            raise

    def can_reach(self, sibling: Device) -> bool:
        return isinstance(sibling, CudaDevice) and sibling.ordinal in self._reachable

    def check(self) -> None:
        with self.cuda:
            (code,) = driver.cuCtxSynchronize()
        error = self.cuda.error("check the device", code)
        if isinstance(error, DeviceLostError):
            raise error

    def close(self) -> None:
        assert self.ledger.used == 0, f"{self.ledger.used} bytes of memory are still allocated"
        self.memory.shutdown(wait=True)
        driver.cuDevicePrimaryCtxRelease(self.cuda.handle)

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


def device_count() -> int:
    """Return how many GPUs this process sees.

    Raises:
        DeviceError: there is no driver.
    """
    _initialise("cuda")
    code, count = driver.cuDeviceGetCount()
    if code != RESULT.CUDA_SUCCESS:
        raise DeviceError("cuda", name_of(code))
    return int(count)


def _initialise(name: str) -> None:
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # the driver's library is not there
        raise DeviceError(name, f"there is no CUDA driver on this machine ({error})") from error
    if code != RESULT.CUDA_SUCCESS:
        raise DeviceError(name, f"the CUDA driver does not start: {name_of(code)}")


def _open(name: str, ordinal: int) -> Any:
    count = device_count()
    if not 0 <= ordinal < count:
        raise DeviceError(name, f"there are {count} CUDA devices here, numbered from 0")
    return driver.cuDeviceGet(ordinal)[1]


def _properties(ordinal: int) -> Any:
    made = driver.CUmemAllocationProp()
    made.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = ordinal
    return made


def _access(ordinal: int) -> Any:
    made = driver.CUmemAccessDesc()
    made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = ordinal
    made.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return made


def _can_reach(origin: int, target: int) -> bool:
    if origin == target:
        return False
    code, able = driver.cuDeviceCanAccessPeer(origin, target)
    return bool(code == RESULT.CUDA_SUCCESS and able)


def _numa_node(ordinal: int) -> int | None:
    with suppress(OSError, ValueError):
        code, name = driver.cuDeviceGetPCIBusId(32, ordinal)
        if code == RESULT.CUDA_SUCCESS:
            bus = bytes(name).split(b"\0")[0].decode().lower()
            return int(Path(f"/sys/bus/pci/devices/{bus}/numa_node").read_text())
    return None


def _nothing() -> None:
    return None
