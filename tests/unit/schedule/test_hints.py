import asyncio
from dataclasses import replace

import pytest

from sllm_node.core.config import ModelConfig
from sllm_node.core.errors import PromptTooLongError
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.beginnings import LIMIT_S
from sllm_node.schedule.hints import HINT_S, HINTS_MAX, LONG_CHARACTERS, PAUSE_S
from tests.unit.schedule.fakes import CANCEL_S, EVICTION_S, LOAD_S, STEP_S
from tests.unit.schedule.test_driver import now, on_virtual_time

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


def twice(shares):
    return tuple(replace(share, size=2 * share.size) for share in shares)


def count(n, outcome):
    return n.count("sllm_hints_total", outcome=outcome)


@on_virtual_time
async def test_a_session_joins_the_load_that_its_hint_began(node):
    n = node()
    assert n.service.hint(A)
    await asyncio.sleep(1.5)
    assert await n.ask("a", tokens=3) == "xxx"
    assert now() == pytest.approx(LOAD_S + 3 * STEP_S)
    assert (n.store.loads, count(n, "followed")) == (["a"], 1)


@on_virtual_time
async def test_a_request_whose_tokenizer_must_be_read_begins_its_load_at_once(node):
    n = node()
    n.service.expect("a", 10)
    await n.service.prepare("a")
    assert await n.ask("a", tokens=1) == "x"
    assert now() == pytest.approx(LOAD_S + STEP_S)


@on_virtual_time
async def test_a_load_begins_before_its_tokenizer_is_read_and_its_module_is_built(node):
    n = node()
    n.store.begin_s = LIMIT_S / 2
    n.service.expect("a", 10)
    await n.service.prepare("a")
    assert await n.ask("a", tokens=1) == "x"
    assert n.engines.reading == [("a", LIMIT_S / 2)]
    assert n.engines.building == [("a", LIMIT_S / 2)]
    await n.ask("b", tokens=1)  # for which an eviction is under way first
    building = EVICTION_S + LIMIT_S / 2
    assert n.engines.building[-1] == ("b", pytest.approx(LOAD_S + STEP_S + building))


@on_virtual_time
async def test_a_tokenizer_is_read_soon_although_an_eviction_before_the_load_takes_long(node):
    n = node()
    await n.ask("b", tokens=1)
    start = now()
    n.service.expect("a", 10)
    await n.service.prepare("a")
    assert n.engines.reading[-1] == ("a", pytest.approx(start + LIMIT_S))
    assert await n.ask("a", tokens=1) == "x"


@on_virtual_time
async def test_only_a_long_text_gives_a_hint_once_the_tokenizer_is_there(node):
    n = node()
    await n.service.prepare("a")
    n.service.expect("a", LONG_CHARACTERS - 1)
    assert n.service.status("a").state is ModelState.IDLE
    n.service.expect("a", LONG_CHARACTERS)
    assert n.service.status("a").state is ModelState.LOADING


@on_virtual_time
async def test_a_hint_takes_no_room_from_a_model_in_use(node):
    n = node()
    stream = n.open("b", tokens=100)
    await stream.started.wait()
    assert not n.service.hint(A)
    assert count(n, "no room") == 1
    assert await n.ask("b", tokens=1) == "x"
    stream.cancel()


@on_virtual_time
async def test_a_hint_takes_the_room_of_an_idle_model(node):
    n = node()
    await n.ask("b", tokens=1)
    start = now()
    assert n.service.hint(A)
    assert await n.ask("a", tokens=1) == "x"
    assert now() - start == pytest.approx(EVICTION_S + LOAD_S + STEP_S)


@on_virtual_time
async def test_a_hint_of_higher_priority_leaves_those_alone_whom_it_can_not_replace(node):
    n = node(pages=2, models={"a": ModelConfig(priority=1)})
    one_page = n.engines.shares
    n.engines.shares = lambda cp: twice(one_page(cp)) if cp.model == A else one_page(cp)
    stream = n.open("b", tokens=100)
    await stream.started.wait()
    await n.ask("c", tokens=1)
    assert not n.service.hint(A)
    assert n.service.status("c").state is ModelState.READY
    assert n.open("b", tokens=1).is_granted
    stream.cancel()


