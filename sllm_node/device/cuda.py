"""An NVIDIA GPU through the CUDA driver, which only this module, its decoder and its kernels call.

Device memory is virtual: a range of addresses is reserved once, and physical memory is created,
mapped and unmapped piece by piece by one thread a device, in order. Siblings (other GPUs of this
process that can reach the memory directly) get access to every piece, for relays and clones.

Nothing polls. A thread a stream waits for events with the driver's blocking wait, which releases
Python's lock, and calls back. The contexts are the primary ones, which torch uses too; each call
into the driver makes its device's context current and puts the caller's back afterwards.

An error that poisons the context (an illegal address, an uncorrectable memory error) leaves nothing
usable in this process: `on_lost` is called once and is expected to end it.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread, local
from types import TracebackType
from typing import Any, Final, Self

from cuda.bindings import driver

from sllm_node.core.errors import DeviceError, DeviceLostError, SllmError
from sllm_node.core.units import MIB, align_up
from sllm_node.device.base import Device, DeviceBuffer, Done
from sllm_node.device.cuda_decoder import CudaDecoder
from sllm_node.device.host import address_of, map_memory, prefer_nodes, touch
from sllm_node.device.ledger import Ledger

log = logging.getLogger(__name__)

RELAY_SLOTS: Final = 4
RELAY_SLOT_BYTES: Final = 32 * MIB
"""A relay's ring on the sibling: measured to keep both links busy with copies of 16 MiB and more."""

_Result = driver.CUresult
_OK: Final = _Result.CUDA_SUCCESS
_WITHOUT_TIMES: Final = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
_WAITED_FOR: Final = driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC | _WITHOUT_TIMES
_POISON: Final = frozenset(
    getattr(_Result, "CUDA_ERROR_" + name)
    for name in (
        "ASSERT", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "ECC_UNCORRECTABLE", "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "INVALID_ADDRESS_SPACE",
        "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "MISALIGNED_ADDRESS",
        "NVLINK_UNCORRECTABLE", "UNKNOWN",
    )
    if hasattr(_Result, "CUDA_ERROR_" + name)
)  # fmt: skip

OnLost = Callable[[DeviceLostError], None]


class _Entered(local):
    """Whose contexts a thread has made current, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[_Driver] = []


_ENTERED: Final = _Entered()


class _Driver:
    """The context of one device: checked calls with it current."""

    def __init__(self, name: str, handle: Any, context: Any, on_lost: OnLost) -> None:
        self.name = name
        self.handle = handle
        self.context = context
        self.lost: DeviceLostError | None = None
        self._on_lost = on_lost
        self._losing = Lock()

    def __enter__(self) -> None:
        contexts = _ENTERED.contexts
        if not contexts or contexts[-1] is not self:
            driver.cuCtxPushCurrent(self.context)
        contexts.append(self)

    def __exit__(self, *_: object) -> None:
        contexts = _ENTERED.contexts
        contexts.pop()
        if not contexts or contexts[-1] is not self:
            driver.cuCtxPopCurrent()

    def check(self, what: str, result: tuple[Any, ...]) -> Any:
        """Return what a driver call gave.

        Raises:
            DeviceError: it failed. DeviceLostError: so that the context is gone with it.
        """
        if result[0] != _OK and (error := self.error(what, result[0])) is not None:
            raise error
        return result[1] if len(result) == 2 else result[1:]

    def error(self, what: str, code: Any) -> DeviceError | None:
        """Return what a driver call's result means; tell the owner if the context is lost."""
        if code == _OK:
            return None
        problem = f"{what}: {_name(code)}"
        if code not in _POISON:
            return DeviceError(self.name, problem)
        with self._losing:
            is_first = self.lost is None
            if self.lost is None:
                self.lost = DeviceLostError(self.name, problem)
        if is_first:
            self._on_lost(self.lost)
        return self.lost


def _name(code: Any) -> str:
    words = ""
    with suppress(RuntimeError):  # without a driver there is nobody to ask
        found, text = driver.cuGetErrorString(code)
        words = text.decode() if found == _Result.CUDA_SUCCESS and text else ""
    name = str(getattr(code, "name", code))
    return f"{name} ({words})" if words else name


class _FutureEvent:
    """The end of a job of the memory thread."""

    def __init__(self, future: "Future[BaseException | None]") -> None:
        self._future = future

    def on_done(self, done: Done) -> None:
        self._future.add_done_callback(lambda future: done(future.result()))

    def wait(self) -> None:
        """Block until it happens.

        Raises:
            DeviceError: what the job failed with.
        """
        error = self._future.result()
        if error is not None:
            raise error


