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

Whoever wants to use bytes before the last one has come is told through `deliveries`: what of a unit
has been copied, or decoded without an error.

A load ends once, in `_finish`, when nothing of it is in flight any more: only then do chunks and
device memory change hands. So a cancelled or failed load takes back what is its own in every state.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import (
    CheckpointChangedError,
    ChecksumError,
    CodecError,
    PoolExhaustedError,
)
from sllm_node.core.types import LoadProgress, LoadReport, Placement, Tier
from sllm_node.device.base import WrongChunkError
from sllm_node.store.arrival import Deliveries
from sllm_node.store.decoding import by_target, jobs_of, named
from sllm_node.store.pipeline import (
    CLONE_BYTES,
    LINK_BYTES,
    MAX_ISSUED,
    LoadCancelledError,
    Machinery,
    Moved,
    Slice,
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
from sllm_node.store.tier import Link


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
        self._first_copy: float | None = None
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
        self._copying = 0
        self._on_links = 0
        """Bytes under way on links, as they are stored."""
        self._links = sum(1 + len(target.tier.relays) for target in targets) or 1
        self._is_opening = False
        self._moved = Moved()

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

    def _slices_of(self, unit: Unit) -> list[Slice]:
        start, end = unit.device_offset, unit.device_end
        slices = []
        for target in self.targets:
            for low, high in target.wants:
                if low < end and start < high:
                    slices.append(Slice(target, max(start, low), min(end, high)))
        return slices

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
        moved, now = self._moved, self._machinery.clock.now()
        running_s = now - self._started
        eta_s = None
        if moved.done and running_s > 0:
            eta_s = (moved.wanted - moved.done) * running_s / moved.done
        kept = self.checkpoint.index.size - moved.wanted if self.targets else 0
        total = self.checkpoint.index.size
        return LoadProgress(kept + moved.done, total, now - self._asked, eta_s, self._slowest())

    def _slowest(self) -> Tier:
        if self._source is not None or not self._moved.wanted:
            return Tier.DEVICE
        if self._moved.dram == self._moved.wanted:
            return Tier.DRAM
        return Tier.NVME if self.checkpoint.remote is None else Tier.REMOTE

    # --- the pipeline -------------------------------------------------------------------------

    def pump(self) -> None:
        """Issue what DRAM has, and start as many reads as chunks and readers allow."""
        while self._cached and self._checking + self._copying < MAX_ISSUED:
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
        if self._on_links >= LINK_BYTES * self._links or not self._is_mapped(unit):
            return False
        self._cached.pop()
        if self._machinery.verify == "always" and self._verifies_on_device:
            self._copy(unit, verify=True)
        elif self._machinery.verify == "always":
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            self._check(unit, view, self._on_checked_again)
        elif self.targets:
            self._copy(unit)
        else:
            self._moved.done += unit.device_size
        return True

    @property
    def _verifies_on_device(self) -> bool:
        targets = self.targets
        is_wanted = bool(targets) and self._machinery.verify_on_device
        return is_wanted and all(target.tier.verifies for target in targets)

    def _is_mapped(self, unit: Unit) -> bool:
        if min((target.ready_to for target in self.targets), default=0) >= unit.device_end:
            return True  # the rule, without a look at what goes where
        return all(cut.end <= cut.target.ready_to for cut in self._slices_of(unit))

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
        if policy == "first":
            return not self._ledger.is_verified(self.model, unit.index)
        return policy == "always"

    def _copy(self, unit: Unit, *, verify: bool = False) -> None:
        """Send a unit that is in DRAM to every target that wants of it."""
        if verify or unit.is_encoded:
            self._decode(unit, verify=verify)
            return
        for cut in self._slices_of(unit):
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            view = view[cut.start - unit.device_offset : cut.end - unit.device_offset]
            link = cut.target.tier.link()
            place = cut.start - cut.target.part.start
            copy = partial(link.stream.copy_in, cut.target.buffer, place, view)
            self._copy_by(link, copy, cut, partial(self._on_copied, unit))

    def _decode(self, unit: Unit, *, verify: bool) -> None:
        """Send a unit to every target that wants of it, to be decoded or checked there."""
        loop = self._machinery.loop
        self._moved.verified += unit.device_size if verify else 0
        for target, cuts in by_target(self._slices_of(unit)):
            chunk = self._ledger.hold(self.model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            place, jobs = jobs_of(unit, cuts, verify=verify)
            link = target.tier.link()
            done = self._sent(link, jobs.size, cuts, partial(self._on_copied, unit))
            tell = partial(call_on, loop, partial(self._on_decoded, unit, done))
            try:
                target.tier.decoder.decode(link.stream, target.buffer, place, view, jobs, tell)
            except Exception as error:  # noqa: BLE001 - whatever it is, the load ends with it
                loop.call_soon(done, error)

    def _clone(self, source: Source) -> None:
        """Send everything from a sibling device, once its places are mapped."""
        self._moved.wanted = sum(high - low for t in self.targets for low, high in t.wants)
        if self._mapping:
            return
        for target in self.targets:
            for low, high in target.wants:
                for start in range(low, high, CLONE_BYTES):
                    end, link = min(start + CLONE_BYTES, high), target.tier.own
                    place = start - target.part.start
                    copy = partial(
                        link.stream.copy_device, target.buffer, place, source.buffer, (start, end)
                    )
                    self._copy_by(link, copy, Slice(target, start, end), self._on_cloned)

    def _copy_by(
        self, link: Link, copy: Callable[[], None], cut: Slice, tell: "Callable[..., None]"
    ) -> None:
        """Enqueue the copy of `cut`; `tell` is called when it is done, or can't be."""
        done = self._sent(link, cut.end - cut.start, (cut,), tell)
        loop = self._machinery.loop
        try:
            copy()
            event = link.stream.record()
        except Exception as error:  # noqa: BLE001 - whatever it is, the load ends with it
            loop.call_soon(done, error)  # not at once: whoever issues the copy is still counting
        else:
            event.on_done(lambda error: call_on(loop, done, error))

    def _sent(
        self, link: Link, carried: int, cuts: Sequence[Slice], tell: "Callable[..., None]"
    ) -> "Callable[[BaseException | None], None]":
        """Count what is on its way by `link`; return what is to be called when it is there."""
        if self._first_copy is None:
            self._first_copy = self._machinery.clock.now()
            self._note_begun()
        self._copying += 1
        self._moved.stored += carried
        link.outstanding += carried
        self._on_links += carried
        if link.through is not None:
            self._moved.relayed += sum(cut.end - cut.start for cut in cuts)
        return partial(self._link_done, link, carried, cuts, tell)

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
        elif self._is_mapped(unit):
            self._copy(unit)
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
            if self._error is None and not self._is_mapped(unit):
                self._parked.append(unit)
                continue
            if self._error is None:
                self._copy(unit)
            self._ledger.unhold(self.model, unit.index, copied=False)

    def _link_done(
        self,
        link: Link,
        carried: int,
        cuts: Sequence[Slice],
        tell: "Callable[..., None]",
        error: BaseException | None,
    ) -> None:
        link.outstanding -= carried
        self._on_links -= carried
        self._copying -= 1
        if error is not None:
            self._fail(error)
        else:
            for cut in cuts:
                self._moved.done += cut.end - cut.start
                self.deliveries.delivered(cut.target.number, cut.start, cut.end)
        tell(error)
        self._go_on()

    def _on_copied(self, unit: Unit, error: BaseException | None) -> None:
        self._ledger.unhold(self.model, unit.index, copied=error is None)
        if isinstance(error, CodecError | ChecksumError):
            self._ledger.drop(self.model, unit.index)

    def _on_decoded(
        self,
        unit: Unit,
        done: "Callable[[BaseException | None], None]",
        error: BaseException | None,
        seconds: float,
    ) -> None:
        self._moved.decode_s += seconds
        if isinstance(error, WrongChunkError):
            error = named(self.checkpoint, unit, error)
        done(error)

    def _on_cloned(self, error: BaseException | None) -> None:
        if error is None:
            self._moved.sibling = self._moved.done

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
        flights = self._mapping or self._reading or self._checking or self._copying
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
            if not self.mapped.done():
                self.mapped.set_result(None)
            self._note_begun()
            self._machinery.chunk_given_back()

    def _report(self) -> LoadReport:
        now, moved = self._machinery.clock.now(), self._moved
        first_copy = self._first_copy if self._first_copy is not None else now
        size = self.checkpoint.index.size
        return LoadReport(
            model=self.model,
            bytes_total=size,
            bytes_from_nvme=moved.nvme,
            bytes_from_dram=moved.dram,
            bytes_from_sibling=moved.sibling,
            bytes_kept=size - moved.wanted if self.targets else 0,
            bytes_relayed=moved.relayed,
            elapsed_s=now - self._started,
            first_copy_s=first_copy - self._asked,
            verified_bytes=moved.verified,
            bytes_from_remote=moved.remote,
            bytes_stored=moved.stored,
            decode_s=moved.decode_s,
            is_encoded=self.checkpoint.index.is_encoded,
        )
