"""What is found cached changes no token: against generate(), and against the same without the cache."""

import asyncio
import random

import pytest

from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.errors import EngineError
from sllm_node.core.types import SamplingParameters
from sllm_node.device.cpu import CpuDevice
from tests.models import make_checkpoint, make_model
from tests.unit.engine.rig import Weights, ask, collect, engine_of, engines_of, reference

FAMILIES = ("llama", "gpt2", "opt", "mistral", "gemma2", "gemma3", "qwen3_moe")
"""Every kind of positions, windows and layers."""
COUNT = 10
BLOCK = 4
SMALL = {"max_step_tokens": 16, "block_tokens": BLOCK}


def numbers(seed, count):
    made = random.Random(seed)
    return [made.randrange(4, 300) for _ in range(count)]


async def answer(engine, prompt, count=COUNT, **more):
    """Return tokens, and how many tokens of the prompt were found cached."""
    chunks = [chunk async for chunk in engine.submit(ask(prompt, count, **more))]
    assert len({chunk.cached_tokens for chunk in chunks}) == 1
    return tuple(token for chunk in chunks for token in chunk.tokens), chunks[0].cached_tokens


async def conversation(engine):
    """Return prompts and answers: prompts that begin alike one after another and at once, then turns."""
    shared = numbers(1, 21)
    asked = [shared, shared, shared[:9], [*shared, *numbers(2, 14)]]
    got = [await answer(engine, prompt) for prompt in asked]
    together = [[*shared[:17], *numbers(seed, 8)] for seed in (3, 4, 5)]
    got += await asyncio.gather(*(answer(engine, prompt) for prompt in together))
    asked += together
    turn, said = shared, got[0][0]
    for seed in (6, 7):
        turn = [*turn, *said, *numbers(seed, 5)]
        asked.append(turn)
        got.append(await answer(engine, turn))
        said = got[-1][0]
    return asked, got


@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_equal_those_of_generate_and_those_without_the_cache(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    model = make_model(family)
    async with engine_of(checkpoint, **SMALL) as engine:
        asked, got = await conversation(engine)
        hits, queries = engine._found._value.get(), engine._asked._value.get()
    async with engine_of(checkpoint, prefix_cache=False, **SMALL) as engine:
        _, without = await conversation(engine)
        assert engine._asked._value.get() == 0
    wanted = [reference(model, prompt, COUNT) for prompt in asked]
    assert [tokens for tokens, _ in got] == wanted
    assert [tokens for tokens, _ in without] == wanted
    assert [cached for _, cached in got] == [0, 20, 8, 20, 16, 16, 16, 28, 44]
    assert {cached for _, cached in without} == {0}
    assert (hits, queries) == (sum(cached for _, cached in got), sum(map(len, asked)))


@pytest.mark.parametrize(
    ("family", "own", "few"), [("llama", 9, 17), ("gemma2", 9, 17), ("mistral", 2, 10)]
)
async def test_preempted_sessions_come_back_to_the_same_tokens(tmp_path, family, own, few):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    model = make_model(family)
    shared = numbers(1, 11 if own > 2 else 1)  # with windows sessions keep little: short ones grow
    prompts = [[*shared, *numbers(seed, own)] for seed in range(2, 8)]
    async with engine_of(checkpoint, **SMALL) as engine:
        token_bytes = engine._parts.buffers[0].size // engine._parts.blocks.capacity_tokens
    memory = {"kv_cache_bytes": ByteSize(token_bytes * BLOCK * few)}
    async with engine_of(checkpoint, **SMALL, **memory) as engine:
        got = await asyncio.gather(*(answer(engine, prompt, 24) for prompt in prompts))
        assert engine._preempted._value.get()
        assert engine._parts.blocks.free == engine._parts.blocks.total
    assert [tokens for tokens, _ in got] == [reference(model, p, 24) for p in prompts]


async def test_where_all_layers_have_a_window_what_it_has_passed_is_free(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "m", "mistral")
    async with engine_of(checkpoint, **SMALL) as engine:
        blocks, prompt = engine._parts.blocks, numbers(1, 21)
        assert engine._parts.window == 8
        generation = engine.submit(ask(prompt, 40))
        async for _ in generation:
            # Window and token, a block that is not whole at either end; the prompt was whole once.
            assert blocks.total - blocks.free <= (4 if len(generation.tokens) > 1 else 6)
        assert blocks.cached == 60 // BLOCK
        assert generation.tokens == reference(make_model("mistral"), prompt, 40)
        assert await answer(engine, [*prompt, *generation.tokens], 1) == (
            reference(make_model("mistral"), [*prompt, *generation.tokens], 1), 60
        )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "window"), [("mistral", 8), ("gemma2", None), ("llama", None), ("gemma3", 8)]
)
async def test_one_layer_without_a_window_needs_all_blocks(tmp_path, family, window):
    async with engine_of(make_checkpoint(tmp_path, "m", family)) as engine:
        assert engine._parts.window == window


