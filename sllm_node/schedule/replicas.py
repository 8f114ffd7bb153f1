"""Carries out loads and evictions: store, skeleton, codec and engine brought together per model.

With `overlap` a replica opens while its weights are still on their way: it is told of as `opened`,
and as loaded when they are all there. A load that fails then closes it first.

One task a model at most: a load or an eviction. Its end, however it comes, is handled in one place
(`_load_ended`, `_eviction_ended`), also when it was cancelled before its first step. An error that
nobody foresaw is logged here, once, and becomes a LoadFailedError for those who wait.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeGuard

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.errors import CheckpointChangedError, SllmError
from sllm_node.core.types import ModelId, Part, Placement, Tier
from sllm_node.schedule.beginnings import Beginnings
from sllm_node.schedule.causes import explain, foremost
from sllm_node.schedule.codecs import CodecCache
from sllm_node.schedule.ports import CodecT, Engines, Replica, WeightLease, WeightStore

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told how loads and evictions end."""

    def on_opened(self, model: ModelId, replica: Replica) -> None:
        """Sessions may begin on `replica`, which is still loading."""

    def on_closing(self, model: ModelId) -> None:
        """It will not be loaded after all: the end of the load follows."""

    def on_loaded(self, model: ModelId) -> None: ...

    def on_load_failed(self, model: ModelId, error: SllmError) -> None: ...

    def on_evicted(self, model: ModelId) -> None: ...


@dataclass(frozen=True, slots=True)
class Hosted:
    """A replica and the lease it stands on."""

    replica: Replica
    lease: WeightLease
    opened: float
    """When sessions could begin."""
    begun: float = 0.0
    """When its load began."""
    elapsed_s: float = 0.0
    """From the start of its load until all of it was there."""
    was_kept: bool = False
    """Its module was there from an earlier replica."""
    was_alone: bool = True
    """No other load was under way meanwhile, and it waited for none."""

    @property
    def load(self) -> tuple[float, float]:
        """Return when its load began and ended."""
        return self.begun, self.begun + self.elapsed_s


@dataclass(frozen=True, slots=True)
class _Parts(Generic[CodecT]):
    """What a replica is made of."""

    lease: WeightLease
    skeleton: Any
    codec: CodecT


