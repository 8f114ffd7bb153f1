"""Turns carried out: on futures that the test ends, and with two engines on one device."""

import asyncio
import contextlib
from itertools import pairwise

import pytest

from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.batch import prompt_tokens
from sllm_node.engine.interleave import Interleaving, Job
from sllm_node.engine.turns import Need, Turns
from tests.models import make_checkpoint
from tests.unit.engine.rig import Weights, ask, collect, engines_of
from tests.unit.engine.test_stall import Hang


class Engine:
    """Asks for turns, whose jobs end when the test says so."""

    def __init__(self, device, log, name):
        self.seat, self.log, self.name = device.join(), log, name
        self.job = None

    def begin(self):
        self.log.append(f"{self.name} begins")
        self.job = asyncio.get_running_loop().create_future()
        return Job(self.job, 0, 0.0)

    async def go(self, begin=None):
        job = await self.seat.turn(Need(), begin or self.begin)
        if job is not None:
            await job.future
            self.log.append(f"{self.name} has its result")
        return job


def engines(count):
    device, log = Interleaving(Turns(0.05, 128), ManualClock()), []
    return [Engine(device, log, name) for name in "abc"[:count]], log


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_next_turn_begins_before_the_result_of_the_last_is_used():
    (a, b), log = engines(2)
    async with asyncio.TaskGroup() as group:
        group.create_task(a.go())
        group.create_task(b.go())
        await settle()
        assert log == ["a begins"]
        a.job.set_result(None)
        await settle()
        assert log == ["a begins", "b begins", "a has its result"]
        b.job.set_result(None)


async def test_who_has_nothing_to_do_after_all_or_fails_to_begin_makes_room_for_the_next():
    (a, b, c), log = engines(3)

    def fail():
        raise ZeroDivisionError

    first = asyncio.create_task(a.go())
    await settle()
    failing = asyncio.create_task(b.go(fail))
    nothing = asyncio.create_task(b.seat._device.join().turn(Need(), lambda: None))
    last = asyncio.create_task(c.go())
    await settle()
    a.job.set_result(None)
    await settle()
    assert log[:2] == ["a begins", "c begins"]
    c.job.set_result(None)
    assert await nothing is None
    with pytest.raises(ZeroDivisionError):
        await failing
    await asyncio.gather(first, last)


async def test_a_job_that_fails_ends_its_turn():
    (a, b), log = engines(2)
    first, second = asyncio.create_task(a.go()), asyncio.create_task(b.go())
    await settle()
    a.job.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await first
    b.job.set_result(None)
    await second
    assert log == ["a begins", "b begins", "b has its result"]


async def test_who_is_cancelled_while_it_waits_has_no_turn():
    (a, b, c), log = engines(3)
    tasks = [asyncio.create_task(one.go()) for one in (a, b, c)]
    await settle()
    tasks[1].cancel()
    a.job.set_result(None)  # in the same moment
    await settle()
    assert log == ["a begins", "c begins", "a has its result"]
    c.job.set_result(None)
    await asyncio.gather(tasks[0], tasks[2])
    again = asyncio.create_task(b.go())
    await settle()
    b.job.set_result(None)
    await again


async def test_an_engine_is_alone_until_another_joins_and_when_it_has_left():
    device = Interleaving(Turns(0.05, 128), ManualClock())
    first = device.join()
    seen = [first.is_alone]
    second = device.join()
    seen.append(first.is_alone)
    second.leave()
    second.leave()
    seen.append(first.is_alone)
    assert seen == [True, False, True]


# --- two models on one device -----------------------------------------------------------------------

PROMPT = tuple(range(10, 60))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return [make_checkpoint(store, name, seed=seed) for seed, name in enumerate(("reads", "asks"))]


@contextlib.asynccontextmanager
async def two_models(checkpoints, clock=None, **more):
    """Yield two engines of one device."""
    config = EngineConfig(
        kv_cache_bytes=ByteSize(8 << 20), torch_threads=1, prefill_beside_tokens=8,
        inter_token_target_s=0.0, prefix_cache=False, **more,
    )  # fmt: skip
    with CpuDevice(1 << 30) as device:
        made = engines_of(device, config, clock)
        weights, opened = [], []
        for checkpoint in checkpoints:
            weights.append(Weights(checkpoint, device))
            codec = await made.load_codec(checkpoint.path)
            opened.append(await made.open(weights[-1], await made.skeleton(checkpoint), codec))
        yield opened
        for engine, one in zip(opened, weights, strict=True):
            await engine.close()
            one.buffer.close()
        made.close()
        assert device.memory_used == 0


def watch_steps(name, engine, steps):
    """Append (name, tokens of prompts) of each step that is launched, and how many are under way."""
    launches = engine._launches

    def watched(count):
        if count:
            tokens = [prompt_tokens(plan) for plan in engine._flight]
            steps.append((name, sum(tokens[len(tokens) - count :]), sum(map(bool, tokens))))
        return launches(count)

    engine._launches = watched


