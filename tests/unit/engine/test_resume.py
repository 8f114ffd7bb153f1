"""A session that is cut at any token and resumed gives the tokens of the one that was not, either way."""

import asyncio

import pytest

from sllm_node.core.config import ByteSize
from sllm_node.core.errors import PromptTooLongError
from sllm_node.core.types import SamplingParameters
from tests.models import make_checkpoint
from tests.unit.engine.rig import GREEDY, ask, collect, engine_of
from tests.unit.engine.test_families import SERVED

MODES = ("fast", "replay")
PROMPT = (20, 31, 45, 60, 72, 81, 90, 102, 33, 47)
SAMPLED = SamplingParameters(
    temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.2, presence_penalty=0.5,
    frequency_penalty=0.3, seed=11,
)  # fmt: skip
COUNT = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", SERVED)
async def test_cut_anywhere_the_tokens_are_those_of_the_uncut_run(tmp_path, family, sampling):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    settings = {"max_step_tokens": 32, "block_tokens": 4, "prefix_cache": False}
    async with engine_of(checkpoint, **settings) as engine:
        _, whole, logprobs, finish = await collect(
            engine.submit(ask(PROMPT, COUNT, sampling, logprobs=2))
        )
        cuts = [(mode, cut) for mode in MODES for cut in range(1, COUNT)]
        got = await asyncio.gather(*(
            collect(engine.submit(
                ask(PROMPT, COUNT, sampling, logprobs=2, resumed=whole[:cut], resume=mode)
            )) for mode, cut in cuts
        ))  # fmt: skip
    for (_, cut), (_, tokens, logs, end) in zip(cuts, got, strict=True):
        assert tokens == whole[cut:]
        assert end == finish
        assert [(e.token, e.text, e.offset) for e in logs] == [
            (e.token, e.text, e.offset) for e in logprobs[cut:]
        ]
        assert [e.logprob for e in logs] == pytest.approx(
            [e.logprob for e in logprobs[cut:]], abs=1e-4
        )


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_goes_on_behind_the_text_that_was_shown(checkpoint, mode):
    async with engine_of(checkpoint, block_tokens=4) as engine:
        text, tokens, *_ = await collect(engine.submit(ask(PROMPT, 40, SAMPLED)))
        stop = text[len(text) // 2 :][:3]
        shown, seen, stopped = [""], (), None
        async for chunk in engine.submit(ask(PROMPT, 40, SAMPLED, stop=(stop,))):
            assert len(chunk.tokens) == 1
            shown.append(shown[-1] + chunk.text)
            seen, stopped = seen + chunk.tokens, chunk.stop_text
        assert stopped == stop
        assert seen == tokens[: len(seen)]
        for cut in range(1, len(seen)):
            request = ask(PROMPT, 40, SAMPLED, stop=(stop,), resumed=seen[:cut], resume=mode)
            rest, more, _, finish = await collect(engine.submit(request))
            assert (shown[cut] + rest, seen[:cut] + more) == (shown[-1], seen)
            assert finish == "stop"


async def test_in_bfloat16_a_replay_gives_every_bit_of_the_uncut_run(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "m", "llama", "bfloat16", codec="raw")
    async with engine_of(checkpoint, block_tokens=4, prefix_cache=False) as engine:
        whole = await collect(engine.submit(ask(PROMPT, 24, SAMPLED, logprobs=3)))
        for cut in range(1, 24):
            request = ask(PROMPT, 24, SAMPLED, logprobs=3, resumed=whole[1][:cut], resume="replay")
            _, tokens, logs, _ = await collect(engine.submit(request))
            assert (tokens, logs) == (whole[1][cut:], whole[2][cut:])


async def test_replay_is_what_sessions_get_that_do_not_say(checkpoint):
    request = {"resumed": tuple(range(40, 48))}
    for default, steps in (("fast", 1), ("replay", 9)):
        async with engine_of(checkpoint, resume=default) as engine:
            run, made = engine._runner.advance, []
            engine._runner.advance = lambda steps, run=run, made=made: (
                made.extend(steps) or run(steps)
            )
            await collect(engine.submit(ask(PROMPT, 9, **request)))
            assert len(made) == steps


async def test_preempted_sessions_replay_and_no_stream_has_a_token_twice(checkpoint):
    async with engine_of(checkpoint, block_tokens=4) as engine:
        alone = [
            (await collect(engine.submit(ask((*PROMPT, n), 30, SAMPLED))))[:2] for n in range(6)
        ]
        token_bytes = engine._parts.buffers[0].size // engine._parts.blocks.capacity_tokens
    small = {"block_tokens": 4, "kv_cache_bytes": ByteSize(token_bytes * 4 * 20)}
    for is_caching in (True, False):
        async with engine_of(checkpoint, resume="replay", prefix_cache=is_caching, **small) as one:
            got = await asyncio.gather(
                *(collect(one.submit(ask((*PROMPT, n), 30, SAMPLED))) for n in range(6))
            )
            assert one._preempted._value.get()
        assert [(text, tokens) for text, tokens, *_ in got] == alone


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", MODES)
async def test_a_session_that_holds_takes_rounds_of_tokens_and_goes_on_when_let_go(
    checkpoint, mode, caching
):
    async with engine_of(checkpoint, block_tokens=4, prefix_cache=caching) as engine:
        _, tokens, *_ = await collect(engine.submit(ask(PROMPT, 30, SAMPLED)))
        for first, rounds in [(0, (3, 9)), (5, ()), (5, (5, 6, 7)), (0, ()), (1, (20, 28))]:
            request = ask(PROMPT, 30, SAMPLED, resumed=tokens[:first], resume=mode, held=True)
            moved = engine.submit(request)
            at = await moved.standing(-1)
            assert at == first
            for end in rounds:
                moved.extend(max(0, at - 1), tokens[max(0, at - 1) : end], lets_go=False)
                at = end if end == at else await moved.standing(at)
                assert at == end
            moved.extend(at, tokens[at : at + 1], lets_go=True)
            moved.extend(at, tokens[at : at + 5], lets_go=True)  # late copies change nothing
            _, rest, _, finish = await collect(moved)
            assert tokens[: at + 1] + rest == tokens
            assert finish == "length"
            assert await moved.standing(-1) is None


@pytest.mark.parametrize("lets_go", [True, False])
async def test_a_session_that_outgrows_the_node_it_moves_to_ends_there_or_stays_where_it_was(
    checkpoint, lets_go
):
    async with engine_of(checkpoint) as large:
        tokens = (await collect(large.submit(ask(PROMPT, 100, SAMPLED))))[1]
    room = {"kv_cache_bytes": ByteSize(40 << 10)}  # 80 tokens
    async with engine_of(checkpoint, **room) as small:
        request = ask(PROMPT, 500, SAMPLED, resumed=tokens[:60], held=True, open_ended=True)
        moved = small.submit(request)
        assert await moved.standing(-1) == 60
        moved.extend(60, tokens[60:90], lets_go=lets_go)
        assert await moved.standing(60) is None
        if lets_go:
            assert (await collect(moved))[1::2] == ((), "length")
        else:
            with pytest.raises(PromptTooLongError, match="the node that it moves to allows 80"):
                await anext(moved)
        assert (small.running, small.waiting, small.kv_usage) == (0, 0, 0)


async def test_a_session_that_holds_is_no_stall_and_leaves_nothing_when_cancelled(checkpoint):
    async with engine_of(checkpoint, block_tokens=4) as engine:
        tokens = (await collect(engine.submit(ask(PROMPT, 20))))[1]
        moved = engine.submit(ask(PROMPT, 20, resumed=tokens[:7], held=True))
        assert await moved.standing(-1) == 7
        assert engine.watch._since is None
        assert (await collect(engine.submit(ask(PROMPT, 20))))[1] == tokens
        moved.cancel()
        assert await moved.standing(7) is None
        assert (engine.running, engine.waiting) == (0, 0)
