"""Decodes chunks on a GPU, behind the copies that bring them.

Theory of operation. Stored bytes are copied into a ring of staging memory over the link that the
caller chose, its own or a sibling's; kernels on a stream of the decoder read them there and write
the decoded bytes to their place. Everything is enqueued at once, and events order it on the device:
a copy waits for the decoding that read the same staging memory before, a decoding waits for its
copy. So nothing here waits, and the host hears of a batch once, when it is decoded.

What a kernel is told travels with its launch, and what it says (errors, digests) it writes into
pinned memory, so that no small copy stands in the way of the large ones. A chunk that goes to its
place in part, because the rest belongs to another device or is there already, is decoded beside it
and copied.

Digests are taken of the stored bytes as they lie in the staging memory. One takes longer than its
bytes took to come, so they are taken on streams beside the decoder's, which waits for them at the end
of each batch.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from sllm_node.core.errors import SllmError
from sllm_node.device.base import ChunkJobs, Decoded, DeviceBuffer, PinnedBuffer, Stream
from sllm_node.device.host import address_of
from sllm_node.device.kernels import CHUNKS_MAX, Kernels
from sllm_node.device.staging import JOBS_MAX, Batch, Ring, batches

if TYPE_CHECKING:
    from sllm_node.device.cuda_stream import CudaStream

_TABLES: Final = 64
"""That are made together."""
_ERRORS_AT: Final = 8 * JOBS_MAX
_TABLE_BYTES: Final = 2048
assert _ERRORS_AT + 4 * JOBS_MAX <= _TABLE_BYTES
_ZEROS: Final = bytes(_TABLE_BYTES)
assert JOBS_MAX <= CHUNKS_MAX
_BESIDE_OTHERS: Final = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
_WITHOUT_TIMES: Final = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
_TIMED: Final = 8
"""One batch of so many is timed: events with times take longer to record than a kernel to launch."""
_CHECKS: Final = 6
"""Batches whose digests are taken at once: 36 GB/s for one chunk of any size, on an H200."""


class _Table:
    """What the kernels say of one batch; in pinned memory."""

    def __init__(self, view: memoryview, begun: Any, ended: Any) -> None:
        address = address_of(view)
        self.digests_at, self.errors_at = address, address + _ERRORS_AT
        self._view = view
        self.digests: npt.NDArray[np.uint64] = np.frombuffer(view[:_ERRORS_AT], "<u8")
        self.errors: npt.NDArray[np.uint32] = np.frombuffer(view[_ERRORS_AT:], "<u4")
        self.begun = begun
        self.ended = ended
        """Events with times, around the decoding."""
        self.is_timed = False

    def clear(self) -> None:
        """Forget what was said of another batch."""
        self._view[:] = _ZEROS  # by numpy it would let another thread go first, for 2 KiB


class _Report:
    """Collects what the batches of one call have to say."""

    def __init__(self, batches: int, done: Decoded) -> None:
        self._left = batches
        self._done = done
        self._error: BaseException | None = None
        self._seconds = 0.0

    def add(self, error: BaseException | None, seconds: float) -> None:
        """One batch has ended; the last one makes the call. On the watcher's thread only."""
        self._error = self._error or error
        self._seconds += seconds
        self._left -= 1
        if not self._left:
            self._done(self._error, self._seconds)


