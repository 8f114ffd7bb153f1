"""Decodes chunks on a GPU, behind the copies that bring them.

Theory of operation. Stored bytes are copied into a ring of staging memory over the link that the
caller chose, its own or a sibling's; kernels on a stream of the decoder read them there and write
the decoded bytes to their place. Everything is enqueued at once, and events order it on the device:
a copy waits for the decoding that read the same staging memory before, a decoding waits for its
copy. So nothing here waits, and the host hears of a batch once, when it is decoded.

What a kernel is told (a table of addresses and sizes) and what it says (errors, digests) goes through
pinned tables, which are used again when their batch has ended. A chunk that goes to its place in
part, because the rest belongs to another device or is there already, is decoded beside it and
copied. Digests are taken of the stored bytes as they lie in the staging memory.
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
from sllm_node.device.kernels import CHUNK, PIECE, PROBLEMS, Kernels
from sllm_node.device.staging import JOBS_MAX, TABLE_BYTES, Batch, Ring, Staged, batches

if TYPE_CHECKING:
    from sllm_node.device.cuda import CudaStream

_TABLES: Final = 64
"""That are made together."""
_CHUNKS_AT: Final = 0
_PIECES_AT: Final = _CHUNKS_AT + CHUNK.itemsize * JOBS_MAX
_DIGESTS_AT: Final = _PIECES_AT + PIECE.itemsize * JOBS_MAX
_ERRORS_AT: Final = _DIGESTS_AT + 8 * JOBS_MAX
_END: Final = _ERRORS_AT + 4 * JOBS_MAX
assert _END <= TABLE_BYTES


class _Table:
    """What one batch tells the kernels and hears from them; in pinned memory."""

    def __init__(self, view: memoryview, begun: Any, ended: Any) -> None:
        self.address = address_of(view)
        self._bytes = np.frombuffer(view, np.uint8)
        self._chunks = self._bytes[_CHUNKS_AT:_PIECES_AT].view(CHUNK)
        self._pieces = self._bytes[_PIECES_AT:_DIGESTS_AT].view(PIECE)
        self.digests: npt.NDArray[np.uint64] = self._bytes[_DIGESTS_AT:_ERRORS_AT].view("<u8")
        self.errors: npt.NDArray[np.uint32] = self._bytes[_ERRORS_AT:_END].view("<u4")
        self.begun = begun
        self.ended = ended
        """Events with times, around the kernels."""

    def fill(self, staged: Sequence[Staged], region: int, destination: int) -> None:
        """Say where the chunks of a batch lie and go to."""
        self._bytes[:] = 0
        for row, one in enumerate(staged):
            job, stored = one.job, region + one.stored_at
            output = destination + job.place if one.decoded_at is None else region + one.decoded_at
            self._chunks[row] = (stored, job.size, output, job.decoded_size)
            self._pieces[row] = (stored, job.size)


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
        start, readers = self._ring.take(batch.size)
        for event in readers:
            link.tail.wait_for(event)
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
        region = self._staging.address + start
        table.fill(batch.staged, region, destination.address)  # type: ignore[attr-defined]
        if batch.staged:
            self._copy(region, table.address, _END)
        self._stream.wait_for(filled)
        self._destroy(filled)
        if batch.staged and failure is None:
            try:
                self._launch(batch, table, region, destination)
            except SllmError as error:
                self._stream.remember(error)
        self._ring.give(start, batch.size, self._stream.mark())

    def _launch(self, batch: Batch, table: _Table, region: int, destination: Any) -> None:
        """Enqueue all that is done with a batch whose bytes have come."""
        stream, handle = self._stream, self._stream.handle
        self._record(table.begun)
        if any(one.job.digest is not None for one in batch.staged):
            pieces, digests = region + _PIECES_AT, region + _DIGESTS_AT
            self._kernels.checksum(pieces, digests, len(batch.staged), handle)
        row = 0
        for codec, group in groupby(batch.staged, key=lambda one: one.job.codec):
            sizes = tuple(one.job.decoded_size for one in group)
            if codec != RAW:
                chunks = region + _CHUNKS_AT + row * CHUNK.itemsize
                errors = region + _ERRORS_AT + row * 4
                self._kernels.decode(codec, chunks, errors, sizes, handle)
            row += len(sizes)
        for one in batch.staged:
            self._move(one, region, destination)
        self._record(table.ended)
        with self._cuda:
            size = _END - _DIGESTS_AT
            to, origin = table.address + _DIGESTS_AT, region + _DIGESTS_AT
            result = driver.cuMemcpyDtoHAsync(to, origin, size, handle)
        stream.fail("copy from the device", result[0])

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

    def _copy(self, to: int, origin: int, size: int) -> None:
        with self._cuda:
            result = driver.cuMemcpyHtoDAsync(to, origin, size, self._stream.handle)
        self._stream.fail("copy a table to the device", result[0])

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
        slab = self._pin(_TABLES * TABLE_BYTES)
        self._slabs.append(slab)
        flags = driver.CUevent_flags.CU_EVENT_DEFAULT
        with self._cuda:
            made = [driver.cuEventCreate(flags) for _ in range(2 * _TABLES)]
        events = [self._cuda.check("create an event", result) for result in made]
        self._events += events
        for number in range(_TABLES):
            view = slab.view[number * TABLE_BYTES : (number + 1) * TABLE_BYTES]
            self._tables.append(_Table(view, *events[2 * number : 2 * number + 2]))


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