async def test_salts_keep_prefixes_apart(checkpoint):
    async with engine_of(checkpoint, **SMALL) as engine:
        prompt = numbers(1, 21)
        wanted, _ = await answer(engine, prompt, cache_salt="a")
        for salt, cached in (("b", 0), ("", 0), ("a", 20), ("b", 20)):
            assert await answer(engine, prompt, cache_salt=salt) == (wanted, cached)


async def test_resumed_tokens_are_looked_up_and_do_not_count_as_the_prompts(checkpoint):
    async with engine_of(checkpoint, **SMALL) as engine:
        prompt = numbers(1, 10)
        wanted, _ = await answer(engine, prompt, 16)
        tokens, cached = await answer(engine, prompt, 16, resumed=wanted[:9])
        assert (tokens, cached) == (wanted[9:], 10)


async def test_a_cancelled_session_leaves_what_it_has_computed(checkpoint):
    async with engine_of(checkpoint, **SMALL) as engine:
        prompt = numbers(1, 21)
        wanted, _ = await answer(engine, prompt, cache_salt="first")
        doomed = engine.submit(ask(prompt, 200))
        await anext(doomed)
        doomed.cancel()
        assert await answer(engine, prompt) == (wanted, 20)


async def test_a_failed_step_leaves_nothing_to_be_found(checkpoint):
    async with engine_of(checkpoint, **SMALL) as engine:
        prompt = numbers(1, 21)
        wanted, _ = await answer(engine, prompt)
        advance = engine._runner.advance
        engine._runner.advance = lambda steps: 1 / 0
        with pytest.raises(EngineError):
            await answer(engine, prompt)
        engine._runner.advance = advance
        assert await answer(engine, prompt) == (wanted, 0)


async def test_what_gave_no_numbers_is_not_found(checkpoint):
    async with engine_of(checkpoint, **SMALL) as engine:
        prompt = numbers(1, 21)
        wanted, _ = await answer(engine, prompt, cache_salt="other")
        advance = engine._runner.advance

        def spoil(steps):
            from sllm_node.engine.sampling import Drawn

            return [part and Drawn(-1) for part in advance(steps)]

        engine._runner.advance = spoil
        with pytest.raises(EngineError, match="not numbers"):
            await answer(engine, prompt)
        engine._runner.advance = advance
        assert await answer(engine, prompt) == (wanted, 0)


async def test_a_model_that_left_its_device_comes_back_without_its_prefixes(checkpoint):
    with CpuDevice(1 << 30) as device:
        engines = engines_of(
            device, EngineConfig(kv_cache_bytes=ByteSize(1 << 20), block_tokens=BLOCK)
        )
        weights, codec = Weights(checkpoint, device), await engines.load_codec(checkpoint.path)
        prompt, got = numbers(1, 21), []
        for _ in range(2):
            engine = await engines.open(weights, await engines.skeleton(checkpoint), codec)
            got += [await answer(engine, prompt), await answer(engine, prompt)]
            await engine.close()
            assert engine._parts.blocks.cached == 0
        weights.buffer.close()
        engines.close()
    assert [cached for _, cached in got] == [0, 20, 0, 20]
    assert len({tokens for tokens, _ in got}) == 1


async def test_drawn_tokens_do_not_depend_on_what_is_cached(checkpoint):
    sampled = SamplingParameters(temperature=1.0, seed=7, repetition_penalty=1.3)
    async with engine_of(checkpoint, **SMALL) as engine:
        wish = ask(numbers(1, 21), 20, sampled, logprobs=3)
        first = await collect(engine.submit(wish))
        again = await collect(engine.submit(wish))
    assert again[:2] == first[:2]
    assert [one.logprob for one in again[2]] == pytest.approx(
        [one.logprob for one in first[2]], abs=1e-4
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")