class CudaDecoder:
    """The decoder of one GPU. Calls belong to one thread."""

    needs_staging = True
    verifies = True

    def __init__(
        self, context: Any, stream: "CudaStream", pin: Callable[[int], PinnedBuffer]
    ) -> None:
        self._cuda = context
        self._stream = stream
        self._pin = pin
        self._slabs: list[PinnedBuffer] = []
        self._tables: deque[_Table] = deque()
        self._events: list[Any] = []
        self._staging: Any = None
        self._ring: Ring[Any] = Ring(0)
        self._launched = 0
        self._seconds_a_byte = 0.0
        self._kernels = Kernels(context, context.handle)
        self._kernels.prepare()
        self._make_tables()
        with context:
            made = [driver.cuStreamCreate(_BESIDE_OTHERS) for _ in range(_CHECKS)]
        self._checks = deque(context.check("create a stream", result) for result in made)

    def stage_in(self, staging: DeviceBuffer) -> None:
        """Use `staging`; what was used before is not read any more."""
        self._drop_tokens()
        self._staging = staging
        self._ring = Ring(staging.size)

    def decode(
        self,
        link: Stream,
        destination: DeviceBuffer,
        place: int,
        source: memoryview,
        jobs: ChunkJobs,
        done: Decoded,
    ) -> None:
        limit = self._ring.size // 2
        planned = jobs.plans.get(limit)
        if planned is None:
            planned = jobs.plans[limit] = tuple(batches(jobs.jobs, limit))
        report = _Report(len(planned), done)
        with self._cuda:
            for batch in planned:
                table = self._take_table()
                self._launched += bool(batch.staged)
                table.is_timed = self._launched % _TIMED == 1
                try:
                    self._enqueue(batch, table, link, (destination, place), source)
                    event = self._stream.record()
                except BaseException:
                    # Whoever called gives the memory back now, that of the batches before, too.
                    self._wait_for_all(link)
                    self._tables.append(table)
                    raise
                event.on_done(partial(self._finish, batch, table, report))

    def close(self) -> None:
        self._stream.close()
        self._drop_tokens()
        with self._cuda:
            for event in self._events:
                driver.cuEventDestroy(event)
            for check in self._checks:
                driver.cuStreamSynchronize(check)
                driver.cuStreamDestroy(check)
        self._kernels.close()
        self._tables.clear()
        for slab in self._slabs:
            slab.close()

    # --- enqueueing ---------------------------------------------------------------------------

    def _enqueue(
        self,
        batch: Batch,
        table: _Table,
        link: Any,
        where: tuple[Any, int],
        source: memoryview,
    ) -> None:
        destination, place = where
        start, readers, ended = self._ring.take(batch.size)
        with link.tail.context:
            for event in readers:
                link.tail.wait_for(event)
            for event in ended:
                self._stream.unmark(event)
            for copy in batch.runs:
                stored = source[copy.start : copy.start + copy.size]
                link.copy_in(self._staging, start + copy.to, stored)
            for copy in batch.direct:
                stored = source[copy.start : copy.start + copy.size]
                link.copy_in(destination, place + copy.to, stored)
            failure = link.tail.take_failure()
            filled = link.tail.mark()
        self._stream.remember(failure)
        self._stream.wait_for(filled)
        if batch.staged and failure is None:
            addresses = self._staging.address + start, destination.address + place
            try:
                self._launch(batch, table, addresses, filled)
            except SllmError as error:
                self._stream.remember(error)
        link.tail.unmark(filled)
        if batch.size:  # or nobody would ever take its place and unmark the event
            self._ring.give(start, batch.size, self._stream.mark())

    def _launch(self, batch: Batch, table: _Table, addresses: tuple[int, int], filled: Any) -> None:
        """Enqueue all that is done with a batch whose bytes have come by the event `filled`."""
        region, place = addresses
        handle = self._stream.handle
        table.clear()
        checked = self._check(batch, table, region, filled) if batch.is_checked else None
        try:
            if table.is_timed:
                self._record(table.begun)
            for decoding in batch.decodings:
                errors = table.errors_at + 4 * decoding.row
                chunks, most = decoding.chunks(region, place), decoding.largest
                self._kernels.decode(decoding.codec, chunks, errors, handle, most)
            for copy in batch.moves:
                with self._cuda:
                    to, start = place + copy.to, region + copy.start
                    result = driver.cuMemcpyDtoDAsync(to, start, copy.size, handle)
                self._stream.fail("copy on the device", result[0])
            if table.is_timed:
                self._record(table.ended)
        finally:
            if checked is not None:
                self._stream.wait_for(checked)
                self._destroy(checked)

    def _check(self, batch: Batch, table: _Table, region: int, filled: Any) -> Any:
        """Enqueue the digests of a batch; return the event behind them."""
        stream = self._checks[0]
        self._checks.rotate()
        with self._cuda:
            event = self._cuda.check("create an event", driver.cuEventCreate(_WITHOUT_TIMES))
            self._stream.fail("wait for a copy", driver.cuStreamWaitEvent(stream, filled, 0)[0])
        try:
            self._kernels.checksum(batch.pieces(region), table.digests_at, stream)
        except SllmError:
            self._destroy(event)
            raise
        with self._cuda:
            self._stream.fail("record an event", driver.cuEventRecord(event, stream)[0])
        return event

    def _wait_for_all(self, link: Any) -> None:
        """Block until nothing of what was enqueued is under way."""
        link.tail.wait()
        with self._cuda:
            for check in self._checks:
                driver.cuStreamSynchronize(check)
        self._stream.wait()

    def _record(self, event: Any) -> None:
        with self._cuda:
            result = driver.cuEventRecord(event, self._stream.handle)
        self._stream.fail("record an event", result[0])

    def _destroy(self, event: Any) -> None:
        with self._cuda:
            driver.cuEventDestroy(event)  # once what waits for it has

    def _drop_tokens(self) -> None:
        for event in self._ring.tokens():
            self._destroy(event)

    # --- what comes back ----------------------------------------------------------------------

    def _finish(
        self, batch: Batch, table: _Table, report: _Report, error: BaseException | None
    ) -> None:
        """A batch has ended; on the thread that waits for the stream's events."""
        seconds = 0.0
        if error is None and batch.staged:
            error = batch.wrong(table.digests, table.errors)
            seconds = self._seconds(batch, table)
        self._tables.append(table)
        report.add(error, seconds)

    def _seconds(self, batch: Batch, table: _Table) -> float:
        """Return what a batch took, or would take at the rate of the last one with times."""
        size = batch.decoded_size
        if table.is_timed:
            code, milliseconds = driver.cuEventElapsedTime(table.begun, table.ended)
            if code == driver.CUresult.CUDA_SUCCESS:
                self._seconds_a_byte = milliseconds / 1e3 / size
        return size * self._seconds_a_byte

    # --- tables -------------------------------------------------------------------------------

    def _take_table(self) -> _Table:
        if not self._tables:
            self._make_tables()
        return self._tables.popleft()

    def _make_tables(self) -> None:
        slab = self._pin(_TABLES * _TABLE_BYTES)
        self._slabs.append(slab)
        flags = driver.CUevent_flags.CU_EVENT_DEFAULT
        with self._cuda:
            made = [driver.cuEventCreate(flags) for _ in range(2 * _TABLES)]
        events = [self._cuda.check("create an event", result) for result in made]
        self._events += events
        for number in range(_TABLES):
            view = slab.view[number * _TABLE_BYTES : (number + 1) * _TABLE_BYTES]
            self._tables.append(_Table(view, *events[2 * number : 2 * number + 2]))