@on_virtual_time
async def test_an_eviction_for_another_reason_makes_no_room_for_a_hint(node):
    n = node(pages=2)
    one_page = n.engines.shares
    n.engines.shares = lambda cp: twice(one_page(cp)) if cp.model == A else one_page(cp)
    stream = n.open("b", tokens=100)
    await stream.started.wait()
    await n.ask("c", tokens=1)
    unloading = asyncio.create_task(n.service.unload("c"))
    await asyncio.sleep(0)
    assert not n.service.hint(A)
    assert n.service.status("a").state is ModelState.IDLE
    await unloading
    stream.cancel()


@on_virtual_time
async def test_a_hint_ends_when_a_session_needs_the_room_that_is_made_for_it(node):
    n = node()
    await n.ask("b", tokens=1)
    assert n.service.hint(A)
    start = now()
    assert await n.ask("c", tokens=1) == "x"
    assert now() - start == pytest.approx(EVICTION_S + LOAD_S + STEP_S)
    assert (n.store.loads, count(n, "gave way")) == (["b", "c"], 1)
    await asyncio.sleep(HINT_S)
    assert count(n, "not followed") is None
    assert n.service.hint(A)  # its model gets hints as before


@on_virtual_time
async def test_hints_that_wait_for_an_eviction_keep_no_other_hint_away(node):
    n = node(names=("a", "b", "c", "d"), pages=2)
    await n.ask("b", tokens=1)
    await n.ask("c", tokens=1)
    assert n.service.hint(A)
    assert n.service.status("a").state is ModelState.QUEUED
    assert n.service.hint(ModelId("d"))


@on_virtual_time
async def test_a_hint_waits_behind_nobody(node):
    n = node()
    stream = n.open("b", tokens=100)
    await stream.started.wait()
    waiting = n.open("c")
    assert not n.service.hint(A)
    waiting.cancel()
    stream.cancel()


@on_virtual_time
async def test_a_hint_that_no_session_follows_ends_and_its_model_gets_none_for_a_while(node):
    n = node(models={"a": ModelConfig(keep_alive_s=0)})
    n.service.expect("a", 10)
    with pytest.raises(PromptTooLongError):
        n.open("a", prompt=range(10_000))
    await asyncio.sleep(HINT_S + EVICTION_S + 0.1)
    assert n.service.status("a").state is ModelState.IDLE
    assert count(n, "not followed") == 1
    assert not n.service.hint(A)
    assert await n.ask("a", tokens=1) == "x"  # a session may load it
    await asyncio.sleep(PAUSE_S)
    assert n.service.hint(A)


@on_virtual_time
async def test_a_load_that_no_session_follows_is_aborted(node):
    n = node()
    n.engines.open_s = 2 * HINT_S
    n.service.hint(A)
    await asyncio.sleep(HINT_S + 1)
    assert n.service.status("a").state is ModelState.IDLE
    n.engines.open_s = 0.0
    assert await n.ask("b", tokens=1) == "x"


@on_virtual_time
async def test_a_session_takes_the_room_of_a_load_that_only_a_hint_began(node):
    n = node()
    assert n.service.hint(A)
    await asyncio.sleep(LOAD_S / 2)
    start = now()
    assert await n.ask("b", tokens=1) == "x"
    assert now() - start == pytest.approx(CANCEL_S + LOAD_S + STEP_S)
    assert (n.store.loads, count(n, "gave way")) == (["a", "b"], 1)
    assert n.store.on_device == {"b"}
    assert await n.ask("a", tokens=1) == "x"  # the session that the hint was for, late


@on_virtual_time
async def test_a_session_takes_the_room_of_a_hinted_load_whose_replica_is_open_already(node):
    n = node()
    n.store.early_s = LOAD_S / 4
    assert n.service.hint(A)
    await asyncio.sleep(LOAD_S / 2)
    assert n.store.leased == {"a"}
    assert await n.ask("b", tokens=1) == "x"
    assert n.engines.replicas[A].is_closed
    assert n.store.leased == {"b"}


@on_virtual_time
async def test_a_load_that_somebody_else_waits_for_outlives_its_hint(node):
    n = node()
    n.engines.open_s = 2 * HINT_S
    n.service.hint(A)
    await n.service.load("a")
    assert n.service.status("a").state is ModelState.READY


@on_virtual_time
async def test_hints_at_once_have_a_limit(node):
    names = [f"m{i}" for i in range(HINTS_MAX + 1)]
    n = node(names=names, pages=len(names))
    assert [n.service.hint(ModelId(name)) for name in names] == [*[True] * HINTS_MAX, False]


@on_virtual_time
async def test_a_hint_for_a_model_that_does_not_exist_does_nothing(node):
    n = node()
    assert not n.service.hint(ModelId("none"))
    n.service.drain()
    assert not n.service.hint(A)