class Replicas(Generic[CodecT]):
    """The replicas on the device, and the tasks that bring and remove them."""

    def __init__(
        self,
        catalog: Catalog,
        store: WeightStore,
        engines: Engines[CodecT],
        clock: Clock,
        *,
        overlap: bool,
    ) -> None:
        self.beginnings = Beginnings()
        self.codecs = CodecCache(self._load_codec)
        self._catalog = catalog
        self._store = store
        self._engines = engines
        self._clock = clock
        self._overlap = overlap
        self._hosted: dict[ModelId, Hosted] = {}
        self._loads: dict[ModelId, asyncio.Task[Hosted]] = {}
        self._evictions: dict[ModelId, asyncio.Task[None]] = {}
        self._aborted: set[ModelId] = set()
        self._beside: set[ModelId] = set()
        """Models whose loads have had others beside them or before them."""
        self._brought: set[ModelId] = set()
        """Models that something may be kept of."""
        self._begun_s: dict[ModelId, float] = {}
        """Of loads under way: from the decision until the first read or copy."""
        self._is_closing = False

    def get(self, model: ModelId) -> Hosted | None:
        """Return the replica of `model` if it can serve."""
        return self._hosted.get(model)

    def start_load(self, model: ModelId, devices: tuple[str, ...], listener: Listener) -> None:
        """Begin to bring `model` to its devices."""
        assert model not in self._loads
        now = self._clock.now()
        log.info("load started", extra={"model": model, "devices": list(devices)})
        self.beginnings.add(("load", model))
        task = asyncio.create_task(
            self._bring_up(model, devices, now, listener), name=f"load {model}"
        )
        if self._loads:
            self._beside |= {model, *self._loads}
        self._loads[model] = task
        self._brought.add(model)
        task.add_done_callback(partial(self._load_ended, model, listener, now))

    def abort_load(self, model: ModelId) -> None:
        """Stop the load under way; the listener hears on_evicted when all is given back."""
        self._aborted.add(model)
        self._loads[model].cancel()

    def forget_removed(self, present: Collection[ModelId]) -> None:
        """Drop what is kept of models that are not `present` any more and that nobody uses."""
        used = self._hosted.keys() | self._loads.keys() | self._evictions.keys()
        for model in self._brought - used - set(present):
            self._brought.discard(model)
            self._store.forget(model)
            self._engines.forget(model)

    def start_eviction(self, model: ModelId, reason: str, listener: Listener) -> None:
        """Begin to take the replica of `model` down."""
        self._evict(model, self._hosted.pop(model), reason, listener)

    async def close(self) -> None:
        """Stop loads, finish evictions, take all replicas down; nobody is told."""
        self._is_closing = True
        for load in self._loads.values():
            load.cancel()
        await asyncio.gather(
            *self._loads.values(), *self._evictions.values(), return_exceptions=True
        )
        await self.codecs.close()
        hosted = list(self._hosted.items())
        self._hosted.clear()
        for model, one in hosted:
            await self._take_down(model, one, "shutdown")
            log.info("evicted", extra={"model": model, "reason": "shutdown"})

    # --- loads --------------------------------------------------------------------------------

    async def _bring_up(
        self, model: ModelId, devices: tuple[str, ...], started: float, listener: Listener
    ) -> Hosted:
        checkpoint = self._catalog.get(model)
        was_kept = self._engines.is_kept(checkpoint)
        parts = await self._parts(checkpoint, self._placement(checkpoint, devices), started)
        lease, replica = parts.lease, None
        try:
            try:
                _check_same(checkpoint, lease.checkpoint)
            except CheckpointChangedError:
                self._engines.give_back(checkpoint, parts.skeleton)  # with the addresses it keeps
                raise
            replica = await self._engines.open(lease, parts.skeleton, parts.codec)
            opened = self._clock.now()
            if lease.arrival is not None:
                listener.on_opened(model, replica)
                await lease.loaded()
                replica.loaded()
        except BaseException:
            listener.on_closing(model)
            await _to_its_end(self._undo(model, lease, replica))
            raise
        elapsed_s = self._clock.now() - started
        was_alone = model not in self._beside
        return Hosted(replica, lease, opened, started, elapsed_s, was_kept, was_alone)

    async def _undo(self, model: ModelId, lease: WeightLease, replica: Replica | None) -> None:
        """Give everything back that a load has brought so far; its memory is free then."""
        if replica is not None:
            await self._close(model, replica)
        lease.release()
        await self._store.settled(model)
        self._store.evict(model, Tier.DEVICE, "failed")

    def _placement(self, checkpoint: Checkpoint, devices: tuple[str, ...]) -> Placement:
        shares = self._engines.shares(checkpoint)
        if len(shares) != len(devices):
            shard = checkpoint.index.shards[0].name
            raise CheckpointChangedError(checkpoint.model, shard, "was replaced")
        return tuple(
            Part(device, share.start, share.end)
            for device, share in zip(devices, shares, strict=True)
        )

    async def _parts(
        self, checkpoint: Checkpoint, placement: Placement, started: float
    ) -> _Parts[CodecT]:
        """Bring weights, module and codec at the same time."""
        model = checkpoint.model
        acquiring: asyncio.Task[WeightLease] | None = None
        skeleton: asyncio.Task[Any] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                acquiring = group.create_task(self._acquire(model, placement))
                group.create_task(self._begin(model, started))
                skeleton = group.create_task(self._skeleton(checkpoint))
                codec = group.create_task(self.codecs.get(checkpoint))
        except BaseException as error:
            if _succeeded(skeleton):
                self._engines.give_back(checkpoint, skeleton.result())
            if _succeeded(acquiring):
                await _to_its_end(self._undo(model, acquiring.result(), None))
            if isinstance(error, BaseExceptionGroup):
                raise foremost(error) from None
            raise
        return _Parts(acquiring.result(), skeleton.result(), codec.result())

    async def _begin(self, model: ModelId, started: float) -> None:
        """Wait until bytes move; the store knows of the load by now."""
        begun = await self._store.begun(model)
        if begun is None:  # it waits behind others
            self._beside.add(model)
        begun_s = (self._clock.now() if begun is None else begun) - started
        self._begun_s[model] = max(0.0, begun_s)
        self.beginnings.discard(("load", model))

    async def _skeleton(self, checkpoint: Checkpoint) -> Any:
        if not self._engines.is_kept(checkpoint):
            await self.beginnings.over()
        return await self._engines.skeleton(checkpoint)

    async def _load_codec(self, directory: Path) -> CodecT:
        await self.beginnings.over()
        return await self._engines.load_codec(directory)

    async def _acquire(self, model: ModelId, placement: Placement) -> WeightLease:
        try:
            return await self._store.acquire(model, placement, early=self._overlap)
        except asyncio.CancelledError:
            await self._store.settled(model)  # nobody may be promised its memory before
            # A load that ended in the moment of the cancellation has left the weights there.
            self._store.evict(model, Tier.DEVICE, "aborted")
            raise

    def _load_ended(
        self, model: ModelId, listener: Listener, started: float, task: asyncio.Task[Hosted]
    ) -> None:
        del self._loads[model]
        self._beside.discard(model)
        self.beginnings.discard(("load", model))
        is_aborted = model in self._aborted
        self._aborted.discard(model)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._arrived(model, task.result(), self._clock.now() - started)
        self._begun_s.pop(model, None)
        if self._is_closing:
            return
        if is_aborted:
            self._abort_ended(model, listener)
        elif error is None:
            listener.on_loaded(model)
        else:
            listener.on_load_failed(model, explain(self._catalog, model, error))

    def _arrived(self, model: ModelId, hosted: Hosted, elapsed_s: float) -> None:
        self._hosted[model] = hosted
        early_s = self._clock.now() - hosted.opened
        fields: dict[str, object] = {
            "model": model,
            "elapsed_s": round(elapsed_s, 4),
            "opened_s": round(elapsed_s - early_s, 4),
        }
        checkpoint, report = hosted.lease.checkpoint, hosted.lease.report
        limit = self._engines.context_limit(checkpoint)
        if limit < checkpoint.index.context_tokens:
            fields["context_tokens"] = limit
            fields["limited_by"] = "engine.kv_cache_bytes"
        if report is not None:
            fields |= {
                "begun_s": round(self._begun_s[model], 5),
                "weights_s": round(report.elapsed_s, 4),
                "bytes_total": report.bytes_total,
                "bytes_from_nvme": report.bytes_from_nvme,
                "bytes_from_dram": report.bytes_from_dram,
                "bytes_from_sibling": report.bytes_from_sibling,
                "bytes_kept": report.bytes_kept,
                "bytes_from_remote": report.bytes_from_remote,
                "bytes_stored": report.bytes_stored,
                "verified_bytes": report.verified_bytes,
                "decode_s": round(report.decode_s, 4),
            }
        log.info("load finished", extra=fields)

    def _abort_ended(self, model: ModelId, listener: Listener) -> None:
        log.info("load aborted", extra={"model": model})
        if model in self._hosted:  # it had just come
            listener.on_closing(model)  # who comes before it closes begins nothing on it
            self.start_eviction(model, "aborted", listener)
        else:
            listener.on_evicted(model)

    # --- evictions ----------------------------------------------------------------------------

    def _evict(self, model: ModelId, hosted: Hosted, reason: str, listener: Listener) -> None:
        assert model not in self._evictions
        if reason == "room":  # for a load that is to begin
            self.beginnings.add(("eviction", model))
        task = asyncio.create_task(self._take_down(model, hosted, reason), name=f"evict {model}")
        self._evictions[model] = task
        task.add_done_callback(partial(self._eviction_ended, model, reason, listener))

    async def _take_down(self, model: ModelId, hosted: Hosted, reason: str) -> None:
        await self._close(model, hosted.replica)
        self._give_back(model, hosted.lease, reason)

    async def _close(self, model: ModelId, replica: Replica) -> None:
        try:
            await replica.close()
        except Exception:
            log.exception("engine did not close well", extra={"model": model})

    def _eviction_ended(
        self, model: ModelId, reason: str, listener: Listener, task: asyncio.Task[None]
    ) -> None:
        del self._evictions[model]
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            # The scheduler is told all the same: what the memory lacks, the next load will say.
            log.error("eviction failed", extra={"model": model}, exc_info=error)
        if not self._is_closing:
            listener.on_evicted(model)
        self.beginnings.discard(("eviction", model))
        if error is None:
            log.info("evicted", extra={"model": model, "reason": reason})  # no load waits for that

    def _give_back(self, model: ModelId, lease: WeightLease, reason: str) -> None:
        lease.release()
        self._store.evict(model, Tier.DEVICE, reason)
        if reason == "replaced":
            self._store.forget(model)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` although who waits for it may be cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)


def _check_same(planned: Checkpoint, loaded: Checkpoint) -> None:
    """Refuse weights of another conversion than skeleton and codec."""
    if planned.identities != loaded.identities:
        raise CheckpointChangedError(planned.model, planned.index.shards[0].name, "was replaced")


def _succeeded(task: asyncio.Task[Any] | None) -> TypeGuard[asyncio.Task[Any]]:
    """Tell whether `task`, which has ended if it began, has a result."""
    return task is not None and not task.cancelled() and task.exception() is None
