"""One load: a bounded pipeline from files through chunks of the pinned pool to the device.

Theory of operation. All state belongs to the event loop; three kinds of work run elsewhere and come
back as calls on the loop: opening the shards, reading a unit (reader threads), copying a unit (the
device's stream). Nothing waits for a whole phase:

    missing unit:  take a chunk -> read + checksum -> copy -> done
    unit in DRAM:                                     copy -> done     (all issued at once, first)

`pump` is called whenever something may go on: it starts reads while chunks can be had and fewer than
`max_reads` are under way, so that every reader thread has its next job queued. A chunk stays with
the ledger after its copy, for the next load, until somebody else needs it.

A load ends once, in `_finish`, when nothing of it is in flight any more: only then do chunks and
device memory change hands. So a cancelled or failed load takes back what is its own in every state.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.errors import CheckpointChangedError, PoolExhaustedError
from sllm_node.core.types import LoadProgress, LoadReport, ModelId, Tier
from sllm_node.device.base import DeviceBuffer, Stream
from sllm_node.store.pool import PinnedPool
from sllm_node.store.reader import (
    FileSystem,
    ShardFile,
    check_unit,
    close_shards,
    open_shards,
    read_unit,
)
from sllm_node.store.residency import Residency, Unit

Verify = Literal["first", "always", "never"]


@dataclass(frozen=True, slots=True)
class Machinery:
    """What all loads of a store share."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    pool: PinnedPool
    ledger: Residency
    readers: ThreadPoolExecutor
    stream: Stream
    files: FileSystem
    verify: Verify
    max_reads: int
    wait_for_chunk: "Callable[[Load], bool]"
    """Call `pump` of the load when a chunk may have become free; False: none ever will."""
    chunk_given_back: Callable[[], None]
    on_eviction: Callable[[ModelId], None]
    on_ended: "Callable[[Load, LoadReport | BaseException], None]"
    """Called once for each load, before those who wait for it go on."""


class LoadCancelledError(Exception):
    """Nobody waits for the load any more. Never leaves the store."""


