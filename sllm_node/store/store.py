"""Which checkpoint is on which tier, and the way up: `acquire` gives a lease on device memory.

Everything here runs on the event loop. One load per model is under way at a time (`flights`): whoever
else wants the model waits for it. A replica's weights stay on their devices when the last lease is
given back, until `evict`. What is evicted to make room stays as a cache until the memory is really
needed; what of a model is in DRAM stays until another load needs the chunks.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import LoadFailedError, ModelBusyError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadProgress, LoadReport, ModelId, Part, Placement, Tier
from sllm_node.device.base import Device, DeviceRange
from sllm_node.store.evictions import Evictions
from sllm_node.store.flights import Flights
from sllm_node.store.lease import Lease, LeasedPart, report_of
from sllm_node.store.lender import Lender
from sllm_node.store.loader import Load
from sllm_node.store.loan import Loan
from sllm_node.store.observed import Observed
from sllm_node.store.pipeline import LoadCancelledError, Machinery
from sllm_node.store.pool import take_pool
from sllm_node.store.reader import FileSystem, file_system
from sllm_node.store.remote import RemoteTier
from sllm_node.store.residency import Residency
from sllm_node.store.residents import Residents
from sllm_node.store.tiers import DeviceTiers
from sllm_node.store.waiting import Waiting

log = logging.getLogger(__name__)

READS_PER_THREAD = 2
"""Reads under way for each reader thread: one at the disk and one queued behind it."""


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
        self.on_load: Callable[[LoadReport], None] = lambda report: None
        self._catalog = catalog
        self._config = config
        self._clock = clock
        self._remote = remote
        self._files = files or (file_system(config) if remote is None else remote.files)
        self._ledger = Residency(config.pool_bytes // config.chunk_bytes)
        self._tiers = DeviceTiers(devices, config)
        self._waiting = Waiting(config.max_concurrent_loads, self._ledger)
        self._observed = Observed(metrics, self._ledger)
        self._residents = Residents(self._tiers)
        self._flights = Flights(self._residents, self._waiting, self._observed)
        self._evictions = Evictions(
            self._ledger, self._tiers, self._residents, self._flights, self._waiting, self._observed
        )
        self._lender = Lender(self._ledger, self._waiting, self._observed)
        self._machinery: Machinery | None = None

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the pinned pool, start reader threads, open the links to the devices.

        Raises:
            DeviceError: the system refuses the pool, or a device has no room for weights.
            DeviceMemoryError: a device has no room for a relay's staging memory.
        """
        loop, config = asyncio.get_running_loop(), self._config
        readers = ThreadPoolExecutor(config.reader_threads, "sllm-read")
        checkers = ThreadPoolExecutor(config.reader_threads, "sllm-check")
        with ExitStack() as undo:
            undo.callback(readers.shutdown, wait=False)
            undo.callback(checkers.shutdown, wait=False)
            pool = await take_pool(readers, self._tiers.first, config)
            undo.callback(pool.close)
            await self._tiers.open(readers)
            undo.pop_all()
        self._observed.watch(tuple(self._tiers))
        self._machinery = Machinery(
            loop=loop, clock=self._clock, pool=pool, ledger=self._ledger,
            readers=readers, checkers=checkers, files=self._files,
            verify=config.verify, verify_on_device=config.verify_on_device,
            max_reads=READS_PER_THREAD * config.reader_threads,
            wait_for_chunk=self._waiting.wait_for_chunk, chunk_given_back=self._waiting.wake_one,
            on_eviction=self._observed.gave_way, on_ended=self._on_ended,
        )  # fmt: skip
        self._observed.show()

    def add_device(self, device: Device) -> None:
        """Take one more device in; its link is its own only."""
        assert self._machinery is not None, "the store is not started"
        self._tiers.add(device)
        self._observed.watch(tuple(self._tiers))

    def lend_links(self, is_busy: Callable[[str], bool]) -> None:
        """Let `is_busy(device)` say when a device's link must not serve its siblings."""
        self._tiers.lend_links(is_busy)

    async def close(self) -> None:
        """Cancel what is under way, wait for it, give all memory back.

        Raises:
            ModelBusyError: a lease is still out; its device memory alone is not given back.
        """
        if self._machinery is None:
            return
        self._waiting.close()
        await self._flights.close()
        self._evictions.unpin_devices()
        leased = [*self._flights.remnants]
        for model, placement, resident in self._residents.all():
            if resident.leases:
                leased.append(model)
            else:
                self.evict(model, Tier.DEVICE, "shutdown", placement)
        machinery, self._machinery = self._machinery, None
        machinery.readers.shutdown(wait=True)
        machinery.checkers.shutdown(wait=True)
        self._tiers.close()
        machinery.pool.close()
        if leased:
            raise ModelBusyError(leased[0], "is in use while the store closes")

    # --- what is where ------------------------------------------------------------------------

    def is_on_device(self, model: ModelId) -> bool:
        """Tell whether all of `model` is on a device, or on several together."""
        return bool(self._residents.of(model))

    def residency(self, model: ModelId) -> dict[Tier, int]:
        """Return the bytes of `model` on each tier, as they lie there: decoded on DEVICE only."""
        opened = self._evictions.opened.get(model) or self._catalog.get(model)
        size, file_size = opened.index.size, opened.index.file_size
        cached = sum(self._tiers.bytes_of(model).values())
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
        return self._tiers.bytes_of(model)

    def leases(self, model: ModelId) -> int:
        """Return how many hold `model` on devices."""
        return self._residents.leases(model)

    def progress(self, model: ModelId) -> LoadProgress | None:
        """Return how far the load of `model` is, if one is under way."""
        return self._flights.progress(model)

    def bandwidth(self, tier: Tier) -> float | None:
        """Return the bytes/s observed of loads from `tier`; None before the first."""
        return self._observed.bandwidth.get(tier)

    def capacity(self, device: str) -> int:
        """Return the bytes of a device that models and their KV memory may share."""
        return self._tiers[device].capacity

    def capacities(self) -> dict[str, int]:
        """Return the capacity of every device."""
        return self._tiers.capacities()

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
        name = device or self._tiers.first.name
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
        placement = self.whole(model) if placement is None else placement
        while True:
            if (remnant := self._flights.remnants.get(model)) is not None:
                await asyncio.shield(remnant.returned)
                continue
            if (resident := self._residents.of(model).get(placement)) is not None:
                resident.leases += 1
                if self._ledger.knows(model):
                    self._ledger.touch(model)
                return resident.lease(None)
            load = self._flights.loads.get(model)
            if load is None:
                load = self._begin(model, asked, placement)
            if load.is_ending or load.placement != placement:
                await asyncio.shield(load.ended)
                continue
            report = await self._flights.wait(load, early=early)
            if report is None:
                return self._flights.lend(load)
            return self._residents.of(model)[placement].lease(report)

    def hand_over(self, lease: Lease) -> tuple[LeasedPart, ...]:
        """Let the only holder own the device memory of its lease, which the store forgets.

        Who owns it may write to it, and gives it back by closing the buffers, from any thread.

        Raises:
            ModelBusyError: somebody else holds it as well.
        """
        self._residents.hand_over(lease)
        self._observed.show()
        return lease.parts

    async def prefetch(self, model: ModelId) -> None:
        """Bring into DRAM what of `model` fits there and isn't there yet.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            CheckpointError: its files are damaged, changed or unreadable.
        """
        while (load := self._flights.loads.get(model)) is not None and (
            load.is_ending or load.is_onto_device
        ):
            # Not as one of its waiters: it ends when nobody wants the model on the device any more.
            result = await asyncio.shield(load.ended)
            if not isinstance(result, LoadCancelledError):
                report_of(model, result)
                return
        if load is None:
            load = self._begin(model, self._clock.now(), ())
        await self._flights.wait(load)

    async def allocate(
        self, device: str, size: int, again: DeviceRange | None = None
    ) -> DeviceRange:
        """Take device memory for something that is no checkpoint; caches give way to it.

        `again`: an earlier result of that size, all of whose pieces were unmapped since: it gets
        memory at its old addresses. Without room it is closed.

        Raises:
            DeviceMemoryError: there is no room.
        """
        place = await self._tiers.allocate(device, size, again)
        self._observed.show()
        return place

    async def begun(self, model: ModelId) -> float | None:
        """Wait until a load of `model` has issued its first read or copy; return when that was.

        None: there is none onto devices, or it waits behind others, or for a prefetch of the model.
        """
        return await self._flights.begun(model)

    async def settled(self, model: ModelId) -> None:
        """Wait until no load of `model` onto devices is under way.

        A cancelled one holds memory to its end; a prefetch holds none.
        """
        await self._flights.settled(model)

    def _begin(self, model: ModelId, asked: float, placement: Placement) -> Load:
        if self._waiting.is_closed:
            raise LoadFailedError(model, "the store is closing")
        assert self._machinery is not None, "the store is not started"
        checkpoint = self._catalog.get(model)
        self._evictions.know(checkpoint, self._config.chunk_bytes)
        targets = self._tiers.targets(checkpoint, placement)
        source = self._residents.source(model, placement)
        machinery = self._machinery
        if checkpoint.remote is not None and self._remote is not None:
            machinery = replace(machinery, readers=self._remote.readers)
        load = Load(checkpoint, targets, source, machinery, asked)
        is_warm = self._ledger.bytes_of(model) == checkpoint.index.file_size or source is not None
        self._flights.begin(load, is_warm=is_warm)
        return load

    def _on_ended(self, load: Load, result: LoadReport | BaseException) -> None:
        """A load is over: let the next one begin."""
        self._flights.ended(load, result)
        self._waiting.start_next()
        self._observed.show()
        if isinstance(result, LoadReport):
            self.on_load(result)

    # --- chunks -------------------------------------------------------------------------------

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk of the pinned pool."""
        return self._config.chunk_bytes

    def lend(self, count: int) -> Loan | None:
        """Lend `count` chunks of the pinned pool for something that is no checkpoint; None: there is no room.

        Who waits for a chunk to load goes first.
        """
        assert self._machinery is not None, "the store is not started"
        return self._lender.lend(count, self._machinery.pool)

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
        assert tier in (Tier.DEVICE, Tier.DRAM), "from NVMe it is removed through the catalogue"
        if tier is Tier.DEVICE:
            self._evictions.from_devices(model, reason, placement)
        else:
            self._evictions.from_dram(model, reason)
        self._observed.show()

    def pin(self, model: ModelId, tier: Tier) -> None:
        """Never evict `model` from `tier` (DEVICE or DRAM) until it is unpinned.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        self._catalog.get(model)
        self._evictions.pin(model, tier)

    def unpin(self, model: ModelId, tier: Tier) -> None:
        """Let `model` be evicted from `tier` again."""
        self._evictions.unpin(model, tier)

    def forget(self, model: ModelId) -> None:
        """Drop what is known of a checkpoint that was removed; a load under way keeps its own.

        Device memory and addresses that somebody holds are freed when they are evicted.
        """
        self._evictions.forget(model)
        self._observed.show()
