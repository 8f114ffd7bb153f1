"""Sessions that begin while their model is still loading."""

import asyncio

import pytest

from sllm_node.core.errors import ChecksumError, QueueTimeoutError
from sllm_node.core.types import ModelId, ModelState
from tests.unit.schedule.fakes import CANCEL_S, EVICTION_S, LOAD_S, STEP_S
from tests.unit.schedule.test_driver import now, on_virtual_time

A = ModelId("a")
EARLY_S = 0.5


def early(node, **options):
    made = node(**options)
    made.store.early_s = EARLY_S
    return made


async def until(time):
    await asyncio.sleep(time - now())


@on_virtual_time
async def test_a_session_is_computed_before_the_load_has_ended_and_granted_then(node):
    n = early(node)
    stream, later = n.open("a"), None
    await until(1.0)
    replica = n.engines.replicas[A]
    assert replica.running == {"r-1-0"}
    later = n.open("a")
    assert replica.running == {"r-1-0", "r-2-0"}
    status = n.service.status("a")
    assert (status.state, status.waiting, status.running) == (ModelState.LOADING, 2, 0)
    assert not (stream.is_granted)
    assert not (replica.is_loaded)
    texts = ["".join([chunk.text async for chunk in one]) for one in (stream, later)]
    assert texts == ["xxx", "xxx"]
    assert replica.is_loaded
    assert stream.granted == pytest.approx(LOAD_S)
    assert n.count("sllm_queue_seconds_sum", model="a") == pytest.approx(LOAD_S + LOAD_S - 1.0)


@on_virtual_time
async def test_without_overlap_nothing_begins_before_the_load_has_ended(node):
    n = early(node, overlap=False)
    n.open("a")
    await until(1.9)
    assert not n.engines.replicas


@on_virtual_time
async def test_a_load_that_fails_after_sessions_began_is_told_to_all_and_closes_the_replica(node):
    n = early(node)
    n.store.error = ChecksumError("a", "shard-00000.bin", 0, 4096)
    streams = [n.open("a") for _ in range(2)]
    await until(1.0)
    replica = n.engines.replicas[A]
    for stream in streams:
        with pytest.raises(ChecksumError):
            await anext(stream)
    assert replica.is_closed
    assert not (replica.running)
    assert not (n.store.leased)
    assert n.service.status("a").state is ModelState.IDLE
    n.store.error = None
    assert await n.ask("a") == "xxx"
    assert n.engines.replicas[A] is not replica


@on_virtual_time
async def test_who_comes_when_a_load_has_just_ended_and_is_aborted_waits_for_the_next(node):
    n = early(node)
    first, came = n.open("a"), []
    await until(1.0)
    replica = n.engines.replicas[A]

    def leave_and_come():
        first.cancel()
        came.append(n.open("a"))

    # Behind the end of the load's task and before what follows from it.
    replica.loaded = lambda: asyncio.get_running_loop().call_soon(leave_and_come)
    await until(LOAD_S + 0.1)
    assert not replica.running
    assert "".join([chunk.text async for chunk in came[0]]) == "xxx"
    assert replica.is_closed
    assert n.store.loads == ["a", "a"]


@on_virtual_time
async def test_a_session_cancelled_while_it_waits_leaves_the_others_alone(node):
    n = early(node)
    gone, stays = n.open("a"), n.open("a")
    await until(1.0)
    gone.cancel()
    assert n.engines.replicas[A].running == {"r-2-0"}
    assert "".join([chunk.text async for chunk in stays]) == "xxx"
    assert now() == pytest.approx(LOAD_S + 3 * STEP_S)


@on_virtual_time
async def test_when_nobody_waits_any_more_the_replica_is_closed_and_the_memory_comes_back(node):
    n = early(node)
    stream = n.open("a")
    await until(1.0)
    stream.cancel()
    assert n.service.status("a").state is ModelState.EVICTING
    other = n.open("b")
    await until(1.0 + EVICTION_S + CANCEL_S + 0.01)
    assert n.engines.replicas[A].is_closed
    assert n.store.loading == {"b"}
    assert "".join([chunk.text async for chunk in other]) == "xxx"


@on_virtual_time
async def test_who_comes_while_such_a_load_is_being_aborted_gets_a_new_one(node):
    n = early(node)
    n.open("a").cancel()
    stream = n.open("a")
    await until(1.0)
    stream.cancel()
    assert await n.ask("a") == "xxx"
    assert n.engines.replicas[A].running == set()


@on_virtual_time
async def test_a_session_that_waits_too_long_for_a_load_is_told_so(node):
    n = early(node, queue_timeout_s=1.0)
    stream = n.open("a")
    with pytest.raises(QueueTimeoutError):
        await anext(stream)
    assert n.engines.replicas[A].running == set()


@on_virtual_time
async def test_a_request_that_the_engine_refuses_is_told_when_its_turn_comes(node):
    n = early(node)
    n.engines.submit_error = ChecksumError("a", "shard", 0, 1)
    stream = n.open("a")
    with pytest.raises(ChecksumError):
        await anext(stream)
    assert now() == pytest.approx(LOAD_S)


@on_virtual_time
async def test_a_load_that_an_operator_asked_for_ends_with_the_load(node):
    n = early(node)
    await n.service.load("a")
    assert now() == pytest.approx(LOAD_S)
    assert n.service.status("a").state is ModelState.READY


@on_virtual_time
async def test_closing_the_node_in_the_middle_leaves_nothing(node):
    n = early(node)
    stream = n.open("a")
    await until(1.0)
    await n.service.close()
    with pytest.raises(Exception, match=r"drain|stop"):
        await anext(stream)
    assert n.engines.replicas[A].is_closed
    assert not n.store.leased
    await until(3.0)


@on_virtual_time
async def test_no_more_sessions_begin_than_a_replica_may_serve(node):
    n = early(node)
    n.service._early._limit = 2
    streams = [n.open("a") for _ in range(4)]
    await until(1.0)
    assert len(n.engines.replicas[A].running) == 2
    for stream in streams:
        assert "".join([chunk.text async for chunk in stream]) == "xxx"
