"""Decode steps without the module's forward pass give the tokens that the module gives."""

import asyncio
import random

import pytest
import torch

from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.types import ModelId, SamplingParameters
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine import step_graphs
from sllm_node.engine.decode_batch import BUCKETS, bucket_of
from sllm_node.engine.decode_ops import ReferenceOps
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.step_graphs import StepGraphs
from tests.models import make_checkpoint, make_model
from tests.unit.engine.rig import (
    DeviceMemory,
    Weights,
    ask,
    collect,
    engine_of,
    engines_of,
    reference,
)

FUSED = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "phi3", "gemma"]
OTHERS = ["gpt2", "gemma2", "olmo2", "mixtral"]
LENGTHS = (3, 40, 11, 1, 27)
COUNT = 12


class Captured:
    """Graphs that compute again what they captured."""

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, compute):
        self.captures += 1

        def replay():
            self.replays += 1
            return compute()

        return replay


class Pool:
    """Graphs that draw into memory of their own, to which a replay of any other may write."""

    def __init__(self):
        self.drawn = []

    def capture(self, compute):
        own = compute()
        self.drawn.append(own)

        def replay():
            made = compute()
            for one in self.drawn:
                one.fill_(3)
            return own.copy_(made)

        return replay


def oracle(device, longest):
    return ReferenceOps()