class _Array:
    """Device bytes as torch takes them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class CudaRange:
    """Addresses for life; memory behind the pieces that are mapped."""

    def __init__(self, device: "CudaDevice", size: int, piece_bytes: int) -> None:
        self._device = device
        self._size = size
        grain = device.granularity
        self._piece_bytes = align_up(piece_bytes, grain)
        self._reserved = align_up(size, grain)
        with device.cuda:
            self.address = int(
                device.cuda.check(
                    f"reserve {self._reserved} bytes of addresses",
                    driver.cuMemAddressReserve(self._reserved, grain, 0, 0),
                )
            )
        self._mapped: set[int] = set()
        self._behind: set[int] = set()
        """Pieces with memory behind them; the memory thread's own."""
        self._is_open = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def array(self) -> _Array:
        assert self._is_open, "the range is closed"
        return _Array(self.address, self._size)

    @property
    def piece_bytes(self) -> int:
        return self._piece_bytes

    @property
    def mapped(self) -> Collection[int]:
        return self._mapped

    def map(self, pieces: Collection[int]) -> _FutureEvent:
        wanted = sorted(pieces)
        assert not self._mapped & set(wanted)
        size = sum(self._bytes(piece) for piece in wanted)
        self._device.ledger.take(size)
        self._mapped |= set(wanted)
        return _FutureEvent(self._device.memory.submit(self._map_all, wanted))

    def unmap(self, pieces: Collection[int]) -> _FutureEvent:
        given = sorted(pieces)
        assert self._mapped >= set(given)
        self._mapped -= set(given)
        self._device.ledger.give_back(sum(self._bytes(piece) for piece in given))
        return _FutureEvent(self._device.memory.submit(self._unmap_all, given))

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self.unmap(set(self._mapped))
        self._device.memory.submit(driver.cuMemAddressFree, self.address, self._reserved)

    # --- on the memory thread -----------------------------------------------------------------

    def _map_all(self, pieces: Sequence[int]) -> BaseException | None:
        try:
            for piece in pieces:
                self._map_one(piece)
            for first, last in _runs(pieces):
                self._give_access(first, last)
        except DeviceError as error:
            return error
        return None

    def _map_one(self, piece: int) -> None:
        cuda, size = self._device.cuda, self._bytes(piece)
        memory = cuda.check(
            f"create {size} bytes of device memory (is another process using the device?)",
            driver.cuMemCreate(size, self._device.properties, 0),
        )
        try:
            cuda.check("map", driver.cuMemMap(self._at(piece), size, 0, memory, 0))
        finally:
            driver.cuMemRelease(memory)  # the mapping keeps it
        self._behind.add(piece)

    def _give_access(self, first: int, last: int) -> None:
        size = self._at(last) + self._bytes(last) - self._at(first)
        access = self._device.access
        result = driver.cuMemSetAccess(self._at(first), size, access, len(access))
        self._device.cuda.check("give access to mapped memory", (*result, None))

    def _unmap_all(self, pieces: Sequence[int]) -> BaseException | None:
        error: BaseException | None = None
        given = [piece for piece in pieces if piece in self._behind]
        self._behind.difference_update(given)
        for first, last in _runs(given):
            size = self._at(last) + self._bytes(last) - self._at(first)
            (code,) = driver.cuMemUnmap(self._at(first), size)
            error = error or self._device.cuda.error("unmap", code)
        return error

    def _at(self, piece: int) -> int:
        return self.address + piece * self._piece_bytes

    def _bytes(self, piece: int) -> int:
        left = self._reserved - piece * self._piece_bytes
        assert piece >= 0 < left
        return min(self._piece_bytes, left)


