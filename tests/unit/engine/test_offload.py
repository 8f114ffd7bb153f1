"""Blocks of preempted sessions in the pool: what is decided, and that no token changes by it."""

import asyncio
import contextlib

import pytest
import torch

from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize
from sllm_node.core.errors import EngineError
from sllm_node.core.types import SamplingParameters
from sllm_node.core.units import MIB
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.batch import Batch
from sllm_node.engine.block_copies import BlockCopies, block_bytes
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.kv import KvCache
from sllm_node.engine.offload import Offload, Rates, Room, Transfer, is_faster
from tests.models import make_checkpoint, make_model
from tests.unit.engine.offload_rig import PROMPTS, Served
from tests.unit.engine.rig import GREEDY, ask, collect, engine_and_engines_of, reference
from tests.unit.engine.test_batch import BLOCK, make, step

PROMPT = tuple(range(10, 17))
SAMPLED = SamplingParameters(temperature=0.9, seed=11)


# --- the decision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "prompt", "steps", "expected"),
    [(999, 1, 0, True), (1000, 1, 0, False), (10_999, 1, 1, True), (11_000, 1, 1, False)],
)
def test_the_faster_of_copies_and_steps_is_chosen(size, prompt, steps, expected):
    rates = Rates(step_s=10.0, token_s=1.0, byte_s=0.001)
    assert is_faster(rates, size, prompt, steps) is expected


@pytest.mark.parametrize(
    "rates", [Rates(byte_s=1.0), Rates(token_s=1.0), Rates(step_s=9.0, byte_s=1.0)]
)
def test_what_is_not_known_is_tried(rates):
    assert is_faster(rates, 10**9, 1, 0)


def test_rates_are_learned_from_steps_and_copies():
    rates = Rates()
    rates.stepped(0, 0.5)
    rates.stepped(0, 0.25)
    rates.stepped(0, 1e-5)  # it was read when it had ended
    rates.stepped(100, 0.475)
    rates.stepped(100, 0.1)  # a piece that took less than a step without one tells nothing
    rates.copied(1000, 2.0)
    assert (rates.step_s, rates.byte_s) == (0.375, 0.002)
    assert rates.token_s == pytest.approx(0.001)


def test_slow_copies_are_tried_again_after_some_time():
    rates = Rates(token_s=1.0, byte_s=2.0)
    declined = 0
    while not is_faster(rates, 1, 1, 0):
        rates.declined()
        declined += 1
    assert declined == 14


class Chunks:
    """A pool whose chunks hold two blocks."""

    chunk_bytes = 2 * BLOCK

    def __init__(self, count):
        self.free = count

    def lend(self, count):
        if count > self.free:
            return None
        self.free -= count
        return Lent(self, count)


class Lent:
    def __init__(self, pool, count):
        self.pool, self.views = pool, (memoryview(b""),) * count

    def close(self):
        self.pool.free += len(self.views)
        self.views = ()


def crowded(chunks=8, limit=8, **more):
    """Return a batch without cache, its pool, and a session of seven tokens that was preempted."""
    pool = Chunks(chunks)
    offload = Offload(Room(pool, limit * pool.chunk_bytes), BLOCK)
    made = Batch(Blocks(8, BLOCK, is_caching=False), 8, 16)
    made.offload = offload
    session = make(1, prompt=6, max_tokens=9, **more)
    made.add(session)
    step(made)
    step(made)
    return made, pool, session


def test_a_preempted_session_goes_on_where_it_was():
    made, pool, session = crowded()
    made._preempt(session)
    (out,) = made.offload.take()
    assert (out.blocks, out.is_back, pool.free) == ((0, 1), False, 7)
    made.offload.carried_out([out], 0.1)
    (part,) = made.plan()
    (back,) = made.offload.take()
    assert (part.start, part.count, back.is_back, back.loan) == (7, 1, True, out.loan)
    assert pool.free == 7
    made.stepped([part])
    assert (pool.free, made.offload.kept) == (8, 0)
    assert made.offload.tally.taken() == {"copied": 1}


@pytest.mark.parametrize("room", [{"chunks": 0}, {"limit": 0}])
def test_without_room_in_the_pool_it_computes_again(room):
    made, _, session = crowded(**room)
    made._preempt(session)
    assert made.offload.take() == []
    assert made.offload.tally.taken() == {"no_room": 1}
    assert [(part.start, part.count) for part in made.plan()] == [(0, 8)]


def test_where_copies_are_slow_it_computes_again():
    made, pool, session = crowded()
    made.offload.rates.stepped(10, 0.01)
    made.offload.rates.copied(1, 1.0)
    made._preempt(session)
    assert (made.offload.take(), pool.free) == ([], 8)
    assert made.offload.tally.taken() == {"computed": 1}