def prompts_of(family):
    numbers = random.Random(family)
    return [[numbers.randrange(4, 300) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("family", FUSED)
async def test_tokens_equal_those_of_generate(tmp_path, family):
    checkpoint, model, prompts = (
        make_checkpoint(tmp_path, "m", family),
        make_model(family),
        prompts_of(family),
    )
    config = {"max_step_tokens": 16, "block_tokens": 4}
    async with engine_of(checkpoint, ops_of=oracle, **config) as engine:
        generations = [engine.submit(ask(prompt, COUNT)) for prompt in prompts]
        got = await asyncio.gather(*(collect(g) for g in generations))
        assert engine._parts.decode._buckets
    assert [tokens for _, tokens, _, _ in got] == [reference(model, p, COUNT) for p in prompts]


async def test_sessions_that_are_preempted_go_on_where_they_were(tmp_path):
    checkpoint, model, prompts = (
        make_checkpoint(tmp_path, "m", "llama"),
        make_model("llama"),
        prompts_of("l"),
    )
    async with engine_of(checkpoint, ops_of=oracle, block_tokens=4) as engine:
        token_bytes = engine._parts.buffers[0].size // engine._parts.blocks.capacity_tokens
    config = {"block_tokens": 4, "kv_cache_bytes": ByteSize(token_bytes * 4 * 24)}
    async with engine_of(checkpoint, ops_of=oracle, **config) as engine:
        generations = [engine.submit(ask(prompt, COUNT)) for prompt in prompts]
        got = await asyncio.gather(*(collect(g) for g in generations))
        assert engine._preempted._value.get() > 0
    assert [tokens for _, tokens, _, _ in got] == [reference(model, p, COUNT) for p in prompts]


@pytest.mark.parametrize("family", OTHERS)
async def test_other_kinds_of_models_are_left_to_their_module(tmp_path, family):
    async with engine_of(make_checkpoint(tmp_path, "m", family), ops_of=oracle) as engine:
        assert engine._parts.decode is None


async def test_a_kind_of_step_is_captured_when_it_comes_again(tmp_path):
    sampled = SamplingParameters(temperature=0.8, top_p=0.9, seed=7)
    checkpoint, prompt = make_checkpoint(tmp_path, "m", "llama"), [5, 6, 7]
    asks = [ask(prompt, COUNT), ask(prompt, COUNT, sampled)]

    async def run(graphs):
        async with engine_of(checkpoint, ops_of=oracle) as engine:
            engine._parts.decode._graphs = graphs and StepGraphs(graphs, 100)
            return [(await collect(engine.submit(one)))[1] for one in asks]

    captured = Captured()
    assert await run(captured) == await run(None)
    assert captured.captures == 2  # greedy, and sampled
    assert captured.replays == 2 * (COUNT - 1 - 1)  # the first token comes with the prompt


@pytest.mark.parametrize("at_once", [1, 2, 8])
async def test_what_lies_between_attentions_of_prompts_is_captured(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(step_graphs, "CAPTURES_A_STEP", at_once)
    checkpoint, prompts = make_checkpoint(tmp_path, "m", "qwen2"), prompts_of("c")

    async def run(graphs):
        config = {"max_step_tokens": 80, "block_tokens": 4, "prefix_cache": False}
        async with engine_of(checkpoint, ops_of=oracle, **config) as engine:
            engine._parts.decode._mixed._graphs = graphs and StepGraphs(graphs, 100)
            asks = [ask(prompt, COUNT) for prompt in prompts * 3]
            return [(await collect(g))[1] for g in [engine.submit(one) for one in asks]]

    captured = Captured()
    assert await run(captured) == await run(None)
    # Of two layers: before, between and behind; not all kinds of steps come often enough.
    assert captured.captures % 3 == 0 or at_once < 3
    assert captured.replays > captured.captures > 0


async def test_what_others_have_left_in_scratch_memory_changes_nothing(tmp_path):
    checkpoint, prompt = make_checkpoint(tmp_path, "m", "llama"), prompts_of("s")[1]
    async with engine_of(checkpoint, ops_of=oracle, prefix_cache=False) as engine:
        _, first, _, _ = await collect(engine.submit(ask(prompt, COUNT)))
        with torch.inference_mode():
            for piece in engine._parts.decode._memory._pieces.values():
                piece.fill_(0x7F)
        _, second, _, _ = await collect(engine.submit(ask(prompt, COUNT)))
    assert second == first


def watch(decode):
    """Return what grows by (rows, rows that follow the step before) of each step launched."""
    launch, made = decode.launch, []

    def watched(rows, following):
        made.append((len(rows), 0 if following is None else len(following.rows)))
        return launch(rows, following)

    decode.launch = watched
    return made


@pytest.mark.parametrize("graphs", [None, Pool], ids=["plain", "graphs"])
async def test_steps_launched_ahead_take_tokens_from_where_they_are_drawn(tmp_path, graphs):
    checkpoint, prompts = make_checkpoint(tmp_path, "m", "llama"), prompts_of("a")
    kinds = [
        SamplingParameters(temperature=0.0),
        SamplingParameters(temperature=0.8, top_p=0.9, seed=7),
        SamplingParameters(temperature=0.9, seed=3, presence_penalty=1.0),
    ]
    wishes = [
        ask(prompt, COUNT + 3 * i, kinds[i % 3], logprobs=(None, 2)[i % 2])
        for i, prompt in enumerate(prompts)
    ]
    said, made = {}, []
    for way in ("never", "always"):
        config = {"max_step_tokens": 16, "block_tokens": 4, "launch_ahead": way}
        async with engine_of(checkpoint, ops_of=oracle, **config) as engine:
            engine._parts.decode._graphs = graphs and StepGraphs(graphs(), 100)
            made = watch(engine._parts.decode)
            generations = [engine.submit(wish) for wish in wishes]
            said[way] = [(await collect(g))[1] for g in generations]
            said[way] += [(await collect(engine.submit(wish)))[1] for wish in wishes]
        assert any(ahead for _, ahead in made) == (way == "always")
    # While others are held for their penalties, and when nobody is.
    assert {rows - ahead for rows, ahead in made if ahead} >= {0, 1}
    assert said["always"] == said["never"]


@pytest.mark.parametrize("way", ["never", "always"])
async def test_a_replay_goes_through_the_steps_that_generated_it(tmp_path, way):
    checkpoint = make_checkpoint(tmp_path, "m", "llama", "bfloat16", codec="raw")
    config = {"block_tokens": 4, "prefix_cache": False, "launch_ahead": way}
    async with engine_of(checkpoint, ops_of=oracle, **config) as engine:
        made = watch(engine._parts.decode)
        whole = await collect(engine.submit(ask((5, 6, 7), COUNT, logprobs=3)))
        assert len(made) == COUNT - 1
        for cut in range(1, COUNT):
            made.clear()
            request = ask((5, 6, 7), COUNT, logprobs=3, resumed=whole[1][:cut], resume="replay")
            _, tokens, logs, _ = await collect(engine.submit(request))
            assert (tokens, logs) == (whole[1][cut:], whole[2][cut:])
            assert len(made) == COUNT - 1


def test_a_step_takes_the_smallest_bucket_that_holds_it():
    assert [bucket_of(rows) for rows in (1, 3, 16, 17, 256, 257)] == [1, 4, 16, 24, 256, None]
    assert sorted(BUCKETS) == list(BUCKETS)


class Memory(DeviceMemory):
    """Hands out addresses, and says which were used again."""

    def __init__(self, device):
        super().__init__(device)
        self.again = []

    async def allocate(self, device, size, again=None):
        self.again.append(again)
        return await super().allocate(device, size, again)


async def test_a_model_that_comes_back_finds_its_graphs_and_its_kv_addresses(tmp_path):
    checkpoint, model = make_checkpoint(tmp_path, "m", "llama"), make_model("llama")
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(kv_cache_bytes=ByteSize(8 << 20)), ops_of=oracle)
        engines._memory = memory = Memory(device)
        weights, codec = Weights(checkpoint, device), await engines.load_codec(checkpoint.path)
        kept = []
        for prompt in ([5, 6, 7], [9, 8, 7, 6]):
            skeleton = await engines.skeleton(checkpoint)
            engine = await engines.open(weights, skeleton, codec)
            (_, tokens, _, _) = await collect(engine.submit(ask(prompt, COUNT)))
            assert tokens == reference(model, prompt, COUNT)
            kept.append(engine._parts)
            await engine.close()
            assert device.memory_used == weights.buffer.size  # KV memory is free
        assert memory.again[0] is None
        assert memory.again[1] is kept[0].buffers[0]
        assert kept[0].decode is kept[1].decode
        assert kept[1].decode._buckets
        engines.forget(ModelId("m"))
        assert not kept[1].decode._buckets
        weights.buffer.close()
        engines.close()


async def test_all_models_of_a_device_share_scratch_memory(tmp_path):
    memory = ScratchMemory(torch.device("cpu"))
    one, other = memory.take([100, 300]), memory.take([700])
    assert one[0].data_ptr() == other[0].data_ptr()
    assert one[1].data_ptr() == one[0].data_ptr() + 256
    assert memory.take([5000])[0].data_ptr() != one[0].data_ptr()
