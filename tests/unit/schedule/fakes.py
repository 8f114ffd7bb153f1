"""Store and engines that take virtual time and keep count of what they hold."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.checkpoint.index import (
    INDEX_FILE,
    VERSION,
    Shard,
    TensorEntry,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.core.config import Config, DeviceConfig, EngineConfig, ScheduleConfig
from sllm_node.core.errors import DeviceMemoryError, EngineError, PromptTooLongError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    LoadReport,
    ModelId,
    SamplingParameters,
    SessionId,
    Share,
    Tier,
)
from sllm_node.core.units import PAGE
from sllm_node.engine.refusals import ended_by_room
from sllm_node.schedule.driver import Service
from tests.sim.loop import LoopClock

LOAD_S = 2.0
EVICTION_S = 0.5
STEP_S = 0.1
CONTEXT_TOKENS = 1 << 13
CANCEL_S = 0.3
"""How long a cancelled load holds its memory."""


def write_checkpoint(root: Path, name: str, pages: int = 1, *, digest: int = 0) -> None:
    """Write the smallest thing that the catalogue takes for a checkpoint; `digest`: of its chunks."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    shard = Shard(shard_name(0), pages * PAGE, (digest,) * pages)
    tensor = TensorEntry("weight", "F32", (4,), 0, 0, 16)
    index = TensorIndex(VERSION, name, "Fake", "F32", CONTEXT_TOKENS, PAGE, 7, (shard,), (tensor,))
    (folder / shard.name).write_bytes(bytes(shard.size))
    (folder / INDEX_FILE).write_bytes(to_json(index))


