"""The whole node below HTTP: tiny models, the real store and engine, more models than fit."""

import asyncio
import contextlib
from contextlib import asynccontextmanager

import pytest

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
async def node(root, room=2):
    """A service with room for `room` of the models; at the end nothing is held."""
    catalog, clock, metrics = Catalog(root), MonotonicClock(), Metrics()
    catalog.scan()
    largest = max(catalog.get(name).index.size for name in catalog.models())
    config = Config(
        store=StoreConfig(
            path=str(root),
            pool_bytes=ByteSize(2 * MIB),
            chunk_bytes=ByteSize(16 * KIB),
            huge_pages=False,
        ),
        device=DeviceConfig(memory_bytes=ByteSize(room * (largest + KV_BYTES))),
        engine=EngineConfig(kv_cache_bytes=ByteSize(KV_BYTES), torch_threads=1),
        schedule=ScheduleConfig(max_wait_s=0.05),
    )
    device = CpuDevice(config.device.memory_bytes)
    store = Store(catalog, [device], config.store, clock, metrics)
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
