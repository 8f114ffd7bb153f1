"""One load: a bounded pipeline from files through chunks of the pinned pool to the device.

Theory of operation. All state belongs to the event loop; four kinds of work run elsewhere and come
back as calls on the loop: opening the shards and reading a unit (reader threads), checking a unit's
checksums (checker threads), copying a unit (the device's stream). Nothing waits for a whole phase:

    missing unit:  take a chunk -> read -> check -> copy -> done
    unit in DRAM:                                   copy -> done     (first; checked if always)

`pump` is called whenever something may go on. It issues what comes from DRAM, MAX_ISSUED units at a
time, since issuing thousands would hold up every token stream of the node. It starts reads while
chunks can be had and fewer than `max_reads` are under way, so that every reader thread has its next
job queued. A chunk stays with the ledger after its copy, for the next load, until somebody else
needs it.

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
    fetched_bytes,
    open_shards,
    read_unit,
    stop_reads,
)
from sllm_node.store.residency import Residency, Unit

Verify = Literal["first", "always", "never"]

MAX_ISSUED = 64
"""Units from DRAM that are issued and not done, of one load: enough for any link to stay busy."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """What all loads of a store share."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    pool: PinnedPool
    ledger: Residency
    readers: ThreadPoolExecutor
    checkers: ThreadPoolExecutor
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
        self._cached: list[Unit] = []
        """Units in DRAM that are still to be issued, the next one last."""
        self._missing: list[Unit] = []
        """Units still to be read, the next one last."""
        self._reading = 0
        self._checking = 0
        self._copying = 0
        self._is_opening = False
        self._done_bytes = 0
        self._read_bytes = 0
        self._remote_bytes = 0
        self._verified_bytes = 0
        self._dram_bytes = 0

    # --- from outside -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with the units in DRAM; open the shards if there are others."""
        self._started = self._machinery.clock.now()
        self._ledger.begin_load(self.model)
        for unit in reversed(self._ledger.units(self.model)):
            if self._ledger.chunk_of(self.model, unit.index) is None:
                self._missing.append(unit)
            else:
                self._cached.append(unit)
                self._dram_bytes += unit.size
        if self._missing:
            self._is_opening = True
            job = partial(open_shards, self.checkpoint, self._machinery.files)
            self._run(self._machinery.readers, job, self._on_opened)
        self.pump()
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
        total, now = self.checkpoint.index.size, self._machinery.clock.now()
        running_s = now - self._started
        eta_s = None
        if self._done_bytes and running_s > 0:
            eta_s = (total - self._done_bytes) * running_s / self._done_bytes
        source = Tier.NVME if self.checkpoint.remote is None else Tier.REMOTE
        if self._dram_bytes == total:
            source = Tier.DRAM
        return LoadProgress(self._done_bytes, total, now - self._asked, eta_s, source)

    # --- the pipeline -------------------------------------------------------------------------

    def pump(self) -> None:
        """Issue what DRAM has, and start as many reads as chunks and readers allow."""
        while self._cached and self._checking + self._copying < MAX_ISSUED:
            self._issue_cached(self._cached.pop())
        while self._files and self._missing and self._reading < self._machinery.max_reads:
            taken = self._ledger.take(self.model, self._missing[-1].index)
            if taken is None:
                self._want_chunk()
                return
            chunk, victim = taken
            if victim is not None:
                self._machinery.on_eviction(victim)
            self._read(self._missing.pop(), chunk)

    def _want_chunk(self) -> None:
        if self.buffer is None and not (self._reading or self._checking):
            self._missing.clear()  # a prefetch brings what fits
            self._finish_if_done()
        elif not self._machinery.wait_for_chunk(self):
            self._fail(PoolExhaustedError(self.model, self._ledger.chunks))
            self._finish_if_done()

    def _issue_cached(self, unit: Unit) -> None:
        if self._machinery.verify == "always":
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            self._check(unit, view, self._on_checked_again)
        elif self.buffer is None:
            self._done_bytes += unit.size
        else:
            self._copy(unit)

    def _read(self, unit: Unit, chunk: int) -> None:
        view = self._machinery.pool.view(chunk, unit.size)
        job = partial(read_unit, self.checkpoint, self._files[unit.shard], unit, view)
        self._reading += 1
        self._run(self._machinery.readers, job, partial(self._on_read, unit, view))

    def _check(self, unit: Unit, view: memoryview, tell: "Callable[..., None]") -> None:
        self._checking += 1
        job = partial(check_unit, self.checkpoint, unit, view)
        self._run(self._machinery.checkers, job, partial(tell, unit))

    def _must_verify(self, unit: Unit) -> bool:
        policy = self._machinery.verify
        if policy == "first":
            return not self._ledger.is_verified(self.model, unit.index)
        return policy == "always"

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
        self,
        threads: ThreadPoolExecutor,
        job: "Callable[[], object]",
        tell: "Callable[..., None]",
    ) -> None:
        """Run `job` in one of `threads`; `tell(error, result)` on the loop when it has ended."""
        loop = self._machinery.loop
        future = threads.submit(_attempt, job)
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
        self, unit: Unit, view: memoryview, error: BaseException | None, _: object
    ) -> None:
        self._reading -= 1
        if error is None and self._must_verify(unit):
            self._check(unit, view, self._on_checked)
            self.pump()
        else:
            self._settle(unit, error, verified=False)

    def _on_checked(self, unit: Unit, error: BaseException | None, _: object) -> None:
        self._checking -= 1
        self._verified_bytes += unit.size
        self._settle(unit, error, verified=True)

    def _settle(self, unit: Unit, error: BaseException | None, *, verified: bool) -> None:
        """The chunk of a unit that was missing is good, or useless."""
        if error is not None:
            self._ledger.failed(self.model, unit.index)
            self._fail(error)
        else:
            self._ledger.filled(self.model, unit.index, verified=verified)
            self._read_bytes += unit.size
            self._deliver(unit)
        self._go_on()

    def _on_checked_again(self, unit: Unit, error: BaseException | None, _: object) -> None:
        """A unit that was in DRAM has been checked."""
        self._checking -= 1
        self._ledger.unhold(self.model, unit.index, copied=False)
        self._verified_bytes += unit.size
        if error is not None:
            self._ledger.drop(self.model, unit.index)
            self._fail(error)
        else:
            self._deliver(unit)
        self._go_on()

    def _deliver(self, unit: Unit) -> None:
        if self.buffer is None:
            self._done_bytes += unit.size
        elif self._error is None:
            self._copy(unit)

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
            self._cached.clear()
            self._missing.clear()
            stop_reads(self._files)

    def _finish_if_done(self) -> None:
        busy = self._is_opening or self._reading or self._checking or self._copying
        if not (busy or self._cached or self._missing or self.ended.done()):
            self._finish()

    def _finish(self) -> None:
        self._ledger.end_load(self.model)
        self._remote_bytes = fetched_bytes(self._files)
        close_shards(self._files)
        self._files = ()
        if isinstance(self._error, CheckpointChangedError):
            self._ledger.evict(self.model)
        if self._error is not None and self.buffer is not None:
            self.buffer.close()
        result = self._error or self._report()
        try:
            self._machinery.on_ended(self, result)
        finally:
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
            bytes_from_remote=self._remote_bytes,
        )


def _attempt(job: "Callable[[], object]") -> tuple[BaseException | None, object]:
    try:
        return None, job()
    except BaseException as error:  # noqa: BLE001 - the root of a thread's work: handed to the loop
        return error, None


def _call(loop: asyncio.AbstractEventLoop, tell: "Callable[..., None]", *values: object) -> None:
    """Call `tell` on the loop, from any thread; a loop that is gone has nobody to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, *values)
