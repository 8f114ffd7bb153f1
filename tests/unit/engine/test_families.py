"""Every served architecture, token for token against transformers' own generate(), in fp32."""

import asyncio
import random
from typing import Any

import pytest

from sllm_node.core.config import ByteSize
from sllm_node.engine.skeleton import SUPPORTED, layer_shapes, read_config
from tests.models import make_checkpoint, make_model
from tests.unit.engine.rig import ask, collect, engine_of, reference

SERVED = [
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "opt", "gpt2",
    "gpt_neox", "phi", "phi3", "olmo2", "granite", "cohere", "smollm3", "starcoder2", "stablelm",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared",
    "phimoe", "minimax_m2", "ernie4_5_moe", "dots1", "glm4_moe", "glm4_moe_lite", "deepseek_v2",
    "deepseek_v3",
]  # fmt: skip
LAYER_TYPES = ["sliding_attention", "full_attention"]
MASKED: dict[
    str, dict[str, Any]
] = {  # what the attention of a layer is told is not what its mask does
    "phimoe": {"sliding_window": 8},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": False, "sliding_window": 8, "layer_types": LAYER_TYPES},
    "olmoe": {"sliding_window": 8},
}
LENGTHS = (3, 40, 11, 1, 27)
COUNT = 12


@pytest.mark.parametrize("launch_ahead", ["never", "always"])
@pytest.mark.parametrize("family", SERVED)
async def test_tokens_equal_those_of_generate(tmp_path, family, launch_ahead):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    model = make_model(family)
    numbers = random.Random(family)
    prompts = [[numbers.randrange(4, 300) for _ in range(length)] for length in LENGTHS]
    # Pieces of 16 tokens, and too few blocks for all at once: prompts are cut and sessions preempted.
    config = {"max_step_tokens": 16, "block_tokens": 4, "launch_ahead": launch_ahead}
    async with engine_of(checkpoint, **config) as engine:
        token_bytes = engine._parts.buffers[0].size // engine._parts.blocks.capacity_tokens
    config["kv_cache_bytes"] = ByteSize(token_bytes * 4 * 24)
    async with engine_of(checkpoint, **config) as engine:
        generations = [engine.submit(ask(prompt, COUNT)) for prompt in prompts]
        got = await asyncio.gather(*(collect(g) for g in generations))
        is_tight = engine._parts.window is None  # with windows, sessions keep little
        preempted = engine._preempted._value.get()
    assert [tokens for _, tokens, _, _ in got] == [reference(model, p, COUNT) for p in prompts]
    assert [finish for *_, finish in got] == ["length"] * len(prompts)
    assert bool(preempted) is is_tight


@pytest.mark.parametrize("family", MASKED)
async def test_a_layer_looks_back_as_far_as_the_mask_of_its_class_lets_it(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path, "m", family, **MASKED[family])
    model = make_model(family, **MASKED[family])
    numbers = random.Random(family)
    prompts = [[numbers.randrange(4, 300) for _ in range(length)] for length in LENGTHS]
    async with engine_of(checkpoint, max_step_tokens=16, block_tokens=4) as engine:
        generations = [engine.submit(ask(prompt, COUNT)) for prompt in prompts]
        got = await asyncio.gather(*(collect(g) for g in generations))
    assert [tokens for _, tokens, _, _ in got] == [
        reference(model, prompt, COUNT, use_cache=False) for prompt in prompts
    ]


def test_every_architecture_that_we_serve_is_compared():
    compared = {type(make_model(family)).__name__ for family in SERVED}
    assert compared == set(SUPPORTED)


@pytest.mark.parametrize("family", SERVED)
def test_kv_memory_is_known_from_the_config(tmp_path, family):
    from sllm_node.engine.kv import bytes_per_token, token_bytes_from_config
    from sllm_node.engine.skeleton import build_skeleton

    path = make_checkpoint(tmp_path, "m", family).path
    model = build_skeleton(path)
    expected = bytes_per_token(layer_shapes(model), model.dtype)
    assert token_bytes_from_config(read_config(path)) == expected
