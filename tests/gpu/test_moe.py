"""Mixtures of experts on a GPU say what transformers says."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.units import MIB
from sllm_node.engine.engines import Engines
from tests.gpu.test_engine import MODEL, open_store, placement_on
from tests.gpu.test_loads import open_devices
from tests.models import make_checkpoint, make_source
from tests.unit.engine.rig import ask, collect

pytestmark = pytest.mark.gpu
COUNT = 20
PROMPTS = (tuple(range(5, 45)), (7,), tuple(range(30, 60)), (9, 200, 31), tuple(range(60, 71)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
async def test_experts_say_in_fp32_what_generate_says_whatever_the_company(tmp_path, family):
    said = await said_by(open_devices(1, 600 * MIB), tmp_path, family, "float32")
    source = make_source(tmp_path / "source", family)
    oracle = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to("cuda:0")
    wanted = [generated(oracle, prompt) for prompt in PROMPTS]
    assert said == [wanted, wanted]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
async def test_experts_in_bf16_say_the_same_again(tmp_path, family):
    first, again = await said_by(open_devices(1, 600 * MIB), tmp_path, family, "bfloat16")
    assert [len(tokens) for tokens in first] == [COUNT] * len(PROMPTS)
    assert first[0] == again[0]


async def said_by(devices, place, family, dtype):
    """Return what the prompts gave, one after the other and all at once."""
    checkpoint = make_checkpoint(place / "store", "m", family, dtype)
    store = await open_store(place / "store", devices)
    settings = EngineConfig(kv_cache_bytes=ByteSize(8 * MIB), max_step_tokens=32)
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    lease = await store.acquire(MODEL, placement_on(devices, checkpoint.index))
    engine = await engines.open(lease, await engines.skeleton(checkpoint), codec)
    said = [[(await collect(engine.submit(ask(p, COUNT))))[1] for p in PROMPTS]]
    sent = [engine.submit(ask(prompt, COUNT)) for prompt in PROMPTS]
    said.append([(await collect(generation))[1] for generation in sent])
    await engine.close()
    lease.release()
    engines.close()
    await store.close()
    for device in devices:
        device.close()
    return said


def generated(model, prompt):
    """Return the greedy tokens of generate; no token ends it."""
    ids = torch.tensor([prompt], device=model.device)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=COUNT, do_sample=False)
    return tuple(made[0, len(prompt) :].tolist())
