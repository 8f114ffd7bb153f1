"""A model whose layers lie on two devices."""

import pytest

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.engines import Engines
from sllm_node.store.store import Store
from tests.models import make_checkpoint
from tests.unit.engine.rig import ask, collect, engine_of

KV_BYTES = 256 << 10
PROMPT = tuple(range(5, 29))
MODEL = ModelId("m")


@pytest.mark.parametrize(
    "family",
    [
        "llama", "llama_tied", "gpt2", "gemma2", "gpt_neox", "mixtral", "qwen3_moe", "qwen2_moe",
        "deepseek_v2", "deepseek_v3",
    ],
)  # fmt: skip
async def test_a_model_split_over_two_devices_says_what_it_says_on_one(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    async with engine_of(checkpoint) as whole:
        _, wanted, _, _ = await collect(whole.submit(ask(PROMPT, 16)))
    memory = checkpoint.index.size * 4 // 5 + KV_BYTES
    devices = [CpuDevice(memory, f"cpu:{number}") for number in range(2)]
    catalog = Catalog(tmp_path)
    catalog.scan()
    config = StoreConfig(pool_bytes=ByteSize(1 << 20), chunk_bytes=ByteSize(1 << 14))
    store = Store(catalog, devices, config, MonotonicClock(), Metrics())
    await store.start()
    settings = EngineConfig(kv_cache_bytes=ByteSize(KV_BYTES), torch_threads=1)
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    shares = engines.shares(checkpoint)
    assert [share.device for share in shares] == ["cpu:0", "cpu:1"]
    assert all(share.size <= memory for share in shares)
    placement = tuple(Part(share.device or "", share.start, share.end) for share in shares)
    codec = await engines.load_codec(checkpoint.path)
    for early in (False, True):
        lease = await store.acquire(MODEL, placement, early=early)
        engine = await engines.open(lease, await engines.skeleton(checkpoint), codec)
        assert len(engine._parts.buffers) == 2
        for cached in (0, 16):
            chunks = [chunk async for chunk in engine.submit(ask(PROMPT, 16))]
            assert tuple(token for chunk in chunks for token in chunk.tokens) == wanted
            assert chunks[0].cached_tokens == cached
            await lease.loaded()
            engine.loaded()
        await engine.close()
        lease.release()
        store.evict(MODEL, Tier.DEVICE, "operator")
    engines.close()
    await store.close()
    assert [device.memory_used for device in devices] == [0, 0]


async def test_a_model_that_comes_back_finds_its_module_bound(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "m")
    catalog = Catalog(tmp_path)
    catalog.scan()
    devices = [CpuDevice(64 << 20)]
    config = StoreConfig(pool_bytes=ByteSize(1 << 20), chunk_bytes=ByteSize(1 << 14))
    store = Store(catalog, devices, config, MonotonicClock(), Metrics())
    await store.start()
    settings = EngineConfig(kv_cache_bytes=ByteSize(KV_BYTES), torch_threads=1)
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    skeletons, buffers = [], set()
    for _ in range(2):
        lease = await store.acquire(MODEL)
        with lease:
            skeletons.append(await engines.skeleton(checkpoint))
            engine = await engines.open(lease, skeletons[-1], codec)
            await engine.close()
        buffers.add(tuple(part.buffer for part in lease.parts))
        store.evict(MODEL, Tier.DEVICE, "room")
    assert skeletons[0] is skeletons[1]
    assert buffers == {skeletons[0].bound_to}
    engines.close()
    await store.close()
