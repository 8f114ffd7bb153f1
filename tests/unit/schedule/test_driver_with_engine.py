"""The whole node below HTTP: tiny models, the real store and engine, more models than fit."""

import asyncio
import contextlib
import threading
from contextlib import asynccontextmanager

import pytest
from torch.nn.modules.module import register_module_forward_hook

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import (
    ByteSize,
    Config,
    DeviceConfig,
    EngineConfig,
    ScheduleConfig,
    StoreConfig,
)
from sllm_node.core.errors import CancelledByOperatorError, ChecksumError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    ModelState,
    SamplingParameters,
    SessionId,
)
from sllm_node.core.units import KIB, MIB
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.engines import Engines
from sllm_node.schedule.driver import Service
from sllm_node.store.reader import DirectFileSystem
from sllm_node.store.store import Store
from tests.models import make_checkpoint

FAMILIES = ("llama", "qwen3", "gpt2")
KV_BYTES = 512 * KIB


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    for family in FAMILIES:
        make_checkpoint(root, family, family)
    return root


@asynccontextmanager
async def node(root, room=2, files=None, **engine):
    """A service with room for `room` of the models; at the end nothing is held."""
    catalog, clock, metrics = Catalog(root), MonotonicClock(), Metrics()
    catalog.scan()
    largest = max(catalog.get(name).index.size for name in catalog.models())
    config = Config(
        store=StoreConfig(
            path=str(root),
            pool_bytes=ByteSize(2 * MIB),
            chunk_bytes=ByteSize(16 * KIB),
            read_block_bytes=ByteSize(4 * KIB),
            huge_pages=False,
        ),
        device=DeviceConfig(memory_bytes=ByteSize(room * (largest + KV_BYTES))),
        engine=EngineConfig(kv_cache_bytes=ByteSize(KV_BYTES), torch_threads=1, **engine),
        schedule=ScheduleConfig(max_wait_s=0.05),
    )
    device = CpuDevice(config.device.memory_bytes)
    store = Store(catalog, [device], config.store, clock, metrics, files=files)
    await store.start()
    engines = Engines([device], store, config.engine, clock, metrics)
    service = Service(config, catalog, store, engines, clock, metrics)
    try:
        async with asyncio.timeout(60):
            yield service
    finally:
        await service.close()
        engines.close()
        assert all(store.leases(model) == 0 for model in catalog.models())
        await store.close()
        assert device.memory_used == 0
        device.close()


def request(model, number, tokens=8):
    prompt = tuple(5 + (number * 7 + i) % 200 for i in range(4 + number % 5))
    return GenerationRequest(
        SessionId(f"r{number}-0"),
        ModelId(model),
        prompt,
        SamplingParameters(temperature=0.0),
        tokens,
        ignore_eos=True,
    )


async def generate(service, *wish):
    return [token async for chunk in service.open(request(*wish)) for token in chunk.tokens]


async def test_sessions_on_more_models_than_fit_say_what_they_say_alone(models):
    wishes = [(FAMILIES[i % 3], i) for i in range(16)]
    async with node(models, room=1) as service:
        alone = [await generate(service, *wish) for wish in wishes]
    async with node(models) as service:
        together = await asyncio.gather(*(generate(service, *wish) for wish in wishes))
    assert together == alone
    assert all(len(tokens) == 8 for tokens in together)


async def test_readers_that_go_away_leave_nothing_behind(models):
    async with node(models, room=1) as service:

        async def impatient(i):
            stream = service.open(request(FAMILIES[i % 3], i, tokens=50))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01 * (i % 8)):
                    async for _ in stream:
                        pass
            stream.cancel()

        await asyncio.gather(*(impatient(i) for i in range(24)))
        assert service.sessions() == []
        assert len(await generate(service, "llama", 1)) == 8