@pytest.mark.parametrize("ahead", ["never", "always"])
async def test_a_models_readers_wait_for_one_piece_of_anothers_prompt_at_a_time(checkpoints, ahead):
    async with two_models(checkpoints, launch_ahead=ahead) as (reads, asks):
        alone = await collect(asks.submit(ask(PROMPT, 3)))
        expected = await collect(reads.submit(ask(PROMPT[:5], 60)))
        generation = reads.submit(ask(PROMPT[:5], 60))
        first = await anext(generation)
        steps = []
        watch_steps("reads", reads, steps)
        watch_steps("asks", asks, steps)
        assert await collect(asks.submit(ask(PROMPT, 3))) == alone
        rest = await collect(generation)
        assert first.tokens + rest[1] == expected[1]
    pieces = [number for number, step in enumerate(steps) if step[1]]
    assert sum(step[1] for step in steps) in (len(PROMPT), len(PROMPT) - 1)  # a last piece of 1
    assert max(step[1] for step in steps) == 8
    assert max(step[2] for step in steps) == 1  # not one launched behind another
    between = [steps[start + 1 : end] for start, end in pairwise(pieces)]
    assert all("reads" in [step[0] for step in one] for one in between)


@pytest.mark.parametrize("ahead", ["never", "always"])
async def test_a_prompt_is_cut_from_the_first_token_of_anothers_reader_on(checkpoints, ahead):
    more = {"launch_ahead": ahead, "max_step_tokens": 32}
    async with two_models(checkpoints, **more) as (reads, asks):
        steps = []
        watch_steps("reads", reads, steps)
        watch_steps("asks", asks, steps)
        long = asks.submit(ask(PROMPT * 10, 1))
        await collect(reads.submit(ask(PROMPT[:5], 6)))
        await collect(long)
    first = next(number for number, step in enumerate(steps) if step[0] == "reads")
    behind = steps[first + 1 :]
    last = max(number for number, step in enumerate(behind) if step[0] == "reads")
    assert {step[1] for step in steps[:first] if step[0] == "asks"} <= {32, 2 * 32}  # two at once
    assert {step[1] for step in behind[:last] if step[0] == "asks"} == {8}


async def test_without_readers_elsewhere_a_prompt_is_one_step(checkpoints):
    async with two_models(checkpoints) as (reads, asks):
        await collect(reads.submit(ask(PROMPT[:5], 4)))
        steps = []
        watch_steps("asks", asks, steps)
        await collect(asks.submit(ask(PROMPT, 1)))
        assert steps == [("asks", len(PROMPT), 1)]


async def test_an_engine_with_nothing_to_do_is_not_stalled_while_anothers_step_hangs(checkpoints):
    clock = ManualClock()
    async with two_models(checkpoints, clock, stall_after_s=5.0) as (reads, asks):
        with Hang(reads._runner.advance) as hang:
            reads._runner.advance = hang
            last = asks.submit(ask(PROMPT[:5], 1))
            hung = reads.submit(ask(PROMPT[:5], 1))
            await collect(last)
            await hang.begun.wait()  # its turn began before that token was handed out
            await settle()
            clock.advance(6.0)
            assert (reads.stalled_s, asks.stalled_s) == (6.0, None)
            late = asks.submit(ask(PROMPT[:5], 1))
            clock.advance(6.0)
            assert (reads.stalled_s, asks.stalled_s) == (12.0, 6.0)  # this one has work
            late.cancel()  # before its turn comes
            assert asks.stalled_s is None
        await collect(hung)


class Unknown(Weights):
    """Weights whose way nobody can tell."""

    @property
    def arrival(self):
        raise ZeroDivisionError


async def test_an_engine_that_can_not_be_opened_leaves_no_seat_behind(checkpoints):
    device = CpuDevice(1 << 30)  # not closed: its KV memory is not given back
    config = EngineConfig(kv_cache_bytes=ByteSize(8 << 20), torch_threads=1)
    made, weights = engines_of(device, config), Unknown(checkpoints[0], device)
    codec = await made.load_codec(checkpoints[0].path)
    with pytest.raises(ZeroDivisionError):
        await made.open(weights, await made.skeleton(checkpoints[0]), codec)
    assert [one.seats for one in made._turns.values()] == [0]
    weights.buffer.close()
    made.close()


async def test_the_time_before_a_step_begins_is_counted(checkpoints):
    async with two_models(checkpoints) as (reads, _):
        await collect(reads.submit(ask(PROMPT[:5], 4)))
        assert reads._step_wait._sum.get() >= 0.0
        assert sum(bucket.get() for bucket in reads._step_wait._buckets) == 4
