"""One load: a bounded pipeline from files through chunks of the pinned pool to devices.

Theory of operation. All state belongs to the event loop; five kinds of work run elsewhere and come
back as calls on the loop: mapping device memory (the device's memory thread), opening the shards and
reading a unit (reader threads), checking a unit's checksums (checker threads), copying (streams), and
decoding encoded units behind their copies (the device's decoder).
Nothing waits for a whole phase:

    missing unit:  take a chunk -> read -> check -> copy -> decode -> done
    unit in DRAM:                                   copy -> decode -> done  (first; checked if always)

`pump` is called whenever something may go on. It issues what comes from DRAM, MAX_ISSUED units at a
time, since issuing thousands would hold up every token stream of the node. It starts reads while
chunks can be had and fewer than `max_reads` are under way, so that every reader thread has its next
job queued. A chunk stays with the ledger after its copy, for the next load, until somebody else
needs it.

Memory is mapped in small steps, so that no copy waits for more than the pieces before its own; a unit
whose place isn't mapped yet is parked. A target that kept pieces from an earlier replica wants only
the rest. A model that lies on a sibling device is cloned from there instead.

A load ends once, in `_finish`, when nothing of it is in flight any more: only then do chunks and
device memory change hands. So a cancelled or failed load takes back what is its own in every state.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import CheckpointChangedError, PoolExhaustedError
from sllm_node.core.types import LoadProgress, LoadReport, Placement
from sllm_node.store.arrival import Deliveries
from sllm_node.store.moved import Moved
from sllm_node.store.pipeline import (
    MAX_ISSUED,
    LoadCancelledError,
    Machinery,
    Source,
    Target,
    call_on,
    failure_of,
    run_in,
    within,
)
from sllm_node.store.reader import (
    ShardFile,
    check_unit,
    close_shards,
    fetched_bytes,
    open_shards,
    read_unit,
    stop_reads,
)
from sllm_node.store.residency import Unit
from sllm_node.store.sending import Sending


class Load:
    """One checkpoint on its way into DRAM (no targets) or onto devices."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: tuple[Target, ...],
        source: Source | None,
        machinery: Machinery,
        asked: float,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.targets = targets
        self.ended: asyncio.Future[LoadReport | BaseException] = machinery.loop.create_future()
        """What became of it; set when nothing of it is in flight any more."""
        self.mapped: asyncio.Future[None] = machinery.loop.create_future()
        """Set when memory is behind all of its targets, or when it has ended."""
        self.deliveries = Deliveries(self.model, [(t.part, t.wants) for t in targets])
        self.borrowers = 0
        """Leases that were given before its end and are out."""
        self.returned: asyncio.Future[None] = machinery.loop.create_future()
        """Set when it has failed and the last of these is given back."""
        self._source = source
        self._machinery = machinery
        self._ledger = machinery.ledger
        self._asked = asked
        self._started = machinery.clock.now()
        self.begun: asyncio.Future[float] = machinery.loop.create_future()
        """When the first read or copy was issued, or when it has ended."""
        self._files: tuple[ShardFile, ...] = ()
        self._error: BaseException | None = None
        self._cached: list[Unit] = []
        """Units in DRAM that are still to be issued, the next one last."""
        self._missing: list[Unit] = []
        """Units still to be read, the next one last."""
        self._parked: list[Unit] = []
        """Units in DRAM, held, whose place on a device is not mapped yet."""
        self._mapping = 0
        self._reading = 0
        self._checking = 0
        self._is_opening = False
        self._moved = Moved()
        self._sending = Sending(
            checkpoint, targets, machinery, self._moved, self.deliveries,
            begun=self._note_begun, failed=self._fail, ended=self._go_on,
        )  # fmt: skip

    # --- from outside -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with the units in DRAM; open the shards if there are others."""
        self._started = self._machinery.clock.now()
        self._ledger.begin_load(self.model)
        for target in self.targets:
            self._watch(target)
        if self._source is not None:
            self._clone(self._source)
        else:
            self._sort_units()
        if self._missing:
            self._is_opening = True
            job = partial(open_shards, self.checkpoint, self._machinery.files)
            run_in(self._machinery.readers, self._machinery.loop, job, self._on_opened)
        self._tell_mapped()
        self.pump()
        # Not at once: whoever began it is still to say that it waits.
        self._machinery.loop.call_soon(self._finish_if_done)

    def _sort_units(self) -> None:
        """Tell what DRAM has from what is to be read; quickly, the first copy waits for it."""
        self._cached, self._missing = self._ledger.sorted_units(self.model)
        size = self.checkpoint.index.size
        wanted = sum(high - low for target in self.targets for low, high in target.wants)
        if self.targets and wanted < size:  # the devices kept something
            ranges = sorted(one for target in self.targets for one in target.wants)
            self._cached = within(self._cached, ranges)
            self._missing = within(self._missing, ranges)
        self._moved.wanted = wanted if self.targets else size
        read = sum(unit.device_size for unit in self._missing)
        self._moved.dram = max(0, self._moved.wanted - read)

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

    @property
    def placement(self) -> Placement:
        """Where it ends; empty for DRAM."""
        return tuple(target.part for target in self.targets)

    @property
    def is_onto_device(self) -> bool:
        """Whether it ends with a replica's weights, not only in DRAM."""
        return bool(self.targets)

    def progress(self) -> LoadProgress:
        """Return how far it has come."""
        now, is_cloned = self._machinery.clock.now(), self._source is not None
        times = (now - self._asked, now - self._started)
        return self._moved.progress(self.checkpoint, self._kept, times, is_cloned=is_cloned)

    @property
    def _kept(self) -> int:
        """Bytes that the devices had."""
        return self.checkpoint.index.size - self._moved.wanted if self.targets else 0

    # --- the pipeline -------------------------------------------------------------------------

    def pump(self) -> None:
        """Issue what DRAM has, and start as many reads as chunks and readers allow."""
        while self._cached and self._checking + self._sending.under_way < MAX_ISSUED:
            if not self._issue_cached(self._cached[-1]):
                break
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
        if self._mapping:
            return  # chunks of ours come free when what they hold can be copied
        if not (self.targets or self._reading or self._checking):
            self._missing.clear()  # a prefetch brings what fits
            self._finish_if_done()
        elif not self._machinery.wait_for_chunk(self):
            self._fail(PoolExhaustedError(self.model, self._ledger.chunks, self._ledger.lent))
            self._finish_if_done()

    def _issue_cached(self, unit: Unit) -> bool:
        """Issue the next unit from DRAM; False if its place isn't mapped yet, or links have enough."""
        if self._sending.is_full or not self._sending.is_mapped(unit):
            return False
        self._cached.pop()
        if self._machinery.verify == "always" and self._verifies_on_device:
            self._sending.send(unit, verify=True)
        elif self._machinery.verify == "always":
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            self._check(unit, view, self._on_checked_again)
        elif self.targets:
            self._sending.send(unit)
        else:
            self._moved.done += unit.device_size
        return True

    @property
    def _verifies_on_device(self) -> bool:
        targets = self.targets
        is_wanted = bool(targets) and self._machinery.verify_on_device
        return is_wanted and all(target.tier.verifies for target in targets)

    def _read(self, unit: Unit, chunk: int) -> None:
        self._note_begun()
        view = self._machinery.pool.view(chunk, unit.size)
        job = partial(read_unit, self.checkpoint, self._files[unit.shard], unit, view)
        self._reading += 1
        run_in(
            self._machinery.readers, self._machinery.loop, job, partial(self._on_read, unit, view)
        )

    def _note_begun(self) -> None:
        if not self.begun.done():
            self.begun.set_result(self._machinery.clock.now())

    def _check(self, unit: Unit, view: memoryview, tell: "Callable[..., None]") -> None:
        self._checking += 1
        job = partial(check_unit, self.checkpoint, unit, view)
        run_in(self._machinery.checkers, self._machinery.loop, job, partial(tell, unit))

    def _must_verify(self, unit: Unit) -> bool:
        policy = self._machinery.verify
        is_known = policy == "first" and self._ledger.is_verified(self.model, unit.index)
        return policy != "never" and not is_known

    def _clone(self, source: Source) -> None:
        self._moved.wanted = sum(high - low for t in self.targets for low, high in t.wants)
        if not self._mapping:
            self._sending.clone(source)

    def _watch(self, target: Target) -> None:
        """Be told when memory is mapped."""
        loop = self._machinery.loop
        for ready_to, event in target.mappings:
            self._mapping += 1
            tell = partial(self._on_mapped, target, ready_to)
            event.on_done(partial(call_on, loop, tell))

    # --- what comes back ----------------------------------------------------------------------

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
        self._moved.verified += unit.device_size
        self._settle(unit, error, verified=True)

    def _settle(self, unit: Unit, error: BaseException | None, *, verified: bool) -> None:
        """The chunk of a unit that was missing is good, or useless."""
        if error is not None:
            self._ledger.failed(self.model, unit.index)
            self._fail(error)
        else:
            self._ledger.filled(self.model, unit.index, verified=verified)
            self._moved.nvme += unit.device_size
            self._deliver(unit)
        self._go_on()

    def _on_checked_again(self, unit: Unit, error: BaseException | None, _: object) -> None:
        """A unit that was in DRAM has been checked."""
        self._checking -= 1
        self._ledger.unhold(self.model, unit.index, copied=False)
        self._moved.verified += unit.device_size
        if error is not None:
            self._ledger.drop(self.model, unit.index)
            self._fail(error)
        else:
            self._deliver(unit)
        self._go_on()

    def _deliver(self, unit: Unit) -> None:
        if self._error is not None:
            return
        if not self.targets:
            self._moved.done += unit.device_size
            self._moved.stored += unit.size
        elif self._sending.is_mapped(unit):
            self._sending.send(unit)
        else:
            self._ledger.hold(self.model, unit.index)
            self._parked.append(unit)

    def _on_mapped(self, target: Target, ready_to: int, error: BaseException | None) -> None:
        self._mapping -= 1
        if error is not None:
            self._fail(error)
        elif self._error is None:
            target.ready_to = ready_to
            self._unpark()
            if self._source is not None and not self._mapping:
                self._clone(self._source)
            self._tell_mapped()
        self._go_on()

    def _tell_mapped(self) -> None:
        if not self._mapping and not self.mapped.done():
            self.mapped.set_result(None)

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for unit in parked:
            if self._error is None and not self._sending.is_mapped(unit):
                self._parked.append(unit)
                continue
            if self._error is None:
                self._sending.send(unit)
            self._ledger.unhold(self.model, unit.index, copied=False)

    def _go_on(self) -> None:
        self.pump()
        self._finish_if_done()
        self._machinery.chunk_given_back()

    # --- the end ------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """Remember the first error and start nothing new."""
        if self._error is None and not self.ended.done():
            self._error = error
            self.deliveries.fail(failure_of(self.model, error))
            self._cached.clear()
            self._missing.clear()
            self._unpark()
            stop_reads(self._files)

    def _finish_if_done(self) -> None:
        flights = self._mapping or self._reading or self._checking or self._sending.under_way
        queued = self._cached or self._missing or self._parked
        if not (self._is_opening or flights or queued or self.ended.done()):
            self._finish()

    def _finish(self) -> None:
        self._ledger.end_load(self.model)
        index = self.checkpoint.index
        fetched = fetched_bytes(self._files) * index.size // index.file_size
        self._moved.remote = min(fetched, self._moved.nvme)  # chunks differ in how well they encode
        close_shards(self._files)
        self._files = ()
        if isinstance(self._error, CheckpointChangedError):
            self._ledger.evict(self.model)
        if self._source is not None:
            self._source.done()
        result = self._error or self._report()
        try:
            self._machinery.on_ended(self, result)
        finally:
            self.ended.set_result(result)
            self._tell_mapped()
            self._note_begun()
            self._machinery.chunk_given_back()

    def _report(self) -> LoadReport:
        now = self._machinery.clock.now()
        first_copy = self._sending.first_at if self._sending.first_at is not None else now
        times = (now - self._started, first_copy - self._asked)
        return self._moved.report(self.checkpoint, self._kept, *times)