async def test_a_forced_unload_in_the_middle_of_a_session_frees_the_device(models):
    async with node(models) as service:
        stream = service.open(request("llama", 1, tokens=100))
        await anext(stream)
        await service.unload("llama", force=True)
        assert service.status("llama").state is ModelState.IDLE
        assert len(await generate(service, "llama", 1)) == 8


async def test_the_codec_and_the_limit_are_there_before_the_model_is(models):
    async with node(models) as service:
        codec = await service.prepare("qwen3")
        assert codec.decode(codec.encode("hello there", add_special_tokens=False)) == "hello there"
        assert 0 < service.context_limit("qwen3") <= 512
        assert service.status("qwen3").state is ModelState.IDLE


class HeldBack(DirectFileSystem):
    """Bytes of the last shard come when they are let go, damaged if that is the wish."""

    def __init__(self):
        super().__init__()
        self.opened = threading.Event()
        self.is_damaged = False

    def open(self, path):
        file = super().open(path)
        return LateFile(file, self) if path == max(path.parent.glob("shard-*")) else file


class LateFile:
    def __init__(self, file, system):
        self._file, self._system = file, system
        self.identity, self.close = file.identity, file.close

    def read_into(self, view, offset):
        self._system.opened.wait()
        count = self._file.read_into(view, offset)
        if self._system.is_damaged:
            view[0] ^= 0xFF
        return count


@pytest.fixture
def layers():
    """Yield a list that tells which layers have been computed, by their class."""
    seen = []

    def note(module, args, output):
        name = type(module).__name__
        if name.endswith(("DecoderLayer", "Block")) and not next(module.parameters()).is_meta:
            seen.append(name)

    hook = register_module_forward_hook(note)
    yield seen
    hook.remove()


async def computing(service, model, done):
    """Wait until the first layers of `model`, whose load is held back, have been computed."""
    while not done:
        await asyncio.sleep(0)
    assert service.status(model).state is ModelState.LOADING


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_prefill_runs_while_the_last_bytes_are_held_back(models, family, layers):
    async with node(models, overlap_load=False) as service:
        wanted = await generate(service, family, 1)
    layers.clear()
    files = HeldBack()
    async with node(models, files=files) as service:
        asking = asyncio.create_task(generate(service, family, 1))
        await computing(service, family, layers)
        assert len(layers) == 1
        assert not asking.done()
        files.opened.set()
        assert await asking == wanted
        assert service.status(family).state is ModelState.READY


async def test_other_models_are_served_and_come_while_a_prefill_waits(models, layers):
    files = HeldBack()
    files.opened.set()
    async with node(models, room=3, files=files) as service:
        wanted = await generate(service, "qwen3", 1)
        files.opened.clear()
        layers.clear()
        asking = asyncio.create_task(generate(service, "llama", 1))
        await computing(service, "llama", layers)
        assert await generate(service, "qwen3", 1) == wanted
        files.opened.set()
        assert len(await asking) == 8


@pytest.mark.parametrize("end", ["damage", "cancel", "unload", "close"])
async def test_a_load_that_ends_while_a_prefill_waits_leaves_nothing(models, end, layers):
    files = HeldBack()
    async with node(models, files=files) as service:
        stream = service.open(request("llama", 1))
        await computing(service, "llama", layers)
        if end == "damage":
            files.is_damaged = True
            files.opened.set()
            with pytest.raises(ChecksumError):
                await anext(stream)
            files.is_damaged = False
        if end == "cancel":
            stream.cancel()
            assert service.status("llama").state is ModelState.EVICTING
        if end == "unload":
            unloading = asyncio.create_task(service.unload("llama", force=True))
            with pytest.raises(CancelledByOperatorError):
                await anext(stream)
            files.opened.set()
            await unloading
        if end == "close":
            closing = asyncio.create_task(service.close())
            with pytest.raises(SllmError):
                await anext(stream)
            files.opened.set()
            await closing
        else:
            files.opened.set()
            assert len(await generate(service, "llama", 1)) == 8