class FakeLease:
    """Early while its model is loading."""

    def __init__(self, store: "FakeStore", checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.arrival = object() if checkpoint.model in store.loading else None
        size = checkpoint.index.size
        self.report = LoadReport(checkpoint.model, size, size, 0, 0, 0, 0, LOAD_S, 0.0, size)
        self._store = store

    @property
    def parts(self):
        raise NotImplementedError

    async def loaded(self):
        if self.arrival is not None:
            await self._store.bring(self.checkpoint.model, LOAD_S - (self._store.early_s or 0))

    def release(self):
        model = self.checkpoint.model
        self._store.leased.discard(model)
        if model in self._store.loading:
            asyncio.get_running_loop().call_later(CANCEL_S, self._store.wind_down, model)


class FakeStore:
    def __init__(self, catalog: Catalog, room: int):
        self.catalog = catalog
        self.room = room
        self.loading: set[ModelId] = set()
        self.wound_down = asyncio.Event()
        self.loads: list[ModelId] = []
        self.leased: set[ModelId] = set()
        self.on_device: set[ModelId] = set()
        self.evicted: list[tuple[ModelId, str]] = []
        self.forgotten: list[ModelId] = []
        self.error: BaseException | None = None
        self.on_acquired = lambda: None
        self.begin_s = 0.0
        self.early_s: float | None = None
        """When early leases are given; None: at the end of the load."""

    def capacities(self):
        return {"cpu": self.room * PAGE}

    async def acquire(self, model, placement, *, early):
        (part,) = placement
        assert (part.device, part.start, part.end) == ("cpu", 0, PAGE)
        self.loads.append(model)
        if len(self.on_device | self.loading) >= self.room:
            raise DeviceMemoryError("cpu", PAGE, 0, self.room * PAGE)
        self.loading.add(model)
        try:
            if early and self.early_s is not None:
                await asyncio.sleep(self.early_s)
                self.leased.add(model)
                return FakeLease(self, self.catalog.get(model))
            await self.bring(model, LOAD_S)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(CANCEL_S, self.wind_down, model)
            raise
        self.leased.add(model)
        self.on_acquired()
        return FakeLease(self, self.catalog.get(model))

    async def bring(self, model, seconds):
        await asyncio.sleep(seconds)
        self.loading.remove(model)
        if self.error is not None:
            raise self.error
        self.on_device.add(model)

    def wind_down(self, model):
        self.loading.remove(model)
        self.wound_down.set()

    async def begun(self, model):
        await asyncio.sleep(self.begin_s)
        return asyncio.get_running_loop().time()

    async def settled(self, model):
        while model in self.loading:
            self.wound_down.clear()
            await self.wound_down.wait()

    def evict(self, model, tier, reason):
        assert tier is Tier.DEVICE
        assert model not in self.leased
        if model in self.on_device:
            self.on_device.remove(model)
            self.evicted.append((model, reason))

    def forget(self, model):
        self.forgotten.append(model)

    def residency(self, model):
        return {Tier.DEVICE: PAGE} if model in self.on_device else {}

    def progress(self, model):
        return None


class FakeGeneration:
    """`max_tokens` tokens, one a step; one that holds has computed at once what it knows."""

    def __init__(self, replica: "FakeReplica", request: GenerationRequest):
        self.replica = replica
        self.request = request
        self.made = len(request.resumed)
        self.is_cancelled = asyncio.Event()
        self.is_holding = request.held
        self.looked = asyncio.Event()

    async def standing(self, told):
        while self.is_holding and not self.is_cancelled.is_set():
            if self.made > told:
                return self.made
            self.looked.clear()
            await self.looked.wait()
        return None

    def extend(self, position, tokens, *, lets_go):
        assert position <= self.made
        self.made = max(self.made, position + len(tokens))
        self.is_holding = not lets_go
        self.looked.set()

    async def __anext__(self):
        while self.is_holding and not self.is_cancelled.is_set():
            self.looked.clear()
            await self.looked.wait()
        step = asyncio.ensure_future(asyncio.sleep(STEP_S * self.replica.engines.pace))
        cancelled = asyncio.ensure_future(self.is_cancelled.wait())
        await asyncio.wait([step, cancelled], return_when=asyncio.FIRST_COMPLETED)
        step.cancel()
        cancelled.cancel()
        if self.is_cancelled.is_set():
            raise StopAsyncIteration
        if self.replica.error is not None:
            raise self.replica.error
        self.made += 1
        is_last = self.made == self.request.max_tokens
        if is_last:
            self.replica.running.discard(self.request.session)
        return GenerationChunk("x", (self.made,), finish="length" if is_last else None)

    def cancel(self):
        self.is_cancelled.set()
        self.looked.set()
        self.replica.running.discard(self.request.session)


class FakeReplica:
    def __init__(self, engines: "FakeEngines"):
        self.engines = engines
        self.running: set[SessionId] = set()
        self.error: Exception | None = None
        self.is_closed = False
        self.is_loaded = False

    def loaded(self):
        self.is_loaded = True

    @property
    def kv_usage(self):
        return 0.25

    @property
    def stalled_s(self):
        return self.engines.stalled_s

    def submit(self, request):
        assert not self.is_closed
        if self.engines.submit_error is not None:
            raise self.engines.submit_error
        self.running.add(request.session)
        return FakeGeneration(self, ended_by_room(request, self.engines.capacity_tokens))

    async def close(self):
        assert not self.running
        await asyncio.sleep(EVICTION_S * self.engines.pace)
        self.is_closed = True
        if self.engines.close_error is not None:
            raise self.engines.close_error


class FakeEngines:
    def __init__(self):
        self.pace = 1.0
        """Of all durations: 0 where time is real."""
        self.replicas: dict[ModelId, FakeReplica] = {}
        self.codecs_read: list[str] = []
        self.building: list[tuple[ModelId, float]] = []
        self.reading: list[tuple[str, float]] = []
        """When modules and tokenizers were begun."""
        self.given_back: list[ModelId] = []
        self.forgotten: list[ModelId] = []
        self.codec_error: Exception | None = None
        self.open_error: Exception | None = None
        self.open_s = 0.0
        self.stalled_s: float | None = None
        self.capacity_tokens = 1 << 30
        self.told_tokens: int | None = None
        """What is said of it until a request is looked at; None: the truth."""
        self.submit_error: Exception | None = None
        self.close_error: Exception | None = None

    def shares(self, checkpoint):
        size = checkpoint.index.size
        return (Share(None, 0, size, size),)

    def context_limit(self, checkpoint):
        return self.told_tokens or min(self.capacity_tokens, checkpoint.index.context_tokens)

    def check_request(self, request, checkpoint):
        self.told_tokens = None
        limit = self.context_limit(checkpoint)
        if request.tokens_needed > limit:
            raise PromptTooLongError(request.tokens_needed, limit, "it")

    async def load_codec(self, directory):
        self.codecs_read.append(directory.name)
        self.reading.append((directory.name, asyncio.get_running_loop().time()))
        await asyncio.sleep(0.1 * self.pace)
        if self.codec_error is not None:
            raise self.codec_error
        return f"codec of {directory.name}"

    async def skeleton(self, checkpoint):
        self.building.append((checkpoint.model, asyncio.get_running_loop().time()))
        await asyncio.sleep(0.2 * self.pace)
        return object()

    def is_kept(self, checkpoint):
        return checkpoint.model in self.given_back

    def give_back(self, checkpoint, skeleton):
        self.given_back.append(checkpoint.model)

    def forget(self, model):
        self.forgotten.append(model)

    async def open(self, lease, skeleton, codec):
        assert codec == f"codec of {lease.checkpoint.model}"
        await asyncio.sleep(self.open_s)
        if self.open_error is not None:
            raise self.open_error
        replica = self.replicas[lease.checkpoint.model] = FakeReplica(self)
        return replica


@dataclass
class Node:
    """A service on fakes; room for one model unless told otherwise."""

    service: Service[str]
    store: Any
    engines: FakeEngines
    metrics: Metrics
    root: Path
    requests: int = 0

    def open(self, model, tokens=3, prompt=(1, 2), request=None, **options):
        self.requests += 1
        wish = GenerationRequest(
            SessionId(f"{request or f'r-{self.requests}'}-0"),
            ModelId(model),
            tuple(prompt),
            SamplingParameters(),
            tokens,
        )
        return self.service.open(wish, **options)

    async def ask(self, model, tokens=3, **options):
        """Run one session to its end; returns its text."""
        return "".join([chunk.text async for chunk in self.open(model, tokens, **options)])

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)

    def fail_replica(self, model, problem="broken"):
        self.engines.replicas[ModelId(model)].error = EngineError(model, problem)


def make_node(root: Path, names=("a", "b", "c"), pages=1, models=None, overlap=True, **schedule):
    """Make a node of checkpoints `names` with device memory of `pages`."""
    for name in names:
        write_checkpoint(root, name)
    catalog = Catalog(root)
    store, engines, metrics = FakeStore(catalog, pages), FakeEngines(), Metrics()
    config = Config(
        device=DeviceConfig(memory_bytes=pages * PAGE),
        engine=EngineConfig(overlap_load=overlap),
        schedule=ScheduleConfig(**schedule),
        models=models or {},
    )
    service = Service(config, catalog, store, engines, LoopClock(), metrics)
    return Node(service, store, engines, metrics, root)