@pytest.mark.parametrize(("byte_s", "decision"), [(0.05, "copied"), (0.07, "computed")])
def test_a_replay_weighs_a_step_for_each_token_of_its_output(byte_s, decision):
    made, _, session = crowded(resume="replay")  # two blocks, and one token that a step computed
    made.offload.rates = Rates(step_s=1.0, token_s=1e-9, byte_s=byte_s)
    made._preempt(session)
    assert made.offload.tally.taken() == {decision: 1}


@pytest.mark.parametrize("moment", ["decided", "under way", "there"])
def test_chunks_come_back_when_a_paused_session_ends_and_no_copy_works_on_them(moment):
    made, pool, session = crowded()
    made._preempt(session)
    taken = [] if moment == "decided" else made.offload.take()
    if moment == "there":
        made.offload.carried_out(taken, 0.1)
    made.end(session)
    assert pool.free == (7 if moment == "under way" else 8)
    made.offload.carried_out(taken, None)
    assert (pool.free, made.offload.take(), made.offload.kept) == (8, [], 0)


def test_chunks_come_back_when_a_session_ends_on_its_way_back_and_its_step_has():
    made, pool, session = crowded()
    made._preempt(session)
    made.offload.carried_out(made.offload.take(), 0.1)
    plan = made.plan()
    made.offload.carried_out(made.offload.take(), None)
    made.end(session)
    assert pool.free == 7
    made.stepped(plan)
    assert pool.free == 8


def test_what_was_cached_is_found_and_only_the_rest_comes_back():
    offload = Offload(Room(Chunks(8), 99), BLOCK)
    made = Batch(Blocks(8, BLOCK), 8, 16)
    made.offload = offload
    session = make(1, prompt=10)
    made.add(session)
    step(made)
    made._preempt(session)
    offload.carried_out(offload.take(), 0.1)
    (part,) = made.plan()
    (back,) = offload.take()
    assert (part.start, back.first, len(back.blocks)) == (10, 2, 1)


def test_what_is_on_its_way_back_when_all_is_forgotten_is_not_found():
    pool = Chunks(8)
    made = Batch(Blocks(8, BLOCK), 8, 16)
    made.offload = Offload(Room(pool, 99), BLOCK)
    session = make(1, prompt=10)
    made.add(session)
    step(made)
    made._preempt(session)
    made.offload.carried_out(made.offload.take(), 0.1)
    made.blocks.forget()  # others have taken its blocks
    plan = made.plan()
    made.offload.take()
    made.forget()
    made.stepped(plan)
    assert made._find(make(2, prompt=10, like=1)) == []
    assert (pool.free, made.offload.kept) == (8, 0)


def test_a_failed_step_gives_up_all_that_lies_in_the_pool():
    made, pool, session = crowded()
    other = make(2, prompt=4)
    made.add(other)
    step(made)
    made._preempt(session)
    made.offload.take()
    session.request = make(1, prompt=99).request  # it waits for more blocks than there are
    made.failed(made.plan())
    assert (pool.free, made.offload.kept) == (8, 0)


# --- the copies -------------------------------------------------------------------------------------


class Cache(KvCache):
    """Two layers of six blocks with two tokens, of different shapes and all different numbers."""

    def __init__(self):
        count = iter(range(4))
        shapes = [(12, 2, 3), (12, 1, 5), (12, 2, 3), (12, 1, 4)]
        made = [torch.rand(shape) + next(count) for shape in shapes]
        self.keys, self.values = made[::2], made[1::2]

    def content(self, block):
        slots = slice(2 * block, 2 * block + 2)
        return [tensor[slots].clone() for tensor in (*self.keys, *self.values)]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_blocks_go_to_the_pool_and_come_back_to_others(first):
    cache = Cache()
    size = block_bytes(cache, 2)
    assert size == 2 * 4 * (6 + 5 + 6 + 4)
    copies = BlockCopies(cache, 2, 2)
    loan = Lent(Chunks(2), 2)
    loan.views = tuple(memoryview(bytearray(2 * size + 3)) for _ in range(2))
    taken = [cache.content(block) for block in (4, 1, 3, 0)]
    copies.run([Transfer(loan, 4, 0, (4, 1, 3, 0), is_back=False)])
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    places = (5, 2, 0, 1)[first:]
    copies.run([Transfer(loan, 4, first, places, is_back=True)])
    for block, content in zip(places, taken[first:], strict=True):
        assert all(map(torch.equal, cache.content(block), content))
    for block in {0, 1, 2, 3, 4, 5} - set(places):
        assert not any(tensor.any() for tensor in cache.content(block))


# --- in an engine -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def crowded_engine(checkpoint, blocks, **more):
    """Yield an engine with room for few blocks; no time passes, so copies are always taken."""
    async with engine_and_engines_of(checkpoint, None, block_tokens=4) as (engine, _):
        size = engine._parts.buffers[0].size // engine._parts.blocks.total
    config = {
        "block_tokens": 4, "max_step_tokens": 16, "kv_offload": True,
        "kv_cache_bytes": ByteSize(size * blocks), "kv_offload_bytes": ByteSize(1 << 20), **more,
    }  # fmt: skip
    async with engine_and_engines_of(checkpoint, ManualClock(), **config) as (engine, engines):
        yield engine
    assert engines._memory.loans
    assert not any(loan.buffers for loan in engines._memory.loans)
    assert not engine._parts.offloading.offload.kept


