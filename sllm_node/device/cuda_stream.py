"""Streams of a GPU: copies in order, events that call back, and relays over a sibling's link.

Nothing polls. A thread a stream waits for events with the driver's blocking wait, which releases
Python's lock, and calls back.
"""

from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from cuda.bindings import driver

from sllm_node.core.errors import DeviceError, SllmError
from sllm_node.core.units import MIB
from sllm_node.device.base import DeviceBuffer, Done
from sllm_node.device.cuda_context import OK, CudaContext
from sllm_node.device.cuda_memory import CudaRange
from sllm_node.device.host import address_of

if TYPE_CHECKING:
    from sllm_node.device.cuda import CudaDevice

RELAY_SLOTS: Final = 4
RELAY_SLOT_BYTES: Final = 32 * MIB
"""A relay's ring on the sibling: measured to keep both links busy with copies of 16 MiB and more."""

WITHOUT_TIMES: Final = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
_WAITED_FOR: Final = driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC | WITHOUT_TIMES


class CudaEvent:
    """A recorded event of the driver."""

    def __init__(self, event: Any, stream: "CudaStream") -> None:
        self._event = event
        self._stream = stream

    def on_done(self, done: Done) -> None:
        self._stream.watch(self._event, done)


class CudaStream:
    """A stream of one device, and the thread that waits for its events."""

    def __init__(self, cuda: CudaContext) -> None:
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
    def context(self) -> CudaContext:
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
                event = self._cuda.check("create an event", driver.cuEventCreate(WITHOUT_TIMES))
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
        if code != OK:
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
            made = [driver.cuEventCreate(WITHOUT_TIMES) for _ in range(2 * RELAY_SLOTS)]
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
