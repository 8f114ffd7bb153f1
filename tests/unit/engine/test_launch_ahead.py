"""What an engine that launches steps ahead answers, beside one that does not."""

import asyncio
import random

import pytest

from sllm_node.core.config import ByteSize
from sllm_node.core.errors import EngineError
from sllm_node.core.types import SamplingParameters
from tests.models import make_checkpoint
from tests.unit.engine.rig import GREEDY, ask, collect, engine_of

BLOCK = 4
SMALL = {"block_tokens": BLOCK, "max_step_tokens": 16}
AHEAD = {**SMALL, "launch_ahead": "always"}
PROMPT = (20, 31, 45, 60, 72)
END = 100.0
"""A bias that makes an end token certain."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


async def read(generation, cancel_after=None):
    """Return what a reader sees of a generation that it may cancel."""
    text, tokens, logprobs, end = "", (), (), (None, None)
    async for chunk in generation:
        text += chunk.text
        tokens += chunk.tokens
        logprobs += chunk.logprobs
        end = chunk.finish, chunk.stop_text
        if cancel_after is not None and len(tokens) >= cancel_after:
            generation.cancel()
    return text, tokens, end, [round(one.logprob, 3) for one in logprobs]


def wishes(seed, eos):
    """Return requests of all kinds, and after how many tokens their readers go away."""
    numbers = random.Random(seed)
    shared = [numbers.randrange(4, 300) for _ in range(24)]
    found = []
    for _ in range(numbers.randrange(4, 11)):
        own = [numbers.randrange(4, 300) for _ in range(numbers.randrange(1, 20))]
        temperature = numbers.choice([0.0, 0.8, 1.2])
        sampling = SamplingParameters(
            temperature=temperature, seed=numbers.randrange(1000),
            top_p=numbers.choice([1.0, 0.9]),
            repetition_penalty=numbers.choice([1.0, 1.0, 1.3]),
            # Some end soon by themselves, most don't.
            logit_bias=numbers.choice([(), ((eos, 4.0),), ((eos, 6.0),)]),
        )  # fmt: skip
        prompt = shared[: numbers.choice([0, 9, 16, 24])] + own
        request = ask(
            prompt, numbers.randrange(1, 25), sampling, ignore_eos=False,
            stop=tuple(numbers.sample("abcdefgh", numbers.choice([0, 0, 1]))),
            logprobs=numbers.choice([None, 0, 3]), priority=numbers.choice([0, 0, 1]),
        )  # fmt: skip
        found.append((request, numbers.choice([None, None, None, 1, 4])))
    return found


def check_known(engine, generations):
    """Only full blocks of tokens that are part of a session are known."""
    known = set(engine._parts.blocks._known)
    for session in (generation.session for generation in generations):
        known -= {session.key(index, BLOCK) for index in range(session.length // BLOCK)}
    assert not known


async def test_steps_launched_ahead_change_no_answer(checkpoint):
    room = {"kv_cache_bytes": ByteSize(512 * BLOCK * 24)}  # others must give way
    finishes, taken = set(), []
    async with (
        engine_of(checkpoint, **SMALL, **room) as plain,
        engine_of(checkpoint, **AHEAD, **room) as ahead,
    ):
        eos = next(iter(plain._parts.codec.eos_ids))
        for seed in range(25):
            mix = wishes(seed, eos)
            expected = [await read(plain.submit(request)) for request, _ in mix]
            crowd = [plain.submit(request) for request, _ in mix]
            assert await asyncio.gather(*map(read, crowd)) == expected
            generations = [ahead.submit(request) for request, _ in mix]
            taken += generations
            leavers = [count for _, count in mix]
            got = await asyncio.gather(*map(read, generations, leavers))
            for answer, full, count in zip(got, expected, leavers, strict=True):
                if count is None or len(full[1]) <= count:
                    assert answer == full
                else:
                    assert answer[1] == full[1][: len(answer[1])]
            finishes |= {answer[2][0] for answer in got}
            check_known(ahead, taken)
            assert (ahead.running, ahead.waiting) == (0, 0)
        assert ahead._preempted._value.get() > 0
    assert finishes == {"stop", "length", None}


async def test_one_after_another_find_the_same_cached(checkpoint):
    found = []
    for config in (SMALL, AHEAD):
        async with engine_of(checkpoint, **config) as engine:
            counts = []
            for seed in range(6):
                numbers = random.Random(seed % 3)
                prompt = [numbers.randrange(4, 300) for _ in range(17)]
                generation = engine.submit(ask(prompt, 9))
                tokens = (await collect(generation))[1]
                turn = engine.submit(ask((*prompt, *tokens, 7, 7), 9))
                await collect(turn)
                counts.append((generation.session.cached_tokens, turn.session.cached_tokens))
            found.append(counts)
    assert found[0] == found[1]


@pytest.mark.parametrize("config", [SMALL, AHEAD], ids=["cpu", "ahead"])
async def test_a_step_is_under_way_while_the_tokens_of_another_are_handed_out(checkpoint, config):
    async with engine_of(checkpoint, **config) as engine:
        take, under_way = engine._take, []

        def watched(plan, drawn, began):
            under_way.append(len(engine._runner._under_way))
            take(plan, drawn, began)

        engine._take = watched
        await collect(engine.submit(ask(PROMPT, 8)))
        assert under_way == ([0] * 8 if config is SMALL else [1] * 7 + [0])


async def test_a_token_too_many_is_not_told_and_not_counted(checkpoint):
    async with engine_of(checkpoint, **AHEAD) as engine:
        eos = next(iter(engine._parts.codec.eos_ids))
        force = SamplingParameters(temperature=0.0, logit_bias=((eos, END),))
        generation = engine.submit(ask(PROMPT[:3], 50, force, ignore_eos=False))
        assert (await collect(generation))[1] == (eos,)
        assert generation.tokens == (eos,)
        assert engine._generated._value.get() == 1
        await collect(engine.submit(ask((9,), 2)))  # the step with the token too many has ended
        check_known(engine, [generation])


async def test_sessions_with_penalties_and_others_go_on_side_by_side(checkpoint):
    penalised = SamplingParameters(temperature=0.0, repetition_penalty=1.4)
    kinds = (GREEDY, penalised, GREEDY, GREEDY)
    async with engine_of(checkpoint, **SMALL) as engine:
        alone = [await collect(engine.submit(ask(PROMPT, 20, kind))) for kind in kinds]
    async with engine_of(checkpoint, **AHEAD) as engine:
        together = [engine.submit(ask(PROMPT, 20, kind)) for kind in kinds]
        assert await asyncio.gather(*map(collect, together)) == alone


# --- failures -------------------------------------------------------------------------------------


def fail_launch(engine, number):
    """Let the launch of step `number`, and none after it, go wrong."""
    launch, count = engine._runner._launch, iter(range(10**6))

    def wrapped(parts, before):
        if next(count) == number:
            raise ZeroDivisionError
        return launch(parts, before)

    engine._runner._launch = wrapped


@pytest.mark.parametrize("number", range(4))
async def test_a_step_that_can_not_be_launched_ends_its_sessions_only(checkpoint, number):
    async with engine_of(checkpoint, **AHEAD, max_sessions=2) as engine:
        expected = (await collect(engine.submit(ask(PROMPT, 8))))[1]
        brief, long = engine.submit(ask(PROMPT, 1)), engine.submit(ask(PROMPT, 8))
        waiting = engine.submit(ask((9, *PROMPT), 8))
        fail_launch(engine, number)
        if number:  # it has ended with the step before
            assert (await collect(brief))[1] == expected[:1]
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await collect(long)
        assert long.tokens == expected[:number]
        if number < 2:  # it came after
            assert len((await collect(waiting))[1]) == 8
        assert len((await collect(engine.submit(ask(PROMPT, 8))))[1]) == 8
        assert not engine._is_trusted


async def test_a_step_that_fails_ends_the_sessions_of_the_one_behind_it(checkpoint):
    async with engine_of(checkpoint, **AHEAD, max_sessions=1) as engine:
        advance = engine._runner.advance
        doomed, waiting = engine.submit(ask(PROMPT, 9)), engine.submit(ask(PROMPT, 9))
        await anext(doomed)

        def fail(steps):
            advance(steps)
            engine._runner.advance = advance
            raise ZeroDivisionError

        engine._runner.advance = fail
        with pytest.raises(EngineError):
            await collect(doomed)
        assert len((await collect(waiting))[1]) == 9


async def test_closing_takes_what_is_under_way_and_gives_everything_back(checkpoint):
    async with engine_of(checkpoint, **AHEAD) as engine:
        running = [engine.submit(ask((n, *PROMPT), 200)) for n in range(4, 9)]
        await asyncio.gather(*map(anext, running))
        running[0].cancel()
        assert engine._flight
        await engine.close()
        assert not engine._flight
        assert engine.kv_usage == 0.0


async def test_a_cancelled_sessions_blocks_wait_for_both_steps(checkpoint):
    async with engine_of(checkpoint, **AHEAD) as engine:
        doomed = engine.submit(ask(PROMPT, 200))
        await anext(doomed)
        session = doomed.session
        doomed.cancel()
        assert session.in_flight
        assert session.table
        await collect(engine.submit(ask((9,), 2)))
        assert (session.in_flight, session.table) == (0, [])
