"""Which checkpoint is on which tier, and the way up: `acquire` gives a lease on device memory.

Everything here runs on the event loop. One load per model is under way at a time (single flight):
whoever else wants the model waits for it. A caller that is cancelled leaves the others waiting; the
last one takes the load with it. A replica's weights stay on their devices when the last lease is
given back, until `evict`. What is evicted to make room stays as a cache until the memory is really
needed; what of a model is in DRAM stays until another load needs the chunks.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.clock import Clock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import LoadFailedError, ModelBusyError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadProgress, LoadReport, ModelId, Part, Placement, Tier
from sllm_node.device.base import Device, DeviceRange, Event
from sllm_node.store.lease import Lease, LeasedPart, Resident, parts_of, report_of
from sllm_node.store.loader import Load
from sllm_node.store.loan import Loan
from sllm_node.store.observed import Observed
from sllm_node.store.pipeline import LoadCancelledError, Machinery, Source, Target, call_on
from sllm_node.store.pool import PinnedPool
from sllm_node.store.reader import FileSystem, file_system
from sllm_node.store.remote import RemoteTier
from sllm_node.store.residency import Residency, units_of
from sllm_node.store.tier import DeviceTier

log = logging.getLogger(__name__)

READS_PER_THREAD = 2
"""Reads under way for each reader thread: one at the disk and one queued behind it."""
STAGING_SHARE = 4
"""Staging memory for decoding takes no more than this part, a quarter, of a device."""


class Checkpoints(Protocol):
    """Where the store finds checkpoints; the catalogue satisfies it."""

    def get(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint of `model`, or raise ModelNotFoundError."""


