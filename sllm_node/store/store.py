"""Which checkpoint is on which tier, and the way up: `acquire` gives a lease on the device.

Everything here runs on the event loop. One load per model is under way at a time (single flight):
whoever else wants the model waits for it. A caller that is cancelled leaves the others waiting; the
last one takes the load with it. A model stays on the device when its last lease is given back, until
`evict`; what of it is in DRAM stays until another load needs the chunks.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import LoadFailedError, ModelBusyError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadProgress, LoadReport, ModelId, Tier
from sllm_node.device.base import Device
from sllm_node.store.lease import Lease, Resident
from sllm_node.store.loader import Load, Machinery
from sllm_node.store.observed import Observed
from sllm_node.store.pool import PinnedPool
from sllm_node.store.reader import DirectFileSystem, FileSystem
from sllm_node.store.remote import RemoteTier
from sllm_node.store.residency import Residency, units_of

log = logging.getLogger(__name__)

READS_PER_THREAD = 2
"""Reads under way for each reader thread: one at the disk and one queued behind it."""


class Store:
    """The tiers of one node with one device."""

    def __init__(  # noqa: PLR0913 - what the node is made of, each once
        self,
        catalog: Catalog,
        device: Device,
        config: StoreConfig,
        clock: Clock,
        metrics: Metrics,
        *,
        files: FileSystem | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        self.on_load: Callable[[LoadReport], None] = lambda report: None
        self._catalog = catalog
        self._device = device
        self._config = config
        self._clock = clock
        self._remote = remote
        self._files = files or (
            DirectFileSystem(direct=config.direct_io) if remote is None else remote.files
        )
        self._ledger = Residency(config.pool_bytes // config.chunk_bytes)
        self._opened: dict[ModelId, Checkpoint] = {}
        """What the ledger's rows were made of."""
        self._residents: dict[ModelId, Resident] = {}
        self._loads: dict[ModelId, Load] = {}
        self._waiters: dict[ModelId, int] = {}
        self._slot_queue: deque[Load] = deque()
        self._active = 0
        self._chunk_queue: deque[Load] = deque()
        self._pins: dict[Tier, set[ModelId]] = {Tier.DEVICE: set(), Tier.DRAM: set()}
        self._observed = Observed(metrics, self._ledger, device)
        self._is_closing = False
        self._machinery: Machinery | None = None

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the pinned pool, start reader threads and the copy stream.

        Raises:
            DeviceError: the system refuses the pool.
        """
        loop = asyncio.get_running_loop()
        config = self._config
        readers = ThreadPoolExecutor(config.reader_threads, "sllm-read")
        checkers = ThreadPoolExecutor(config.reader_threads, "sllm-check")
        pool = await loop.run_in_executor(readers, self._take_pool)
        self._machinery = Machinery(
            loop=loop,
            clock=self._clock,
            pool=pool,
            ledger=self._ledger,
            readers=readers,
            checkers=checkers,
            stream=self._device.stream(),
            files=self._files,
            verify=config.verify,
            max_reads=READS_PER_THREAD * config.reader_threads,
            wait_for_chunk=self._wait_for_chunk,
            chunk_given_back=self._wake_one,
            on_eviction=self._observed.gave_way,
            on_ended=self._on_ended,
        )
        self._observed.show()

    def _take_pool(self) -> PinnedPool:
        config = self._config
        return PinnedPool(
            self._device, config.pool_bytes, config.chunk_bytes, huge_pages=config.huge_pages
        )

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
        leased = [model for model in self._residents if self.leases(model)]
        for model in self._residents.keys() - leased:
            self.evict(model, Tier.DEVICE, "shutdown")
        machinery, self._machinery = self._machinery, None
        machinery.readers.shutdown(wait=True)
        machinery.checkers.shutdown(wait=True)
        machinery.stream.close()
        machinery.pool.close()
        if leased:
            raise ModelBusyError(leased[0], "is in use while the store closes")

    # --- what is where ------------------------------------------------------------------------

    def is_on_device(self, model: ModelId) -> bool:
        """Tell whether all of `model` is on the device."""
        return model in self._residents

    def residency(self, model: ModelId) -> dict[Tier, int]:
        """Return the bytes of `model` on each tier; NVME has what the catalogue has."""
        resident = self._residents.get(model)
        opened = self._opened.get(model) or self._catalog.get(model)
        found = {
            Tier.DEVICE: resident.checkpoint.index.size if resident else 0,
            Tier.DRAM: self._ledger.bytes_of(model),
            Tier.NVME: opened.index.size,
        }
        come = None if self._remote is None else self._remote.bytes_come(model)
        if come is not None:
            found[Tier.NVME], found[Tier.REMOTE] = come, opened.index.size
        return found

    def leases(self, model: ModelId) -> int:
        """Return how many hold `model` on the device."""
        resident = self._residents.get(model)
        return resident.leases if resident else 0

    def progress(self, model: ModelId) -> LoadProgress | None:
        """Return how far the load of `model` is, if one is under way."""
        load = self._loads.get(model)
        return load.progress() if load else None

    def bandwidth(self, tier: Tier) -> float | None:
        """Return the bytes/s observed of loads from `tier`; None before the first."""
        return self._observed.bandwidth.get(tier)

    def device_free(self) -> int:
        """Return the bytes of device memory that are not allocated."""
        return self._device.memory_total - self._device.memory_used

    @property
    def pool_chunks(self) -> int:
        """Chunks of the pinned pool."""
        return self._ledger.chunks

    @property
    def pool_chunks_used(self) -> int:
        """Chunks that hold or await bytes."""
        return self._ledger.chunks - self._ledger.free

    # --- the way up ---------------------------------------------------------------------------

    async def acquire(self, model: ModelId) -> Lease:
        """Return a lease on `model`, loading it onto the device if it is not there.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            CheckpointError: its files are damaged, changed or unreadable.
            DeviceMemoryError: no room on the device.
            PoolExhaustedError: no chunk of the pool can be freed.
        """
        asked = self._clock.now()
        while True:
            resident = self._residents.get(model)
            if resident is not None:
                resident.leases += 1
                if self._ledger.knows(model):
                    self._ledger.touch(model)
                return resident.lease(None)
            load = self._loads.get(model)
            if load is None:
                load = self._begin(model, asked, onto_device=True)
            if load.is_ending or load.buffer is None:
                await asyncio.shield(load.ended)
                continue
            report = await self._wait(load)
            return self._residents[model].lease(report)

    async def prefetch(self, model: ModelId) -> None:
        """Bring into DRAM what of `model` fits there and isn't there yet.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            CheckpointError: its files are damaged, changed or unreadable.
        """
        while (load := self._loads.get(model)) is not None and load.is_ending:
            await asyncio.shield(load.ended)
        if load is None:
            load = self._begin(model, self._clock.now(), onto_device=False)
        await self._wait(load)
        if load.buffer is not None:
            self._residents[model].give_back()

    async def settled(self, model: ModelId) -> None:
        """Wait until no load of `model` is under way: a cancelled one holds memory to its end."""
        while (load := self._loads.get(model)) is not None:
            await asyncio.shield(load.ended)

    async def _wait(self, load: Load) -> LoadReport:
        """Wait for `load`; if it was one onto the device, a lease has been counted for us."""
        model = load.model
        self._waiters[model] = self._waiters.get(model, 0) + 1
        try:
            result = await asyncio.shield(load.ended)
        except asyncio.CancelledError:
            self._leave(load)
            raise
        if isinstance(result, SllmError):
            raise result
        if isinstance(result, BaseException):
            raise LoadFailedError(model, str(result) or type(result).__name__) from result
        return result

    def _leave(self, load: Load) -> None:
        """A waiter was cancelled; the last one cancels the load."""
        if load.ended.done():
            resident = self._residents.get(load.model)
            if resident is not None and resident.buffer is load.buffer:
                resident.give_back()
            return
        self._waiters[load.model] -= 1
        if not self._waiters[load.model]:
            self._cancel(load)

    def _begin(self, model: ModelId, asked: float, *, onto_device: bool) -> Load:
        assert self._machinery is not None, "the store is not started"
        if self._is_closing:
            raise LoadFailedError(model, "the store is closing")
        checkpoint = self._catalog.get(model)
        self._know(checkpoint)
        buffer = self._device.allocate(checkpoint.index.size) if onto_device else None
        machinery = self._machinery
        if checkpoint.remote is not None and self._remote is not None:
            machinery = replace(machinery, readers=self._remote.readers)
        load = Load(checkpoint, buffer, machinery, asked)
        self._loads[model] = load
        self._waiters[model] = 0
        self._observed.show()
        is_warm = self._ledger.bytes_of(model) == checkpoint.index.size
        if is_warm or self._active < self._config.max_concurrent_loads:
            # A warm load needs neither disk nor chunks: it never waits for others.
            self._active += 1
            load.start()
        else:
            self._slot_queue.append(load)
        return load

    def _know(self, checkpoint: Checkpoint) -> None:
        """Open the ledger's row of `checkpoint`; another checkpoint of that name is forgotten."""
        model = checkpoint.model
        if self._opened.get(model) is checkpoint:
            return
        if self._opened.get(model) != checkpoint:
            units = units_of(checkpoint.index, self._config.chunk_bytes)
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
        if isinstance(result, LoadReport):
            if load.buffer is not None:
                self._residents[model] = Resident(load.checkpoint, load.buffer, waiters)
            self._observed.succeeded(load, result)
        else:
            self._observed.failed(load, result)
        self._start_next()
        self._observed.show()
        if isinstance(result, LoadReport):
            self.on_load(result)

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

    # --- the way down -------------------------------------------------------------------------

    def evict(self, model: ModelId, tier: Tier, reason: str) -> None:
        """Give up what `tier` (DEVICE or DRAM) has of `model`; without it, do nothing.

        Raises:
            ModelBusyError: it is leased, pinned or loading there.
        """
        assert tier in (Tier.DEVICE, Tier.DRAM), (
            "a checkpoint is removed from NVMe through the catalogue"
        )
        if tier is Tier.DEVICE:
            self._evict_from_device(model, reason)
        elif self._ledger.knows(model):
            self._evict_from_dram(model, reason)
        self._observed.show()

    def _evict_from_device(self, model: ModelId, reason: str) -> None:
        resident = self._residents.get(model)
        if resident is None:
            return
        if resident.leases:
            raise ModelBusyError(model, f"is in use on the device ({resident.leases} leases)")
        if model in self._pins[Tier.DEVICE]:
            raise ModelBusyError(model, "is pinned on the device")
        resident.buffer.close()
        del self._residents[model]
        self._observed.evicted(Tier.DEVICE, reason)

    def _evict_from_dram(self, model: ModelId, reason: str) -> None:
        if model in self._loads:
            raise ModelBusyError(model, "is loading")
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
        """Drop what DRAM has of a checkpoint that was removed; a load under way keeps its own."""
        if model not in self._loads and self._ledger.knows(model):
            self._ledger.close(model)
            del self._opened[model]
            self._wake_one()
            self._observed.show()