class Load:
    """One checkpoint on its way into DRAM (`buffer` is None) or onto the device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        buffer: DeviceBuffer | None,
        machinery: Machinery,
        asked: float,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.buffer = buffer
        self.ended: asyncio.Future[LoadReport | BaseException] = machinery.loop.create_future()
        """What became of it; set when nothing of it is in flight any more."""
        self._machinery = machinery
        self._ledger = machinery.ledger
        self._asked = asked
        self._started = machinery.clock.now()
        self._first_copy: float | None = None
        self._files: tuple[ShardFile, ...] = ()
        self._error: BaseException | None = None
        self._missing: list[Unit] = []
        """Units still to be read, the next one last."""
        self._reading = 0
        self._copying = 0
        self._is_opening = False
        self._done_bytes = 0
        self._read_bytes = 0
        self._verified_bytes = 0
        self._dram_bytes = 0

    # --- from outside -------------------------------------------------------------------------

    def start(self) -> None:
        """Issue the copies of all units in DRAM, then begin to read the others."""
        self._ledger.begin_load(self.model)
        missing = []
        for unit in self._ledger.units(self.model):
            if self._ledger.chunk_of(self.model, unit.index) is None:
                missing.append(unit)
            else:
                self._dram_bytes += unit.size
                self._take_from_dram(unit)
        self._missing = missing[::-1]
        if missing:
            self._is_opening = True
            self._run(self._on_opened, open_shards, self.checkpoint, self._machinery.files)
        self._finish_if_done()

    def cancel(self) -> None:
        """Stop; `ended` is set when nothing is in flight any more."""
        self._fail(LoadCancelledError())
        self._finish_if_done()

    def abandon(self) -> None:
        """End a load that never started."""
        self._fail(LoadCancelledError())
        self._ledger.begin_load(self.model)
        self._finish_if_done()

    @property
    def is_ending(self) -> bool:
        """Whether it has failed or was cancelled, so that nobody may join it."""
        return self._error is not None

    def progress(self) -> LoadProgress:
        """Return how far it has come."""
        total = self.checkpoint.index.size
        elapsed_s = self._machinery.clock.now() - self._asked
        eta_s = None
        if self._done_bytes and elapsed_s > 0:
            eta_s = (total - self._done_bytes) * elapsed_s / self._done_bytes
        source = Tier.DRAM if self._dram_bytes == total else Tier.NVME
        return LoadProgress(self._done_bytes, total, elapsed_s, eta_s, source)

    # --- the pipeline -------------------------------------------------------------------------

    def pump(self) -> None:
        """Start as many reads as chunks and readers allow."""
        while self._error is None and self._files and self._missing:
            if self._reading >= self._machinery.max_reads:
                return
            unit = self._missing[-1]
            taken = self._ledger.take(self.model, unit.index)
            if taken is None:
                self._want_chunk()
                return
            chunk, victim = taken
            if victim is not None:
                self._machinery.on_eviction(victim)
            self._missing.pop()
            self._read(unit, chunk)

    def _want_chunk(self) -> None:
        if self.buffer is None and not self._reading:
            self._missing.clear()  # a prefetch brings what fits
            self._finish_if_done()
        elif not self._machinery.wait_for_chunk(self):
            self._fail(PoolExhaustedError(self.model, self._ledger.chunks))
            self._finish_if_done()

    def _read(self, unit: Unit, chunk: int) -> None:
        machinery = self._machinery
        verify = self._must_verify(unit)
        view = machinery.pool.view(chunk, unit.size)
        file = self._files[unit.shard]
        job = partial(read_unit, self.checkpoint, file, unit, view, verify=verify)
        self._reading += 1
        self._run(partial(self._on_read, unit, 1 if verify else 0), job)

    def _must_verify(self, unit: Unit) -> bool:
        policy = self._machinery.verify
        if policy == "first":
            return not self._ledger.is_verified(self.model, unit.index)
        return policy == "always"

    def _take_from_dram(self, unit: Unit) -> None:
        if self._machinery.verify == "always":
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            self._reading += 1
            job = partial(check_unit, self.checkpoint, unit, view)
            self._run(partial(self._on_checked, unit), job)
        elif self.buffer is None:
            self._done_bytes += unit.size
        else:
            self._copy(unit)

    def _copy(self, unit: Unit) -> None:
        assert self.buffer is not None
        machinery = self._machinery
        if self._first_copy is None:
            self._first_copy = machinery.clock.now()
        chunk = self._ledger.hold(self.model, unit.index)
        view = machinery.pool.view(chunk, unit.size)
        machinery.stream.copy_in(self.buffer, unit.device_offset, view)
        self._copying += 1
        event = machinery.stream.record()
        tell = partial(self._on_copied, unit)
        event.on_done(lambda error: _call(machinery.loop, tell, error))

    # --- what comes back ----------------------------------------------------------------------

    def _run(
        self, tell: "Callable[..., None]", job: "Callable[..., object]", *values: object
    ) -> None:
        """Run `job` in a reader thread; `tell(error, result)` on the loop when it has ended."""
        loop = self._machinery.loop
        future = self._machinery.readers.submit(_attempt, job, *values)
        future.add_done_callback(lambda done: _call(loop, tell, *done.result()))

    def _on_opened(self, error: BaseException | None, files: object) -> None:
        self._is_opening = False
        if error is not None:
            self._fail(error)
        else:
            assert isinstance(files, tuple)
            self._files = files
            self.pump()
        self._finish_if_done()

    def _on_read(
        self, unit: Unit, verified: Literal[0, 1], error: BaseException | None, _: object
    ) -> None:
        self._reading -= 1
        if error is not None:
            self._ledger.failed(self.model, unit.index)
            self._fail(error)
        else:
            self._ledger.filled(self.model, unit.index, verified=bool(verified))
            self._read_bytes += unit.size
            self._verified_bytes += unit.size if verified else 0
            if self.buffer is None:
                self._done_bytes += unit.size
            elif self._error is None:
                self._copy(unit)
        self._go_on()

    def _on_checked(self, unit: Unit, error: BaseException | None, _: object) -> None:
        self._reading -= 1
        self._ledger.unhold(self.model, unit.index, copied=False)
        self._verified_bytes += unit.size
        if error is not None:
            self._ledger.drop(self.model, unit.index)
            self._fail(error)
        elif self.buffer is None:
            self._done_bytes += unit.size
        elif self._error is None:
            self._copy(unit)
        self._go_on()

    def _on_copied(self, unit: Unit, error: BaseException | None) -> None:
        self._copying -= 1
        self._ledger.unhold(self.model, unit.index, copied=error is None)
        if error is not None:
            self._fail(error)
        else:
            self._done_bytes += unit.size
        self._go_on()

    def _go_on(self) -> None:
        self.pump()
        self._finish_if_done()
        self._machinery.chunk_given_back()

    # --- the end ------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """Remember the first error and start nothing new."""
        if self._error is None and not self.ended.done():
            self._error = error
            self._missing.clear()

    def _finish_if_done(self) -> None:
        busy = self._reading or self._copying or self._is_opening
        if not (busy or self._missing or self.ended.done()):
            self._finish()

    def _finish(self) -> None:
        self._ledger.end_load(self.model)
        close_shards(self._files)
        self._files = ()
        if isinstance(self._error, CheckpointChangedError):
            self._ledger.evict(self.model)
        if self._error is not None and self.buffer is not None:
            self.buffer.close()
        result = self._error or self._report()
        self._machinery.on_ended(self, result)
        self.ended.set_result(result)
        self._machinery.chunk_given_back()

    def _report(self) -> LoadReport:
        now = self._machinery.clock.now()
        first_copy = self._first_copy if self._first_copy is not None else now
        return LoadReport(
            model=self.model,
            bytes_total=self.checkpoint.index.size,
            bytes_from_nvme=self._read_bytes,
            bytes_from_dram=self._dram_bytes,
            elapsed_s=now - self._started,
            first_copy_s=first_copy - self._asked,
            verified_bytes=self._verified_bytes,
        )


def _attempt(job: "Callable[..., object]", *values: object) -> tuple[BaseException | None, object]:
    try:
        return None, job(*values)
    except BaseException as error:  # noqa: BLE001 - the root of a thread's work: handed to the loop
        return error, None


def _call(loop: asyncio.AbstractEventLoop, tell: "Callable[..., None]", *values: object) -> None:
    """Call `tell` on the loop, from any thread; a loop that is gone has nobody to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, *values)