class Store:
    """The tiers of one node."""

    def __init__(  # noqa: PLR0913 - what the node is made of, each once
        self,
        catalog: Checkpoints,
        devices: Sequence[Device],
        config: StoreConfig,
        clock: Clock,
        metrics: Metrics,
        *,
        files: FileSystem | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        assert devices
        self.on_load: Callable[[LoadReport], None] = lambda report: None
        self._catalog = catalog
        self._devices = tuple(devices)
        self._config = config
        self._clock = clock
        self._remote = remote
        self._files = files or (file_system(config) if remote is None else remote.files)
        self._ledger = Residency(config.pool_bytes // config.chunk_bytes)
        self._opened: dict[ModelId, Checkpoint] = {}
        """What the ledgers' rows were made of."""
        self._tiers: dict[str, DeviceTier] = {}
        self._residents: dict[ModelId, dict[Placement, Resident]] = {}
        self._loads: dict[ModelId, Load] = {}
        self._waiters: dict[ModelId, int] = {}
        self._remnants: dict[ModelId, Load] = {}
        """Loads that failed and whose memory somebody still looks at."""
        self._slot_queue: deque[Load] = deque()
        self._active = 0
        self._chunk_queue: deque[Load] = deque()
        self._pins: dict[Tier, set[ModelId]] = {Tier.DEVICE: set(), Tier.DRAM: set()}
        self._observed = Observed(metrics, self._ledger)
        self._is_closing = False
        self._machinery: Machinery | None = None

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the pinned pool, start reader threads, open the links to the devices.

        Raises:
            DeviceError: the system refuses the pool, or a device has no room for weights.
            DeviceMemoryError: a device has no room for a relay's staging memory.
        """
        loop = asyncio.get_running_loop()
        config = self._config
        readers = ThreadPoolExecutor(config.reader_threads, "sllm-read")
        checkers = ThreadPoolExecutor(config.reader_threads, "sllm-check")
        pool = await loop.run_in_executor(readers, self._take_pool)
        try:
            self._open_tiers()
            for tier in self._tiers.values():
                await loop.run_in_executor(readers, tier.prepare_decoder)
                tier.check_capacity()
        except BaseException:
            for tier in self._tiers.values():
                tier.close()
            pool.close()
            readers.shutdown()
            raise
        self._observed.watch(tuple(self._tiers.values()))
        self._machinery = Machinery(
            loop=loop,
            clock=self._clock,
            pool=pool,
            ledger=self._ledger,
            readers=readers,
            checkers=checkers,
            files=self._files,
            verify=config.verify,
            verify_on_device=config.verify_on_device,
            max_reads=READS_PER_THREAD * config.reader_threads,
            wait_for_chunk=self._wait_for_chunk,
            chunk_given_back=self._wake_one,
            on_eviction=self._observed.gave_way,
            on_ended=self._on_ended,
        )
        self._observed.show()

    def _open_tiers(self) -> None:
        for device in self._devices:
            self._tiers[device.name] = self._new_tier(device)
        if self._config.relay:
            for tier in self._tiers.values():
                tier.relay_through(tuple(self._tiers.values()))

    def add_device(self, device: Device) -> None:
        """Take one more device in; its link is its own only."""
        assert self._machinery is not None, "the store is not started"
        self._devices = (*self._devices, device)
        self._tiers[device.name] = self._new_tier(device)
        self._observed.watch(tuple(self._tiers.values()))

    def _new_tier(self, device: Device) -> DeviceTier:
        config = self._config
        staging = min(config.decode_staging_bytes, device.memory_total // STAGING_SHARE)
        return DeviceTier(device, config.piece_bytes, staging_bytes=staging)

    def _take_pool(self) -> PinnedPool:
        config = self._config
        return PinnedPool(
            self._devices[0], config.pool_bytes, config.chunk_bytes, huge_pages=config.huge_pages
        )

    def lend_links(self, is_busy: Callable[[str], bool]) -> None:
        """Let `is_busy(device)` say when a device's link must not serve its siblings."""
        for name, tier in self._tiers.items():
            tier.is_busy = partial(is_busy, name)

    async def close(self) -> None:
        """Cancel what is under way, wait for it, give all memory back.

        Raises:
            ModelBusyError: a lease is still out; its device memory alone is not given back.
        """
        if self._machinery is None:
            return
        self._is_closing = True
        for load in list(self._loads.values()):
            self._cancel(load)
        while self._loads:
            await next(iter(self._loads.values())).ended
        self._pins[Tier.DEVICE].clear()
        leased = [*self._remnants, *(model for model in self._residents if self.leases(model))]
        for model, residents in list(self._residents.items()):
            for placement, resident in list(residents.items()):
                if not resident.leases:
                    self.evict(model, Tier.DEVICE, "shutdown", placement)
        machinery, self._machinery = self._machinery, None
        machinery.readers.shutdown(wait=True)
        machinery.checkers.shutdown(wait=True)
        for tier in self._tiers.values():
            tier.close()
        machinery.pool.close()
        if leased:
            raise ModelBusyError(leased[0], "is in use while the store closes")

    # --- what is where ------------------------------------------------------------------------

    def is_on_device(self, model: ModelId) -> bool:
        """Tell whether all of `model` is on a device, or on several together."""
        return bool(self._residents.get(model))

    def residency(self, model: ModelId) -> dict[Tier, int]:
        """Return the bytes of `model` on each tier, as they lie there: decoded on DEVICE only."""
        opened = self._opened.get(model) or self._catalog.get(model)
        size, file_size = opened.index.size, opened.index.file_size
        cached = sum(tier.arena.filled_bytes(model) for tier in self._tiers.values())
        found = {
            Tier.DEVICE: size if self.is_on_device(model) else min(cached, size),
            Tier.DRAM: self._ledger.bytes_of(model),
            Tier.NVME: file_size,
        }
        come = None if self._remote is None else self._remote.bytes_come(model)
        if come is not None:
            found[Tier.NVME], found[Tier.REMOTE] = come, file_size
        return found

    def on_devices(self, model: ModelId) -> dict[str, int]:
        """Return the bytes of `model` in the memory of each device that has any."""
        found = {name: tier.arena.filled_bytes(model) for name, tier in self._tiers.items()}
        return {name: size for name, size in found.items() if size}

    def leases(self, model: ModelId) -> int:
        """Return how many hold `model` on devices."""
        return sum(resident.leases for resident in self._residents.get(model, {}).values())

    def progress(self, model: ModelId) -> LoadProgress | None:
        """Return how far the load of `model` is, if one is under way."""
        load = self._loads.get(model)
        return load.progress() if load else None

    def bandwidth(self, tier: Tier) -> float | None:
        """Return the bytes/s observed of loads from `tier`; None before the first."""
        return self._observed.bandwidth.get(tier)

    def capacity(self, device: str) -> int:
        """Return the bytes of a device that models and their KV memory may share."""
        return self._tiers[device].capacity

    def capacities(self) -> dict[str, int]:
        """Return the capacity of every device."""
        return {name: tier.capacity for name, tier in self._tiers.items()}

    def cached_bytes(self, device: str) -> int:
        """Return the bytes of a device that evicted models keep until somebody needs them."""
        return self._tiers[device].arena.cached_bytes

    @property
    def pool_chunks(self) -> int:
        """Chunks of the pinned pool."""
        return self._ledger.chunks

    @property
    def pool_chunks_used(self) -> int:
        """Chunks that hold or await bytes of checkpoints."""
        return self._ledger.chunks - self._ledger.free - self._ledger.lent

    @property
    def pool_chunks_lent(self) -> int:
        """Chunks that are lent for something that is no checkpoint."""
        return self._ledger.lent

    # --- the way up ---------------------------------------------------------------------------

    def whole(self, model: ModelId, device: str | None = None) -> Placement:
        """Return the placement of all of `model` on one device, the first one by default.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        name = device or self._devices[0].name
        return (Part(name, 0, self._catalog.get(model).index.size),)

    async def acquire(
        self, model: ModelId, placement: Placement | None = None, *, early: bool = False
    ) -> Lease:
        """Return a lease on `model`, loading it where `placement` says if it is not there.

        An `early` one is given as soon as all memory is there; `Lease.arrival` says which bytes are.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            CheckpointError: its files are damaged, changed or unreadable.
            DeviceMemoryError: no room on a device.
            ModelBusyError: another part of it is in use on a device.
            PoolExhaustedError: no chunk of the pool can be freed.
        """
        asked = self._clock.now()
        if placement is None:
            placement = self.whole(model)
        while True:
            if (remnant := self._remnants.get(model)) is not None:
                await asyncio.shield(remnant.returned)
                continue
            resident = self._residents.get(model, {}).get(placement)
            if resident is not None:
                resident.leases += 1
                if self._ledger.knows(model):
                    self._ledger.touch(model)
                return resident.lease(None)
            load = self._loads.get(model)
            if load is None:
                load = self._begin(model, asked, placement)
            if load.is_ending or load.placement != placement:
                await asyncio.shield(load.ended)
                continue
            report = await self._wait(load, early=early)
            if report is None:
                return self._lend(load)
            return self._residents[model][placement].lease(report)

    def hand_over(self, lease: Lease) -> tuple[LeasedPart, ...]:
        """Let the only holder own the device memory of its lease, which the store forgets.

        Who owns it may write to it, and gives it back by closing the buffers, from any thread.

        Raises:
            ModelBusyError: somebody else holds it as well.
        """
        model, placement = lease.checkpoint.model, tuple(part.part for part in lease.parts)
        residents = self._residents[model]
        if residents[placement].leases > 1:
            raise ModelBusyError(model, "is in use by others")
        lease.release()
        del residents[placement]
        if not residents:
            del self._residents[model]
        for part in lease.parts:
            self._tiers[part.part.device].hand_over(model)
        self._observed.show()
        return lease.parts

    async def prefetch(self, model: ModelId) -> None:
        """Bring into DRAM what of `model` fits there and isn't there yet.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            CheckpointError: its files are damaged, changed or unreadable.
        """
        while (load := self._loads.get(model)) is not None and (
            load.is_ending or load.is_onto_device
        ):
            # Not as one of its waiters: it ends when nobody wants the model on the device any more.
            result = await asyncio.shield(load.ended)
            if not isinstance(result, LoadCancelledError):
                report_of(model, result)
                return
        if load is None:
            load = self._begin(model, self._clock.now(), ())
        await self._wait(load)

    async def allocate(
        self, device: str, size: int, again: DeviceRange | None = None
    ) -> DeviceRange:
        """Take device memory for something that is no checkpoint; caches give way to it.

        `again`: an earlier result of that size, all of whose pieces were unmapped since: it gets
        memory at its old addresses. Without room it is closed.

        Raises:
            DeviceMemoryError: there is no room.
        """
        place, event = self._tiers[device].allocate(size, again)
        loop = asyncio.get_running_loop()
        mapped: asyncio.Future[None] = loop.create_future()
        event.on_done(partial(call_on, loop, partial(_settle, mapped)))
        try:
            await asyncio.shield(mapped)
        except BaseException:
            mapped.cancel()  # a failure that comes now has nobody to tell
            place.close()
            raise
        self._observed.show()
        return place

    async def begun(self, model: ModelId) -> float | None:
        """Wait until a load of `model` has issued its first read or copy; return when that was.

        None: there is none onto devices, or it waits behind others, or for a prefetch of the model.
        """
        load = self._loads.get(model)
        if load is None or not load.is_onto_device or load in self._slot_queue:
            return None
        return await asyncio.shield(load.begun)

    async def settled(self, model: ModelId) -> None:
        """Wait until no load of `model` onto devices is under way.

        A cancelled one holds memory to its end; a prefetch holds none.
        """
        while (load := self._loads.get(model)) is not None and load.is_onto_device:
            await asyncio.shield(load.ended)
        if (remnant := self._remnants.get(model)) is not None:
            await asyncio.shield(remnant.returned)

    async def _wait(self, load: Load, *, early: bool = False) -> LoadReport | None:
        """Wait for `load`; if it was one onto the device, a lease has been counted for us.

        With `early`, return None when its memory is there and it goes on.
        """
        model = load.model
        self._waiters[model] = self._waiters.get(model, 0) + 1
        try:
            if early:
                await asyncio.shield(load.mapped)
                if not (load.is_ending or load.ended.done()):
                    return None
            result = await asyncio.shield(load.ended)
        except asyncio.CancelledError:
            self._leave(load)
            raise
        return report_of(model, result)

    def _lend(self, load: Load) -> Lease:
        """Return an early lease to somebody who is counted as waiting for `load`."""
        load.borrowers += 1
        give_back = partial(self._give_back_early, load)
        return Lease(load.checkpoint, parts_of(load), None, give_back, early=load)

    def _give_back_early(self, load: Load) -> None:
        load.borrowers -= 1
        self._leave(load)
        if not load.borrowers and self._remnants.get(load.model) is load:
            del self._remnants[load.model]
            self._take_back(load)
            load.returned.set_result(None)
            self._observed.show()

    def _leave(self, load: Load) -> None:
        """A waiter was cancelled; the last one cancels the load."""
        if load.ended.done():
            if (resident := self._resident_of(load)) is not None:
                resident.give_back()
            return
        self._waiters[load.model] -= 1
        if not self._waiters[load.model]:
            self._cancel(load)

    def _resident_of(self, load: Load) -> Resident | None:
        """Return what `load` made, if it is still there."""
        resident = self._residents.get(load.model, {}).get(load.placement)
        return resident if resident is not None and resident.load is load else None

    def _begin(self, model: ModelId, asked: float, placement: Placement) -> Load:
        assert self._machinery is not None, "the store is not started"
        if self._is_closing:
            raise LoadFailedError(model, "the store is closing")
        checkpoint = self._catalog.get(model)
        self._know(checkpoint)
        targets = self._targets(checkpoint, placement)
        source = self._source(model, placement)
        machinery = self._machinery
        if checkpoint.remote is not None and self._remote is not None:
            machinery = replace(machinery, readers=self._remote.readers)
        load = Load(checkpoint, targets, source, machinery, asked)
        self._loads[model] = load
        self._waiters[model] = 0
        self._observed.show()
        is_warm = self._ledger.bytes_of(model) == checkpoint.index.file_size or source is not None
        if is_warm or self._active < self._config.max_concurrent_loads:
            # A warm load needs neither disk nor chunks: it never waits for others.
            self._active += 1
            load.start()
        else:
            self._slot_queue.append(load)
        return load

    def _targets(self, checkpoint: Checkpoint, placement: Placement) -> tuple[Target, ...]:
        """Hold the rows of all parts and put memory behind them.

        Raises:
            DeviceMemoryError: a device has no room; nothing was taken.
            KernelError: a device can't decode.
        """
        model, index = checkpoint.model, checkpoint.index
        tiers = [self._tiers[part.device] for part in placement]
        wanted = [tier.prepare(model, part) for tier, part in zip(tiers, placement, strict=True)]
        for tier in tiers:
            tier.arena.hold(model)
        try:
            staged = [
                tier.stage(index.chunk_bytes, size) if size and self._decodes(index, tier) else ()
                for tier, size in zip(tiers, wanted, strict=True)
            ]
            for tier, size in zip(tiers, wanted, strict=True):
                tier.check_room(size)
        except SllmError:
            for tier in tiers:
                tier.arena.release(model)
            raise
        parts = enumerate(zip(tiers, placement, staged, strict=True))
        return tuple(self._target(model, number, *one) for number, one in parts)

    def _decodes(self, index: TensorIndex, tier: DeviceTier) -> bool:
        """Tell whether a decoder is needed, to decode or to compare digests."""
        is_checked = self._config.verify == "always" and self._config.verify_on_device
        return index.is_encoded or (is_checked and tier.verifies)

    def _target(
        self, model: ModelId, number: int, tier: DeviceTier, part: Part, staged: tuple[Event, ...]
    ) -> Target:
        wants, ready_to = tier.arena.wants(model), tier.ready_to(model)
        tier.loads += 1
        # Memory is mapped in order: staging memory is there before any of the row's.
        events = tuple((ready_to, event) for event in staged)
        return Target(
            number, tier, part, wants, tier.buffer(model), ready_to, events + tier.map(model)
        )

    def _source(self, model: ModelId, placement: Placement) -> Source | None:
        """Borrow a replica on one device from which all of `placement` can be cloned."""
        wanted = [self._tiers[part.device].device for part in placement]
        for there, resident in self._residents.get(model, {}).items():
            origin = self._tiers[there[0].device]
            reachable = all(device.can_reach(origin.device) for device in wanted)
            if wanted and reachable and len(there) == 1:
                resident.leases += 1
                return Source(origin.buffer(model), resident.give_back)
        return None

    def _know(self, checkpoint: Checkpoint) -> None:
        """Open the ledger's row of `checkpoint`; another checkpoint of that name is forgotten."""
        model = checkpoint.model
        if self._opened.get(model) is checkpoint:
            return
        if self._opened.get(model) != checkpoint:
            units = units_of(checkpoint.index, self._config.chunk_bytes)
            for tier in self._tiers.values():
                tier.forget(model)
            if self._ledger.knows(model):
                self._ledger.close(model)
            self._ledger.open(model, units)
            self._ledger.pin(model, pinned=model in self._pins[Tier.DRAM])
        self._opened[model] = checkpoint

    def _cancel(self, load: Load) -> None:
        if load in self._slot_queue:
            self._slot_queue.remove(load)
            self._active += 1
            load.abandon()
        else:
            load.cancel()

    def _on_ended(self, load: Load, result: LoadReport | BaseException) -> None:
        """A load is over: count leases for those who wait, and let the next one begin."""
        model = load.model
        del self._loads[model]
        waiters = self._waiters.pop(model)
        self._active -= 1
        if load in self._chunk_queue:
            self._chunk_queue.remove(load)
        for target in load.targets:
            target.tier.loads -= 1
        if isinstance(result, LoadReport):
            for target in load.targets:
                target.tier.arena.filled(model)
            if load.is_onto_device:
                made = Resident(load, waiters)
                self._residents.setdefault(model, {})[load.placement] = made
            self._observed.succeeded(load, result)
        else:
            if load.borrowers:
                self._remnants[model] = load
            else:
                self._take_back(load)
            self._observed.failed(load, result)
        self._start_next()
        self._observed.show()
        if isinstance(result, LoadReport):
            self.on_load(result)

    def _take_back(self, load: Load) -> None:
        """Free the memory of a load that failed."""
        for target in load.targets:
            target.tier.arena.release(load.model)
            target.tier.drop_unfilled(load.model)

    def _start_next(self) -> None:
        limit = 0 if self._is_closing else self._config.max_concurrent_loads
        while self._slot_queue and self._active < limit:
            self._active += 1
            self._slot_queue.popleft().start()

    # --- chunks -------------------------------------------------------------------------------

    def _wait_for_chunk(self, load: Load) -> bool:
        """Let `load` wait, unless nothing is in flight and every other load waits as well."""
        waiting = [other for other in self._chunk_queue if other is not load]
        others = self._active - len(waiting) - 1
        if not self._ledger.in_flight and others <= 0:
            return False
        if load not in self._chunk_queue:
            self._chunk_queue.append(load)
        return True

    def _wake_one(self) -> None:
        """A chunk may be free: the load that has waited longest tries again."""
        if self._chunk_queue:
            self._chunk_queue.popleft().pump()

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk of the pinned pool."""
        return self._config.chunk_bytes

    def lend(self, count: int) -> Loan | None:
        """Lend `count` chunks of the pinned pool for something that is no checkpoint; None: there is no room.

        Who waits for a chunk to load goes first.
        """
        assert self._machinery is not None, "the store is not started"
        if self._chunk_queue or count > self._ledger.lendable:
            return None
        chunks: list[int] = []
        pool, size = self._machinery.pool, self._config.chunk_bytes
        while len(chunks) < count:
            taken = self._ledger.lend()
            assert taken is not None
            chunk, victim = taken
            chunks.append(chunk)
            if victim is not None:
                self._observed.gave_way(victim)
        self._observed.show()
        views = [pool.view(chunk, size) for chunk in chunks]
        return Loan(views, partial(self._take_back_chunks, chunks))

    def _take_back_chunks(self, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            self._ledger.take_back(chunk)
            self._wake_one()
        self._observed.show()

    # --- the way down -------------------------------------------------------------------------

    def evict(
        self, model: ModelId, tier: Tier, reason: str, placement: Placement | None = None
    ) -> None:
        """Give up what `tier` (DEVICE or DRAM) has of `model`; without it, do nothing.

        On devices, `placement` names one of several replicas; None means all. What is evicted for
        `room` stays as a cache until the memory is needed.

        Raises:
            ModelBusyError: it is leased, pinned or loading there.
        """
        assert tier in (Tier.DEVICE, Tier.DRAM), (
            "a checkpoint is removed from NVMe through the catalogue"
        )
        if tier is Tier.DEVICE:
            self._evict_from_devices(model, reason, placement)
        elif self._ledger.knows(model):
            self._evict_from_dram(model, reason)
        self._observed.show()

    def _evict_from_devices(self, model: ModelId, reason: str, placement: Placement | None) -> None:
        residents = self._residents.get(model, {})
        chosen = list(residents) if placement is None else [p for p in residents if p == placement]
        leases = sum(residents[one].leases for one in chosen)
        if leases:
            raise ModelBusyError(model, f"is in use on the device ({leases} leases)")
        if chosen and model in self._pins[Tier.DEVICE] and reason != "shutdown":
            raise ModelBusyError(model, "is pinned on the device")
        for one in chosen:
            del residents[one]
            for part in one:
                self._tiers[part.device].arena.release(model)
            self._observed.evicted(Tier.DEVICE, reason)
        if not residents:
            self._residents.pop(model, None)
        if model not in self._opened:
            self._forget_rows(model)
        elif reason != "room":
            self._drop_caches(model)

    def _drop_caches(self, model: ModelId) -> None:
        for tier in self._tiers.values():
            if tier.arena.knows(model) and not tier.arena.is_held(model):
                tier.drop(model)

    def _evict_from_dram(self, model: ModelId, reason: str) -> None:
        if model in self._loads:
            raise ModelBusyError(model, "is being loaded")
        if self._ledger.is_pinned(model):
            raise ModelBusyError(model, "is pinned in DRAM")
        if self._ledger.evict(model):
            self._observed.evicted(Tier.DRAM, reason)
        self._wake_one()

    def pin(self, model: ModelId, tier: Tier) -> None:
        """Never evict `model` from `tier` (DEVICE or DRAM) until it is unpinned.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        self._catalog.get(model)
        self._pins[tier].add(model)
        self._apply_pins(model)

    def unpin(self, model: ModelId, tier: Tier) -> None:
        """Let `model` be evicted from `tier` again."""
        self._pins[tier].discard(model)
        self._apply_pins(model)

    def _apply_pins(self, model: ModelId) -> None:
        if self._ledger.knows(model):
            self._ledger.pin(model, pinned=model in self._pins[Tier.DRAM])
            self._wake_one()

    def forget(self, model: ModelId) -> None:
        """Drop what is known of a checkpoint that was removed; a load under way keeps its own.

        Device memory and addresses that somebody holds are freed when they are evicted.
        """
        if model in self._loads or not self._ledger.knows(model):
            return
        self._ledger.close(model)
        del self._opened[model]
        self._forget_rows(model)
        self._wake_one()
        self._observed.show()

    def _forget_rows(self, model: ModelId) -> None:
        for tier in self._tiers.values():
            if not tier.arena.is_held(model):
                tier.forget(model)


def _settle(mapped: "asyncio.Future[None]", error: BaseException | None) -> None:
    """Tell who waits for memory."""
    if mapped.done():
        return
    if error is None:
        mapped.set_result(None)
    else:
        mapped.set_exception(error)
