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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from sllm_node.codec.names import RAW
from sllm_node.core.errors import SllmError
from sllm_node.device.base import (
    ChunkJob,
    Decoded,
    DeviceBuffer,
    PinnedBuffer,
    Stream,
    WrongChunkError,
)
from sllm_node.device.host import address_of
from sllm_node.device.kernels import CHUNK, CHUNKS_MAX, PIECE, PROBLEMS, Kernels
from sllm_node.device.staging import JOBS_MAX, Batch, Ring, Staged, batches

if TYPE_CHECKING:
    from sllm_node.device.cuda import CudaStream

_TABLES: Final = 64
"""That are made together."""
_ERRORS_AT: Final = 8 * JOBS_MAX
_TABLE_BYTES: Final = 2048
assert _ERRORS_AT + 4 * JOBS_MAX <= _TABLE_BYTES
assert JOBS_MAX <= CHUNKS_MAX
_BESIDE_OTHERS: Final = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
_WITHOUT_TIMES: Final = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
_CHECKS: Final = 6
"""Batches whose digests are taken at once: 36 GB/s for one chunk of any size, on an H200."""


class _Table:
    """What the kernels say of one batch; in pinned memory."""

    def __init__(self, view: memoryview, begun: Any, ended: Any) -> None:
        address = address_of(view)
        self.digests_at, self.errors_at = address, address + _ERRORS_AT
        self._bytes = np.frombuffer(view, np.uint8)
        self.digests: npt.NDArray[np.uint64] = self._bytes[:_ERRORS_AT].view("<u8")
        self.errors: npt.NDArray[np.uint32] = self._bytes[_ERRORS_AT:].view("<u4")
        self.begun = begun
        self.ended = ended
        """Events with times, around the decoding."""

    def clear(self) -> None:
        """Forget what was said of another batch."""
        self._bytes[:] = 0


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
        source: memoryview,
        jobs: Sequence[ChunkJob],
        done: Decoded,
    ) -> None:
        assert jobs
        planned = list(batches(jobs, self._ring.size // 2))
        report = _Report(len(planned), done)
        for batch in planned:
            table = self._take_table()
            self._enqueue(batch, table, link, destination, source)
            tell = partial(self._finish, batch, table, report)
            self._stream.record().on_done(tell)

    def close(self) -> None:
        self._stream.close()
        self._drop_tokens()
        self._kernels.close()
        with self._cuda:
            for event in self._events:
                driver.cuEventDestroy(event)
            for check in self._checks:
                driver.cuStreamSynchronize(check)
                driver.cuStreamDestroy(check)
        self._tables.clear()
        for slab in self._slabs:
            slab.close()

    # --- enqueueing ---------------------------------------------------------------------------

    def _enqueue(
        self,
        batch: Batch,
        table: _Table,
        link: Any,
        destination: DeviceBuffer,
        source: memoryview,
    ) -> None:
        start, readers, ended = self._ring.take(batch.size)
        for event in readers:
            link.tail.wait_for(event)
        for event in ended:
            self._destroy(event)
        for begin, at, size in batch.runs():
            link.copy_in(self._staging, start + at, source[begin : begin + size])
        for job in batch.direct:
            for low, high in job.writes:
                begin = job.offset + low - job.place
                link.copy_in(destination, low, source[begin : begin + high - low])
        failure = link.tail.take_failure()
        filled = link.tail.mark()
        self._stream.remember(failure)
        self._stream.wait_for(filled)
        if batch.staged and failure is None:
            try:
                self._launch(batch, table, (start, destination), filled)
            except SllmError as error:
                self._stream.remember(error)
        self._destroy(filled)
        self._ring.give(start, batch.size, self._stream.mark())

    def _launch(self, batch: Batch, table: _Table, where: tuple[int, Any], filled: Any) -> None:
        """Enqueue all that is done with a batch whose bytes have come by the event `filled`."""
        region, destination = self._staging.address + where[0], where[1]
        table.clear()
        checked = None
        if any(one.job.digest is not None for one in batch.staged):
            checked = self._check(batch, table, region, filled)
        self._record(table.begun)
        row = 0
        for codec, group in groupby(batch.staged, key=lambda one: one.job.codec):
            chunks = np.array([_chunk(one, region, destination) for one in group], CHUNK)
            if codec != RAW:
                errors = table.errors_at + row * 4
                self._kernels.decode(codec, chunks, errors, self._stream.handle)
            row += len(chunks)
        for one in batch.staged:
            self._move(one, region, destination)
        self._record(table.ended)
        if checked is not None:
            self._stream.wait_for(checked)
            self._destroy(checked)

    def _check(self, batch: Batch, table: _Table, region: int, filled: Any) -> Any:
        """Enqueue the digests of a batch; return the event behind them."""
        stream = self._checks[0]
        self._checks.rotate()
        pieces = np.array([(region + one.stored_at, one.job.size) for one in batch.staged], PIECE)
        with self._cuda:
            self._stream.fail("wait for a copy", driver.cuStreamWaitEvent(stream, filled, 0)[0])
        self._kernels.checksum(pieces, table.digests_at, stream)
        with self._cuda:
            event = self._cuda.check("create an event", driver.cuEventCreate(_WITHOUT_TIMES))
            self._stream.fail("record an event", driver.cuEventRecord(event, stream)[0])
        return event

    def _move(self, one: Staged, region: int, destination: Any) -> None:
        """Copy what was not decoded to its place."""
        job = one.job
        origin = one.stored_at if job.codec == RAW else one.decoded_at
        if origin is None:
            return
        for low, high in job.writes:
            to, start = destination.address + low, region + origin + low - job.place
            with self._cuda:
                result = driver.cuMemcpyDtoDAsync(to, start, high - low, self._stream.handle)
            self._stream.fail("copy on the device", result[0])

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
            error = _wrong(batch, table)
            code, milliseconds = driver.cuEventElapsedTime(table.begun, table.ended)
            seconds = milliseconds / 1e3 if code == driver.CUresult.CUDA_SUCCESS else 0.0
        self._tables.append(table)
        report.add(error, seconds)

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


def _chunk(one: Staged, region: int, destination: Any) -> tuple[int, int, int, int]:
    """Return a `CHUNK`."""
    job = one.job
    output = destination.address + job.place if one.decoded_at is None else region + one.decoded_at
    return region + one.stored_at, job.size, output, job.decoded_size


def _wrong(batch: Batch, table: _Table) -> WrongChunkError | None:
    """Return the first thing that the kernels found wrong."""
    for row, one in enumerate(batch.staged):
        if one.job.digest is not None and int(table.digests[row]) != one.job.digest:
            return WrongChunkError(one.job, None)
    for row, one in enumerate(batch.staged):
        if table.errors[row]:
            number = int(table.errors[row])
            return WrongChunkError(one.job, PROBLEMS.get(number, f"the kernel says {number}"))
    return None