def _runs(pieces: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of neighbours in sorted `pieces`."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece - 1:
            runs[-1] = (runs[-1][0], piece)
        else:
            runs.append((piece, piece))
    return runs


class CudaPinnedBuffer:
    """Host memory that the driver has page-locked, for all devices."""

    def __init__(self, device: "CudaDevice", size: int, *, huge_pages: bool) -> None:
        self._device = device
        self._size = size
        self._view = memoryview(map_memory(size, huge_pages=huge_pages))[:size]
        prefer_nodes(self._view, device.nodes)
        touch(self._view, huge_pages=huge_pages)
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE
        with device.cuda:
            (code,) = driver.cuMemHostRegister(address_of(self._view), size, flags)
        error = device.cuda.error(f"page-lock {size} bytes of host memory", code)
        if error is not None:
            raise DeviceError(
                device.name,
                f"{error.problem}; lower store.pool_bytes, or allow more: LimitMEMLOCK=infinity in "
                "the unit, `ulimit -l unlimited` in a shell, the memory limit of the container",
            )

    @property
    def size(self) -> int:
        return self._size

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        if not len(self._view):
            return
        with self._device.cuda:
            driver.cuMemHostUnregister(address_of(self._view))
        self._view = memoryview(b"")


class CudaEvent:
    """A recorded event of the driver."""

    def __init__(self, event: Any, stream: "CudaStream") -> None:
        self._event = event
        self._stream = stream

    def on_done(self, done: Done) -> None:
        self._stream.watch(self._event, done)


class CudaStream:
    """A stream of one device, and the thread that waits for its events."""

    def __init__(self, cuda: _Driver) -> None:
        self._cuda = cuda
        with cuda:
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self.handle = cuda.check("create a stream", driver.cuStreamCreate(flags))
        self._failure: SllmError | None = None
        self._spare: list[Any] = []
        """Events of `mark` that nobody waits for any more."""
        self._watched: SimpleQueue[tuple[Any, Done, SllmError | None] | None] = SimpleQueue()
        self._watcher = Thread(target=self._watch, name="sllm-events", daemon=True)
        self._watcher.start()

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        target = self.place(destination, offset, len(source))
        if target is None:
            return
        with self._cuda:
            result = driver.cuMemcpyHtoDAsync(target, address_of(source), len(source), self.handle)
        self.fail("copy to the device", result[0])

    def copy_device(
        self,
        destination: DeviceBuffer,
        offset: int,
        source: DeviceBuffer,
        source_range: tuple[int, int],
    ) -> None:
        start, end = source_range
        target = self.place(destination, offset, end - start)
        origin = self.place(source, start, end - start)
        if target is None or origin is None:
            return
        with self._cuda:
            result = driver.cuMemcpyDtoDAsync(target, origin, end - start, self.handle)
        self.fail("copy between devices", result[0])

    def record(self) -> CudaEvent:
        with self._cuda:
            try:
                event = self._cuda.check("create an event", driver.cuEventCreate(_WAITED_FOR))
            except DeviceError:
                # Nobody would know when the copies end, and their memory is given back now.
                driver.cuStreamSynchronize(self.handle)
                raise
            self.fail("record an event", driver.cuEventRecord(event, self.handle)[0])
        return CudaEvent(event, self)

    @property
    def tail(self) -> "CudaStream":
        """Where bytes arrive: for a stream that is several, the last one."""
        return self

    @property
    def context(self) -> _Driver:
        """Of its device: who makes several calls enters it once around them."""
        return self._cuda

    def mark(self) -> Any:
        """Return an event of the driver, behind all that was enqueued, for other streams.

        It goes to `unmark` once what is to wait for it has been told so.
        """
        with self._cuda:
            if self._spare:
                event = self._spare.pop()
            else:
                event = self._cuda.check("create an event", driver.cuEventCreate(_WITHOUT_TIMES))
            self.fail("record an event", driver.cuEventRecord(event, self.handle)[0])
        return event

    def unmark(self, event: Any) -> None:
        """Use an event again: what waits for it waits for what it was when that was enqueued."""
        self._spare.append(event)

    def wait_for(self, event: Any) -> None:
        """Let what is enqueued from now on wait for `event`, of any device."""
        with self._cuda:
            self.fail("wait for an event", driver.cuStreamWaitEvent(self.handle, event, 0)[0])

    def wait(self) -> None:
        """Block until everything that was enqueued has ended, however."""
        with self._cuda:
            driver.cuStreamSynchronize(self.handle)

    def close(self) -> None:
        with self._cuda:
            driver.cuStreamSynchronize(self.handle)
            self._watched.put(None)
            self._watcher.join()
            for event in self._spare:
                driver.cuEventDestroy(event)
            self._spare.clear()
            driver.cuStreamDestroy(self.handle)

    def place(self, buffer: DeviceBuffer, offset: int, size: int) -> int | None:
        """Return the address of bytes inside `buffer`; None, and a failure, if they are not."""
        assert isinstance(buffer, CudaRange)
        if offset < 0 or offset + size > buffer.size:
            problem = f"a copy of {size} bytes at {offset} of a buffer of {buffer.size}"
            self._failure = self._failure or DeviceError(self._cuda.name, problem)
            return None
        return buffer.address + offset

    def fail(self, what: str, code: Any) -> None:
        """Remember a failure for the next event."""
        if code != _OK:
            self.remember(self._cuda.error(what, code))

    def remember(self, failure: SllmError | None) -> None:
        """Let the next event tell of `failure`, if it is the first."""
        self._failure = self._failure or failure

    def take_failure(self) -> SllmError | None:
        """Return what failed since the last event, and forget it."""
        failure, self._failure = self._failure, None
        return failure

    def watch(self, event: Any, done: Done) -> None:
        """Call `done` when `event` has happened."""
        self._watched.put((event, done, self.take_failure()))

    def _watch(self) -> None:
        driver.cuCtxSetCurrent(self._cuda.context)
        while (item := self._watched.get()) is not None:
            event, done, failure = item
            (code,) = driver.cuEventSynchronize(event)
            error = failure or self._cuda.error("wait for a copy", code)
            driver.cuEventDestroy(event)
            done(error)


class CudaRelay:
    """Copies to one device over the link of a sibling, through a ring of slots in its memory."""

    def __init__(self, target: "CudaDevice", sibling: "CudaDevice") -> None:
        self._cuda = sibling.cuda
        self._link = CudaStream(sibling.cuda)
        self._bridge = CudaStream(sibling.cuda)
        self._ring = sibling.allocate(RELAY_SLOTS * RELAY_SLOT_BYTES)
        self._next = 0
        with self._cuda:
            made = [driver.cuEventCreate(_WITHOUT_TIMES) for _ in range(2 * RELAY_SLOTS)]
        events = [self._cuda.check("create an event", result) for result in made]
        self._filled, self._emptied = events[:RELAY_SLOTS], events[RELAY_SLOTS:]

    def copy_in(self, destination: DeviceBuffer, offset: int, source: memoryview) -> None:
        for start in range(0, len(source), RELAY_SLOT_BYTES):
            piece = source[start : start + RELAY_SLOT_BYTES]
            self._pass_on(destination, offset + start, piece)

    def _pass_on(self, destination: DeviceBuffer, offset: int, piece: memoryview) -> None:
        slot = self._next
        self._next = (slot + 1) % RELAY_SLOTS
        place = slot * RELAY_SLOT_BYTES
        link, bridge = self._link.handle, self._bridge.handle
        with self._cuda:
            self._expect(driver.cuStreamWaitEvent(link, self._emptied[slot], 0))
            self._link.copy_in(self._ring, place, piece)
            # Or what lies in the slot would go on instead of the piece.
            self._bridge.remember(self._link.take_failure())
            self._expect(driver.cuEventRecord(self._filled[slot], link))
            self._expect(driver.cuStreamWaitEvent(bridge, self._filled[slot], 0))
            end = place + len(piece)
            self._bridge.copy_device(destination, offset, self._ring, (place, end))
            self._expect(driver.cuEventRecord(self._emptied[slot], bridge))

    def _expect(self, result: tuple[Any, ...]) -> None:
        self._bridge.fail("relay", result[0])

    def copy_device(
        self,
        destination: DeviceBuffer,
        offset: int,
        source: DeviceBuffer,
        source_range: tuple[int, int],
    ) -> None:
        self._bridge.copy_device(destination, offset, source, source_range)

    @property
    def tail(self) -> CudaStream:
        """The stream on which bytes arrive."""
        return self._bridge

    def record(self) -> CudaEvent:
        return self._bridge.record()

    def close(self) -> None:
        self._link.close()
        self._bridge.close()
        with self._cuda:
            for event in (*self._filled, *self._emptied):
                driver.cuEventDestroy(event)
        self._ring.close()


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
        if code != _Result.CUDA_SUCCESS:
            raise DeviceError(self._name, f"no context: {_name(code)}")
        self.cuda = _Driver(self._name, handle, context, on_lost)
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
    if code != _Result.CUDA_SUCCESS:
        raise DeviceError("cuda", _name(code))
    return int(count)


def _initialise(name: str) -> None:
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # the driver's library is not there
        raise DeviceError(name, f"there is no CUDA driver on this machine ({error})") from error
    if code != _Result.CUDA_SUCCESS:
        raise DeviceError(name, f"the CUDA driver does not start: {_name(code)}")


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
    return bool(code == _Result.CUDA_SUCCESS and able)


def _numa_node(ordinal: int) -> int | None:
    with suppress(OSError, ValueError):
        code, name = driver.cuDeviceGetPCIBusId(32, ordinal)
        if code == _Result.CUDA_SUCCESS:
            bus = bytes(name).split(b"\0")[0].decode().lower()
            return int(Path(f"/sys/bus/pci/devices/{bus}/numa_node").read_text())
    return None


def _nothing() -> None:
    return None