def copied(engine):
    """Return bytes out and in."""
    return [engine._parts.offloading._bytes(way)._value.get() for way in ("out", "in")]


@pytest.mark.parametrize(
    ("family", "blocks", "more"),
    [
        ("llama", 17, {}),
        ("llama", 17, {"prefix_cache": False, "launch_ahead": "always"}),
        ("llama", 17, {"resume": "replay", "launch_ahead": "always"}),
        ("mistral", 10, {"prefix_cache": False}),  # with a window
        ("gemma2", 17, {}),
    ],
)
async def test_tokens_equal_those_of_generate_with_sessions_in_the_pool(
    tmp_path, family, blocks, more
):
    checkpoint, model = make_checkpoint(tmp_path, "m", family), make_model(family)
    prompts = [(*PROMPT, *range(100 + n, 103 + n)) for n in range(0, 60, 10)]
    async with crowded_engine(checkpoint, blocks, **more) as engine:
        sent = [engine.submit(ask(prompt, 24)) for prompt in prompts]
        got = await asyncio.gather(*map(collect, sent))
        assert min(copied(engine)) > 0
        assert engine._parts.blocks.free == engine._parts.blocks.total
    assert [tokens for _, tokens, _, _ in got] == [reference(model, p, 24) for p in prompts]


async def test_tokens_are_the_same_with_chunks_of_the_store(tmp_path):
    async with Served(tmp_path, [CpuDevice(64 * MIB)]) as served:
        await served.check_tokens(PROMPTS[:3], "fast", rounds=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


async def one_in_the_pool(engine, sampling=GREEDY):
    """Return two generations, the second of which has just been paused."""
    sent = [engine.submit(ask((*PROMPT, n), 40, sampling)) for n in range(2)]
    async for _ in sent[0]:
        if engine._parts.offloading.offload.kept:
            return sent
    raise AssertionError("nobody was preempted")


async def test_a_client_that_leaves_meanwhile_leaves_nothing_in_the_pool(checkpoint):
    async with crowded_engine(checkpoint, 14) as engine:
        first, second = await one_in_the_pool(engine)
        second.cancel()
        await collect(first)
        assert not engine._parts.offloading.offload.kept
        assert copied(engine)[1] == 0


async def test_an_engine_that_closes_meanwhile_leaves_nothing_in_the_pool(checkpoint):
    async with crowded_engine(checkpoint, 14) as engine:
        await one_in_the_pool(engine)
        await engine.close()


async def test_a_copy_to_the_pool_that_fails_disturbs_no_session(checkpoint, caplog):
    model = make_model("llama")
    async with crowded_engine(checkpoint, 14) as engine:
        fail_once(engine._parts.offloading._copies, "run")
        sent = [engine.submit(ask((*PROMPT, n), 40)) for n in range(2)]
        got = await asyncio.gather(*map(collect, sent))
        expected = [reference(model, (*PROMPT, n), 40) for n in range(2)]
        assert [tokens for _, tokens, _, _ in got] == expected
        assert copied(engine) == [0, 0]
        assert engine._preempted._value.get() == 1
    (record,) = [one for one in caplog.records if "copy to the pool failed" in one.message]
    assert (record.model, record.error) == ("m", "ZeroDivisionError: ")


def test_a_copy_to_the_pool_that_fails_gives_its_chunks_back_and_no_others():
    made, pool, session = crowded()
    other = make(2, prompt=4)
    made.add(other)
    step(made)
    made._preempt(session)
    made.offload.carried_out(made.offload.take(), 0.1)
    made._preempt(other)
    made.offload.lost(made.offload.take())
    assert (pool.free, made.offload.kept) == (7, 1)
    plan = made.plan()
    assert [(part.session, part.start) for part in plan] == [
        (session, session.computed),
        (other, 0),
    ]


async def test_after_a_failed_step_a_paused_session_computes_again(checkpoint):
    model = make_model("llama")
    async with crowded_engine(checkpoint, 14) as engine:
        sent = await one_in_the_pool(engine)
        fail_once(engine._runner, "advance")
        with pytest.raises(EngineError):
            await collect(sent[0])
        _, tokens, _, _ = await collect(sent[1])
        assert tokens == reference(model, (*PROMPT, 1), 40)
        assert copied(engine)[1] == 0


def fail_once(owner, name):
    """Let the next call of a method fail, and no later one."""

    def fail(*_):
        delattr(owner, name)
        raise ZeroDivisionError

    setattr(owner, name, fail)
