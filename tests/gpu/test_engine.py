"""The engine on a GPU says what transformers says."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.split import split
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Part, SamplingParameters, Tier
from sllm_node.core.units import MIB
from sllm_node.engine.engines import Engines
from sllm_node.store.store import Store
from tests.gpu.test_loads import open_devices
from tests.models import make_checkpoint, make_source
from tests.unit.engine.rig import GREEDY, ask, collect

pytestmark = pytest.mark.gpu
PROMPT = tuple(range(5, 29))
MODEL = ModelId("m")


@pytest.mark.parametrize("launch_ahead", ["never", "auto"])
@pytest.mark.parametrize("count", [1, 2])
async def test_a_model_says_on_gpus_what_transformers_says(tmp_path, count, launch_ahead):
    checkpoint = make_checkpoint(tmp_path / "store", "m")
    devices = open_devices(count, 600 * MIB)
    store = await open_store(tmp_path / "store", devices)
    settings = EngineConfig(kv_cache_bytes=ByteSize(8 * MIB), launch_ahead=launch_ahead)
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    said = []
    for _ in range(2):  # the second time with the module that was kept
        lease = await store.acquire(MODEL, placement_on(devices, checkpoint.index))
        engine = await engines.open(lease, await engines.skeleton(checkpoint), codec)
        _, tokens, _, _ = await collect(engine.submit(ask(PROMPT, 24)))
        said.append(tokens)
        await engine.close()
        lease.release()
        store.evict(MODEL, Tier.DEVICE, "operator")
    source = make_source(tmp_path / "source")
    oracle = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to("cuda:0")
    wanted = reference_on_gpu(oracle, PROMPT, 24)
    assert said == [wanted, wanted]
    engines.close()
    await store.close()
    for device in devices:
        device.close()


@pytest.mark.parametrize("count", [1, 2])
async def test_tokens_are_the_same_when_steps_run_while_the_model_loads(tmp_path, count):
    checkpoint = make_checkpoint(tmp_path / "store", "m")
    devices = open_devices(count, 600 * MIB)
    store = await open_store(tmp_path / "store", devices)
    settings = EngineConfig(kv_cache_bytes=ByteSize(8 * MIB))
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    placement = placement_on(devices, checkpoint.index)
    said = []
    for is_early in (False, True, True):  # the last time with the module and graphs that were kept
        lease = await store.acquire(MODEL, placement, early=is_early)
        engine = await engines.open(lease, await engines.skeleton(checkpoint), codec)
        sent = [engine.submit(ask(PROMPT[:n], 24)) for n in (1, 24)]
        await lease.loaded()
        engine.loaded()
        said.append([(await collect(generation))[1] for generation in sent])
        await engine.close()
        lease.release()
        store.evict(MODEL, Tier.DEVICE, "operator")
    assert said[1:] == [said[0], said[0]]
    engines.close()
    await store.close()
    for device in devices:
        device.close()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
async def test_launching_a_step_waits_for_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "store", "m")
    devices = open_devices(1, 600 * MIB)
    store = await open_store(tmp_path / "store", devices)
    settings = EngineConfig(kv_cache_bytes=ByteSize(8 * MIB), max_step_tokens=32)
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    lease = await store.acquire(MODEL, placement_on(devices, checkpoint.index))
    engine: Any = await engines.open(lease, await engines.skeleton(checkpoint), codec)
    sampled = SamplingParameters(temperature=0.8, top_p=0.9, seed=3)
    wishes = [ask(PROMPT[:n], 24, s, logprobs=2) for n in (3, 24) for s in (GREEDY, sampled)]
    expected: list[tuple[int, ...]] = []
    for _ in range(
        3
    ):  # prompts are found from the second round on, and graphs captured by the third
        sent = [engine.submit(wish) for wish in wishes]
        expected = [(await collect(generation))[1] for generation in sent]
    launch = engine._runner._launch

    def watched(parts, before):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(parts, before)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._runner._launch = watched
    again = [engine.submit(wish) for wish in wishes]
    assert [(await collect(generation))[1] for generation in again] == expected
    await engine.close()
    lease.release()
    engines.close()
    await store.close()
    for device in devices:
        device.close()


async def open_store(root, devices):
    catalog = Catalog(root)
    catalog.scan()
    config = StoreConfig(pool_bytes=ByteSize(64 * MIB), chunk_bytes=ByteSize(16 * MIB))
    store = Store(catalog, devices, config, MonotonicClock(), Metrics())
    await store.start()
    return store


def placement_on(devices, index):
    if len(devices) == 1:
        return (Part(devices[0].name, 0, index.size),)
    cuts = split(index, 0, (index.size, index.size)) or ()
    return tuple(Part(d.name, cut.start, cut.end) for d, cut in zip(devices, cuts, strict=True))


def reference_on_gpu(model, prompt, count):
    """Return the greedy tokens of transformers, on the GPU."""
    tokens = torch.tensor([prompt], device="cuda:0")
    with torch.no_grad():
        for _ in range(count):
            chosen = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, chosen.view(1, 1)], dim=1)
    return tuple(tokens[0, len(prompt) :].tolist())
