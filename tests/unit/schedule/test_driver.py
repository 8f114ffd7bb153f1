import asyncio
import functools
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from sllm_node.core import log as logs
from sllm_node.core.config import EngineConfig, ModelConfig
from sllm_node.core.errors import (
    CancelledByOperatorError,
    CheckpointChangedError,
    CheckpointFormatError,
    DrainingError,
    EngineError,
    GivenBackError,
    InvalidRequestError,
    JournalError,
    LoadFailedError,
    ModelBusyError,
    ModelNotFoundError,
    NodeFullError,
    NotServableError,
    PromptTooLongError,
    QueueTimeoutError,
    StoppingError,
    StorageReadError,
)
from sllm_node.core.log import JsonFormatter
from sllm_node.core.types import ModelId, ModelState, SessionId, Tier
from sllm_node.library.dicts import save as save_dict
from sllm_node.schedule.stream import request_of
from tests.sim.loop import run
from tests.unit.schedule.fakes import (
    CONTEXT_TOKENS,
    EVICTION_S,
    LOAD_S,
    STEP_S,
    make_node,
    write_checkpoint,
)


def on_virtual_time(test):
    """Run an async test on a loop whose time jumps; at its end nothing may be left."""

    @functools.wraps(test)
    def wrapper(tmp_path):
        async def play():
            made = []

            def node(**options):
                made.append(make_node(tmp_path, **options))
                return made[-1]

            await test(node)
            for one in made:
                await one.service.close()
                assert not one.store.leased
                assert not one.store.on_device
                assert not one.service.sessions()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        run(play())

    # functools.wraps shows pytest the wrapped signature, whose `node` is no fixture.
    del wrapper.__wrapped__
    return wrapper


def now():
    return asyncio.get_running_loop().time()


# --- sessions -------------------------------------------------------------------------------------


@on_virtual_time
async def test_a_session_of_a_cold_model_loads_it_and_streams(node):
    n = node()
    assert await n.ask("a", tokens=3) == "xxx"
    assert now() == pytest.approx(LOAD_S + 3 * STEP_S)
    assert n.count("sllm_sessions_total", model="a", outcome="length") == 1
    assert n.count("sllm_queue_seconds_sum", model="a") == pytest.approx(LOAD_S)
    assert n.count("sllm_time_to_first_token_seconds_sum", model="a") == pytest.approx(
        LOAD_S + STEP_S
    )


def test_kv_memory_that_holds_less_than_the_models_context_is_told(tmp_path, caplog):
    caplog.set_level("INFO", "sllm_node.schedule.replicas")

    @on_virtual_time
    async def tell(node):
        n = node()
        n.engines.capacity_tokens = 80
        assert n.service.status("a").context_tokens == 80
        await n.ask("a")

    tell(tmp_path)
    (line,) = [record for record in caplog.records if record.message == "load finished"]
    assert (line.context_tokens, line.limited_by) == (80, "engine.kv_cache_bytes")


@on_virtual_time
async def test_many_sessions_share_one_load(node):
    n = node()
    assert await asyncio.gather(*(n.ask("a") for _ in range(8))) == ["xxx"] * 8
    assert n.store.loads == ["a"]


@on_virtual_time
async def test_models_take_turns_where_one_fits(node):
    n = node()
    texts = await asyncio.gather(*(n.ask(name) for name in "abcabc"))
    assert texts == ["xxx"] * 6
    assert n.store.loads == ["a", "b", "c"]
    assert n.store.evicted == [("a", "room"), ("b", "room")]


@on_virtual_time
async def test_a_waiting_stream_tells_how_its_model_stands_and_a_running_one_nothing(node):
    n = node()
    stream = n.open("a")
    status = stream.status()
    assert status is not None
    assert (status.state, status.tier, status.waiting) == (ModelState.LOADING, Tier.NVME, 1)
    assert [s.state for s in n.service.sessions()] == ["waiting"]
    await stream.started.wait()
    assert stream.status() is None
    await anext(stream)
    (session,) = n.service.sessions()
    assert (session.state, session.prompt_tokens, session.generated_tokens) == ("running", 2, 1)
    assert n.count("sllm_num_requests_running", model="a") == 1
    assert n.count("sllm_kv_cache_usage_perc", model="a") == 0.25
    stream.cancel()
    assert n.count("sllm_num_requests_waiting", model="a") == 0


@on_virtual_time
async def test_a_reader_cancelled_while_it_waits_may_come_back(node):
    n = node()
    stream = n.open("a", tokens=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await anext(stream)
    assert [chunk.text async for chunk in stream] == ["x"]


@on_virtual_time
async def test_a_finished_stream_stays_finished(node):
    n = node()
    stream = n.open("a", tokens=1)
    assert [chunk.text async for chunk in stream] == ["x"]
    stream.cancel()
    assert [chunk async for chunk in stream] == []


# --- refusals -------------------------------------------------------------------------------------


@on_virtual_time
async def test_what_can_be_known_before_a_load_is_raised_by_open(node):
    n = node()
    n.engines.capacity_tokens = 512
    with pytest.raises(ModelNotFoundError):
        n.open("nobody")
    with pytest.raises(PromptTooLongError):
        n.open("a", prompt=range(1000))
    assert n.store.loads == []


@on_virtual_time
async def test_a_plain_dict_is_listed_and_never_served(node):
    n = node()
    save_dict({"x": torch.ones(2)}, n.root / "d")
    assert {s.model: s.architecture for s in n.service.models()}["d"] == "none"
    with pytest.raises(NotServableError, match="load_dict"):
        n.open("d")
    with pytest.raises(NotServableError):
        await n.service.load("d")
    with pytest.raises(NotServableError):
        await n.service.prepare("d")
    with pytest.raises(NotServableError):
        n.service.context_limit("d")
    assert n.store.loads == []


@on_virtual_time
async def test_a_refusal_at_once_is_raised_by_open_and_counted(node):
    n = node()
    n.service.drain()
    with pytest.raises(DrainingError):
        n.open("a")
    assert n.count("sllm_sessions_total", model="a", outcome="refused") == 1


@on_virtual_time
async def test_a_refusal_in_the_queue_ends_the_stream_when_its_time_comes(node):
    n = node(queue_timeout_s=1.0)
    with pytest.raises(QueueTimeoutError):
        await n.ask("a")
    assert now() == pytest.approx(1.0)


@on_virtual_time
async def test_what_the_engine_refuses_at_the_grant_ends_only_that_session(node):
    n = node()
    await n.ask("a")
    n.engines.submit_error = InvalidRequestError("no", param="logit_bias")
    with pytest.raises(InvalidRequestError):
        n.open("a")
    n.engines.submit_error = None
    assert await n.ask("a") == "xxx"
    assert n.store.loads == ["a"]


@on_virtual_time
async def test_an_engine_that_breaks_at_the_grant_is_replaced(node):
    n = node()
    await n.ask("a")
    n.engines.submit_error = RuntimeError("bug")
    with pytest.raises(EngineError, match="RuntimeError: bug"):
        n.open("a")
    n.engines.submit_error = None
    assert await n.ask("a") == "xxx"
    assert n.store.loads == ["a", "a"]


@on_virtual_time
async def test_the_limit_of_a_session_is_known_before_the_model_is_loaded(node):
    assert node().service.context_limit("a") == CONTEXT_TOKENS


# --- going away -----------------------------------------------------------------------------------


@on_virtual_time
async def test_a_reader_that_goes_away_frees_its_session_at_once(node):
    n = node()
    stream = n.open("a", tokens=100)
    await anext(stream)
    stream.cancel()
    stream.cancel()
    assert n.engines.replicas["a"].running == set()
    assert n.service.sessions() == []
    assert n.count("sllm_sessions_total", model="a", outcome="cancelled") == 1


@on_virtual_time
async def test_a_load_that_others_wait_for_goes_on_without_the_one_who_went_away(node):
    n = node()
    first, second = n.open("a"), n.open("a")
    first.cancel()
    assert "".join([chunk.text async for chunk in second]) == "xxx"
    assert n.store.loads == ["a"]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 1.0, LOAD_S, LOAD_S + 0.5])
def test_a_load_that_nobody_waits_for_is_aborted_at_any_moment(tmp_path, after_s):
    async def play():
        n = make_node(tmp_path)
        n.engines.open_s = 1.0
        stream = n.open("a")
        await asyncio.sleep(after_s)
        stream.cancel()
        assert await n.ask("b") == "xxx"
        assert n.store.leased == n.store.on_device == {"b"}
        await n.service.close()

    run(play())


@on_virtual_time
async def test_a_load_that_ends_in_the_moment_of_its_abort_is_taken_down(node):
    n = node()
    stream = n.open("a")
    n.store.on_acquired = lambda: asyncio.get_running_loop().call_soon(stream.cancel)
    await asyncio.sleep(LOAD_S + EVICTION_S + 0.1)
    assert n.service.status("a").state is ModelState.IDLE
    assert not n.store.on_device


@on_virtual_time
async def test_an_operator_ends_all_sessions_of_a_request(node):
    n = node()
    running = n.open("a")
    await anext(running)
    waiting = n.open("b")
    assert n.service.cancel_request("r-1") == 1
    assert n.service.cancel_request("r-2") == 1
    assert n.service.cancel_request("r-2") == 0
    for stream in (running, waiting):
        with pytest.raises(CancelledByOperatorError):
            await anext(stream)


@on_virtual_time
async def test_an_operator_ends_a_session_that_moves_here_only_once_this_node_has_it(node):
    n = node()
    wanted = n.open("a").request
    n.service.cancel_request("r-1")
    moving = n.service.open(replace(wanted, session=SessionId("m-0"), held=True))
    assert n.service.cancel_request("m") == 0
    await moving.started.wait()
    assert n.service.cancel_request("m") == 0
    moving.extend(0, (), lets_go=True)
    assert n.service.cancel_request("m") == 1
    with pytest.raises(CancelledByOperatorError):
        await anext(moving)


@on_virtual_time
async def test_who_waits_can_be_given_back_but_not_who_moves_here_or_runs(node):
    n = node()
    running = n.open("a")
    await anext(running)
    waiting, again = n.open("b"), n.open("b")
    moving = n.service.open(replace(waiting.request, session=SessionId("m-0"), held=True))
    error = GivenBackError("b", "there is a place")
    assert [one.request.session for one in n.service.outlook.waiting()] == ["r-2-0", "r-3-0"]
    given = [n.service.give_back(SessionId(name), error) for name in ("r-1-0", "r-2-0", "m-0")]
    assert given == [False, True, False]
    n.service.give_back_all(ModelId("b"), error)
    for stream in (waiting, again, moving):
        with pytest.raises(GivenBackError):
            await anext(stream)
    running.cancel()


def test_a_sessions_end_is_logged_under_its_own_request_whoever_caused_it(tmp_path, caplog):
    @on_virtual_time
    async def play(node):
        n = node()
        with logs.of_request("first"):
            stream = n.open("a", request="first", tokens=100)
        with logs.of_request("second"):
            assert n.service.cancel_request("first") == 1
        with pytest.raises(CancelledByOperatorError):
            await anext(stream)

    caplog.handler.setFormatter(JsonFormatter())  # it reads the context when the line is written
    with caplog.at_level(logging.INFO):
        play(tmp_path)
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    (ended,) = [line for line in lines if line["event"] == "session ended"]
    assert (ended["session"], ended["request"]) == ("first-0", "first")


@on_virtual_time
async def test_a_reader_in_the_middle_of_a_step_hears_that_an_operator_ended_its_session(node):
    n = node()
    reader = asyncio.create_task(n.ask("a", tokens=100))
    await asyncio.sleep(LOAD_S + 0.05)
    n.service.cancel_request("r-1")
    with pytest.raises(CancelledByOperatorError):
        await reader


@on_virtual_time
async def test_an_operator_ends_all_requests_that_came_with_a_clients_id(node):
    n = node()
    for request in ("mine-0123abcd", "mine-4567abcd", "mine-4567abcd-89abcdef", "minor-0123abcd"):
        n.open("a", request=request)
    assert n.service.cancel_request("mine-4567abcd") == 1  # a request's own id goes first
    assert n.service.cancel_request("mine-4567abcd") == 1
    assert n.service.cancel_request("mine") == 1
    assert [session.session for session in n.service.sessions()] == ["minor-0123abcd-0"]


@on_virtual_time
async def test_the_sessions_of_a_device_are_those_that_run_there(node):
    n = node()
    stream = n.open("a")
    assert n.service.running_on("cpu") == 0
    await anext(stream)
    assert n.service.running_on("cpu") == 1
    assert n.service.running_on("cuda:1") == 0
    stream.cancel()
    assert n.service.running_on("cpu") == 0


def test_a_session_id_tells_its_request():
    assert request_of(SessionId("chat-12-ab-3")) == "chat-12-ab"


# --- failures -------------------------------------------------------------------------------------


@on_virtual_time
async def test_a_load_that_fails_tells_all_who_wait_and_the_next_request_succeeds(node):
    n = node()
    n.store.error = StorageReadError("a", "shard-00000.bin", 0, "EIO")
    results = await asyncio.gather(n.ask("a"), n.ask("a"), return_exceptions=True)
    assert [type(result) for result in results] == [StorageReadError] * 2
    n.store.error = None
    assert await n.ask("a") == "xxx"


@on_virtual_time
async def test_of_a_checkpoint_removed_as_its_load_begins_is_told_that_it_is_not_there(node):
    n = node()
    for model, error in (("a", OSError("no file")), ("b", CheckpointFormatError("b", "no file"))):
        n.store.error = error
        stream = n.open(model)
        await asyncio.sleep(0)
        shutil.rmtree(n.root / model)
        with pytest.raises(ModelNotFoundError):
            await anext(stream)


def test_an_error_nobody_foresaw_is_logged_once_and_typed(tmp_path, caplog):
    async def play():
        n = make_node(tmp_path)
        n.store.error = RuntimeError("bug")
        with pytest.raises(LoadFailedError, match="RuntimeError: bug"):
            await n.ask("a")
        await n.service.close()

    run(play())
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None


@on_virtual_time
async def test_a_failure_beside_the_weights_gives_the_weights_back(node):
    n = node()
    n.engines.open_error = RuntimeError("bad shapes")
    with pytest.raises(LoadFailedError):
        await n.ask("a")
    assert not n.store.leased
    assert not n.store.on_device


@on_virtual_time
async def test_a_codec_that_cannot_be_read_fails_the_load_and_is_read_again_next_time(node):
    n = node()
    n.engines.codec_error = ValueError("no tokenizer")
    with pytest.raises(LoadFailedError, match="tokenizer"):
        await n.ask("a")
    n.engines.codec_error = None
    assert await n.ask("a") == "xxx"


@on_virtual_time
async def test_a_codec_error_after_the_weights_came_gives_them_back(node):
    n = node()

    async def slow(directory):
        await asyncio.sleep(LOAD_S + 1.0)
        raise CheckpointChangedError("a", "shard", "vanished")

    n.service._replicas.codecs._load = slow
    with pytest.raises(CheckpointChangedError):
        await n.ask("a")
    assert not n.store.leased


@on_virtual_time
async def test_a_broken_replica_is_replaced_when_nobody_runs_on_it(node):
    n = node()
    first, second = n.open("a", tokens=100), n.open("a", tokens=100)
    await anext(first)
    n.fail_replica("a")
    for stream in (first, second):
        with pytest.raises(EngineError):
            await anext(stream)
    assert await n.ask("a") == "xxx"
    assert n.store.loads == ["a", "a"]
    assert n.store.evicted == [("a", "failed")]


@on_virtual_time
async def test_a_session_that_fails_does_not_disturb_the_others(node):
    n = node()
    good, bad = n.open("a", tokens=3), n.open("a", tokens=3)
    await anext(bad)
    bad._generation.is_cancelled.set()
    with pytest.raises(EngineError):
        await anext(bad)
    assert len([chunk async for chunk in good]) == 3


@on_virtual_time
async def test_an_engine_that_does_not_close_well_still_gives_its_memory_back(node):
    n = node()
    await n.ask("a")
    n.engines.close_error = RuntimeError("bug")
    assert await n.ask("b") == "xxx"


@on_virtual_time
async def test_a_session_without_a_last_chunk_is_an_engine_error(node):
    n = node()
    stream = n.open("a")
    await anext(stream)
    stream._generation.is_cancelled.set()
    with pytest.raises(EngineError, match="without a last chunk"):
        await anext(stream)
    n.engines.replicas["a"].running.clear()


# --- checkpoints that change ----------------------------------------------------------------------


@on_virtual_time
async def test_a_checkpoint_converted_while_serving_is_found(node):
    n = node()
    write_checkpoint(n.root, "new")
    assert [status.model for status in n.service.models()] == ["a", "b", "c", "new"]
    assert await n.ask("new") == "xxx"


@on_virtual_time
async def test_a_checkpoint_removed_while_serving_finishes_its_sessions_and_leaves(node):
    n = node()
    stream = n.open("a", tokens=5)
    await anext(stream)
    shutil.rmtree(n.root / "a")
    with pytest.raises(ModelNotFoundError):
        n.open("a")
    assert len([chunk async for chunk in stream]) == 4
    await asyncio.sleep(EVICTION_S + 0.1)
    assert n.store.evicted == [("a", "replaced")]
    assert n.store.forgotten == ["a"]


@on_virtual_time
async def test_what_is_kept_of_a_removed_checkpoint_is_dropped_when_the_models_are_listed(node):
    n = node()
    await n.ask("a")
    await n.service.unload("a")
    n.service.models()
    assert n.store.forgotten == n.engines.forgotten == []
    shutil.rmtree(n.root / "a")
    n.service.models()
    n.service.models()
    assert n.store.forgotten == n.engines.forgotten == ["a"]


@on_virtual_time
async def test_listing_models_leaves_a_removed_one_alone_that_still_runs(node):
    n = node()
    stream = n.open("a", tokens=5)
    await anext(stream)
    shutil.rmtree(n.root / "a")
    n.service.models()
    assert n.store.forgotten == []
    assert len([chunk async for chunk in stream]) == 4


@on_virtual_time
async def test_the_module_of_an_aborted_load_is_given_back(node):
    n = node()
    stream = n.open("a")
    await asyncio.sleep(LOAD_S / 2)
    stream.cancel()
    await asyncio.sleep(LOAD_S)
    assert n.engines.given_back == ["a"]
    assert await n.ask("a") == "xxx"
    assert n.engines.given_back == ["a"]


@on_virtual_time
async def test_a_waiting_stream_of_a_removed_checkpoint_has_no_status(node):
    n = node()
    stream = n.open("a")

    def gone(model):
        raise ModelNotFoundError(model)

    n.store.residency = gone
    assert stream.status() is None
    stream.cancel()


@on_virtual_time
async def test_a_checkpoint_replaced_while_serving_is_loaded_anew(node):
    n = node()
    await n.ask("a")
    shutil.rmtree(n.root / "a")
    write_checkpoint(n.root, "a")
    assert await n.ask("a") == "xxx"
    assert n.store.loads == ["a", "a"]
    assert n.engines.codecs_read == ["a", "a"]


@on_virtual_time
async def test_who_waits_for_a_load_is_not_served_by_weights_replaced_meanwhile(node):
    n = node()
    n.engines.open_s = 1.0
    stream = n.open("a")
    await asyncio.sleep(LOAD_S + 0.5)
    shutil.rmtree(n.root / "a")
    write_checkpoint(n.root, "a")
    assert "".join([chunk.text async for chunk in stream]) == "xxx"
    assert n.store.loads == ["a", "a"]
    assert n.store.evicted == [("a", "replaced")]


@on_virtual_time
async def test_weights_of_another_conversion_than_the_skeleton_are_refused(node):
    n = node()
    stream = n.open("a")
    await asyncio.sleep(1.0)
    shutil.rmtree(n.root / "a")
    write_checkpoint(n.root, "a", pages=1)
    with pytest.raises(CheckpointChangedError):
        await anext(stream)
    assert n.engines.given_back == ["a"]


@on_virtual_time
async def test_a_checkpoint_that_vanishes_between_scan_and_look_is_not_listed(node):
    n = node()
    n.service._catalog.scan = lambda: None
    n.service.status("a")
    n.service.status("b")
    shutil.rmtree(n.root / "a")
    assert [status.model for status in n.service.models()] == ["b"]


# --- codecs ---------------------------------------------------------------------------------------


@on_virtual_time
async def test_a_codec_is_read_once_for_all_who_ask(node):
    n = node()
    assert set(await asyncio.gather(*(n.service.prepare("a") for _ in range(5)))) == {"codec of a"}
    assert n.engines.codecs_read == ["a"]


@on_virtual_time
async def test_who_stops_asking_for_a_codec_does_not_spoil_it_for_the_others(node):
    n = node()
    first = asyncio.create_task(n.service.prepare("a"))
    second = asyncio.create_task(n.service.prepare("a"))
    await asyncio.sleep(0.01)
    first.cancel()
    assert await second == "codec of a"


@on_virtual_time
async def test_the_least_recently_used_codec_leaves_first(node):
    n = node()
    n.service._replicas.codecs._limit = 2
    for name in "abac":
        await n.service.prepare(name)
    await n.service.prepare("a")
    assert n.engines.codecs_read == ["a", "b", "c"]


# --- operators ------------------------------------------------------------------------------------


@on_virtual_time
async def test_load_returns_when_the_model_can_serve_and_unload_when_its_memory_is_free(node):
    n = node()
    await n.service.load("a")
    assert n.service.status("a").state is ModelState.READY
    assert n.service.status("a").tier is Tier.DEVICE
    await n.service.unload("a")
    assert n.service.status("a").state is ModelState.IDLE
    assert n.store.evicted == [("a", "operator")]
    await n.service.unload("a")


@on_virtual_time
async def test_a_load_that_fails_is_told_to_the_operator(node):
    n = node()
    n.store.error = StorageReadError("a", "shard-00000.bin", 0, "EIO")
    with pytest.raises(StorageReadError):
        await n.service.load("a")
    for act in (n.service.load, n.service.unload, n.service.pin, n.service.unpin):
        with pytest.raises(ModelNotFoundError):
            await act("nobody")


@on_virtual_time
async def test_an_operator_who_goes_away_does_not_stop_the_load(node):
    n = node()
    task = asyncio.create_task(n.service.load("a"))
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.sleep(LOAD_S)
    assert n.service.status("a").state is ModelState.READY


@on_virtual_time
async def test_unloading_by_force_ends_sessions_that_run_and_wait(node):
    n = node()
    stream = n.open("a", tokens=100)
    await anext(stream)
    with pytest.raises(ModelBusyError):
        await n.service.unload("a")
    await n.service.unload("a", force=True)
    with pytest.raises(CancelledByOperatorError):
        await anext(stream)
    assert n.count("sllm_sessions_total", model="a", outcome="stopped") == 1


@on_virtual_time
async def test_unloading_by_force_aborts_a_load_under_way(node):
    n = node()
    loading = asyncio.create_task(n.service.load("a"))
    await asyncio.sleep(1.0)
    await n.service.unload("a", force=True)
    assert now() < LOAD_S
    with pytest.raises(CancelledByOperatorError):
        await loading


@on_virtual_time
async def test_status_tells_a_stall(node):
    n = node()
    assert n.service.status("a").stalled_s is None
    await n.service.load("a")
    assert n.service.status("a").stalled_s is None
    n.engines.stalled_s = 61.0
    assert (n.service.status("a").stalled_s, n.service.status("b").stalled_s) == (61.0, None)


@on_virtual_time
async def test_a_pinned_model_stays_until_it_is_unpinned(node):
    n = node(keep_alive_s=10.0)
    await n.service.pin("a")
    await n.service.load("a")
    await asyncio.sleep(100.0)
    assert n.service.status("a").pinned
    await n.service.unpin("a")
    assert n.service.status("a").keep_alive_until_s == pytest.approx(10.0)
    await asyncio.sleep(10.1 + EVICTION_S)
    assert n.store.evicted == [("a", "keep_alive")]


@on_virtual_time
async def test_models_marked_so_are_loaded_from_the_start_and_failures_do_not_stop_it(node):
    n = node(models={name: ModelConfig(preload=True) for name in ("nobody", "a", "b")}, pages=2)
    n.service.preload()
    await asyncio.sleep(LOAD_S + 0.1)
    assert {m.model for m in n.service.models() if m.state is ModelState.READY} == {"a", "b"}


def test_a_preload_that_fails_is_logged(tmp_path, caplog):
    async def play():
        n = make_node(tmp_path, models={"a": ModelConfig(preload=True)})
        n.store.error = StorageReadError("a", "shard-00000.bin", 0, "EIO")
        n.service.preload()
        await asyncio.sleep(LOAD_S + 0.1)
        await n.service.close()

    run(play())
    assert "preload failed" in [record.message for record in caplog.records]


# --- keep-alive, drain, close ---------------------------------------------------------------------


@on_virtual_time
async def test_an_idle_model_leaves_when_the_requests_keep_alive_has_passed(node):
    n = node()
    await n.ask("a", keep_alive_s=5.0)
    await asyncio.sleep(4.9)
    assert n.service.status("a").state is ModelState.READY
    await asyncio.sleep(0.2)
    assert n.service.status("a").state is ModelState.EVICTING


@on_virtual_time
async def test_a_drain_lets_sessions_finish(node):
    n = node()
    reader = asyncio.create_task(n.ask("a"))
    await asyncio.sleep(LOAD_S)
    n.service.drain()
    assert n.service.is_draining
    assert await n.service.drained(30.0) == 0
    assert await reader == "xxx"


@on_virtual_time
async def test_a_drain_ends_at_its_limit_what_has_not_finished(node):
    n = node()
    running = n.open("a", tokens=1000)
    await anext(running)
    n.service.drain()
    assert n.service.health()["draining"] is True
    assert await n.service.drained(1.0) == 1
    with pytest.raises(DrainingError):
        await anext(running)


@on_virtual_time
async def test_a_drain_that_nobody_waits_for_has_its_limit_too(node):
    n = node()
    running = n.open("a", tokens=1000)
    await anext(running)
    n.metrics.ready.set(1)
    start = now()
    n.service.drain()
    assert n.count("sllm_ready") == 0
    await asyncio.sleep(20.0)
    n.service.drain()  # a second one doesn't prolong the first
    with pytest.raises(DrainingError, match="ended what still ran"):
        async for _ in running:
            pass
    assert now() - start == pytest.approx(30.0, abs=STEP_S)
    assert await n.service.drained(30.0) == 1


@on_virtual_time
async def test_a_drain_that_is_taken_back_ends_nobody_and_takes_requests_again(node):
    n = node()
    running = n.open("a", tokens=60)
    await anext(running)
    n.service.undrain()  # there is nothing to take back
    n.service.drain()
    with pytest.raises(DrainingError):
        n.open("a")
    await asyncio.sleep(20.0)
    n.service.undrain()
    assert (n.service.is_draining, n.count("sllm_ready")) == (False, 1)
    assert await n.ask("a") == "xxx"
    await asyncio.sleep(20.0)  # the drain's end has passed
    chunks = [chunk async for chunk in running]
    assert chunks[-1].finish == "length"


@on_virtual_time
async def test_a_load_that_failed_is_told_until_one_succeeds(node):
    n = node()
    n.store.error = LoadFailedError("a", "the disk is gone")
    with pytest.raises(LoadFailedError):
        await n.ask("a")
    await asyncio.sleep(3.0)
    (failure,) = n.service.failures()
    assert (failure["model"], failure["code"], failure["age_s"]) == ("a", "load_failed", 3.0)
    n.store.error = None
    await n.ask("a")
    assert n.service.failures() == []


@on_virtual_time
async def test_a_node_that_stops_can_not_be_undrained(node):
    n = node()
    running = n.open("a", tokens=1000)
    await anext(running)
    n.service.begin_stop()
    n.service.drain()
    with pytest.raises(StoppingError):  # at once: nothing of ours has had a turn since
        n.service.undrain()
    stopping = asyncio.create_task(n.service.drained(1.0))
    await asyncio.sleep(0.5)
    with pytest.raises(StoppingError):
        n.service.undrain()
    assert await stopping == 1


@on_virtual_time
async def test_a_cold_model_takes_as_many_sessions_at_once_as_a_ready_one(node):
    for is_ready in (False, True):
        n = node(max_queue=2)
        if is_ready:
            await n.ask("a")
        streams = [n.open("a", tokens=1) for _ in range(n.service.session_limit)]
        with pytest.raises(NodeFullError):
            n.open("a")
        assert len(streams) == 2 + EngineConfig().max_sessions
        assert [[c.text async for c in stream] for stream in streams] == [["x"]] * len(streams)


@on_virtual_time
async def test_as_many_sessions_have_room_as_are_taken_one_after_another(node):
    for before in ("idle", "hinted", "ready"):
        n = node(max_queue=2)
        if before == "hinted":
            assert n.service.hint(ModelId("a"))
        if before == "ready":
            await n.ask("a")
        limit = n.service.session_limit
        n.service.check_room("a", limit)
        with pytest.raises(NodeFullError, match=f"0 requests .*, this one asks for {limit + 1}"):
            n.service.check_room("a", limit + 1)
        assert n.service.sessions() == []
        for stream in [n.open("a", tokens=1) for _ in range(limit)]:
            stream.cancel()


@on_virtual_time
async def test_closing_ends_loads_under_way_and_stops_the_timer(node):
    n = node(keep_alive_s=5.0)
    await n.ask("b")
    loading = asyncio.create_task(n.service.load("a"))
    await asyncio.sleep(EVICTION_S + 0.5)
    await n.service.close()
    with pytest.raises((CancelledByOperatorError, DrainingError)):
        await loading
    assert not n.store.loading


@on_virtual_time
async def test_memory_that_an_engine_holds_on_to_is_reported_and_the_node_goes_on(node):
    n = node(pages=2)
    await n.ask("a")
    evict, n.store.evict = n.store.evict, None  # raises a TypeError
    with pytest.raises(TypeError):
        await n.service.unload("a")
    n.store.evict = evict
    assert await n.ask("b") == "xxx"
    n.store.on_device.discard("a")


@on_virtual_time
async def test_closing_in_the_middle_of_everything_leaves_nothing(node):
    n = node(pages=2)
    await n.ask("b")
    running = n.open("b", tokens=100)
    await anext(running)
    loading = asyncio.create_task(n.service.load("a"))
    departing = asyncio.create_task(n.service.unload("b", force=True))
    await asyncio.sleep(0.1)
    n.open("a")
    await n.service.close()
    await departing
    with pytest.raises((CancelledByOperatorError, DrainingError)):
        await loading


# --- pins that outlive the process ----------------------------------------------------------------


class Pins:
    def __init__(self, problem=None):
        self.problem = problem
        self.kept = set()

    async def keep(self, model):
        if self.problem:
            raise self.problem
        self.kept.add(model)

    async def drop(self, model):
        if self.problem:
            raise self.problem
        self.kept.discard(model)


@on_virtual_time
async def test_a_pin_is_kept_before_it_counts_and_dropped_before_it_ends(node):
    n = node()
    n.service.pins = Pins()
    await n.service.pin("a")
    assert (n.service.pins.kept, n.service.status("a").pinned) == ({"a"}, True)
    n.service.pins.problem = JournalError("j", "the disk is full")
    with pytest.raises(JournalError):
        await n.service.unpin("a")
    with pytest.raises(JournalError):
        await n.service.pin("b")
    assert (n.service.status("a").pinned, n.service.status("b").pinned) == (True, False)


@on_virtual_time
async def test_models_pinned_before_a_restart_are_loaded_and_held(node):
    n = node()
    n.service.preload([ModelId("a"), ModelId("gone")])
    await asyncio.sleep(LOAD_S + 1)
    assert n.service.status("a").pinned
    assert n.service.status("a").state is ModelState.READY


# --- what is expected ------------------------------------------------------------------------------


@on_virtual_time
async def test_a_load_is_expected_to_take_what_those_before_took_beside_their_bytes(node):
    n = node()
    n.engines.open_s = 1.5
    await n.ask("a", tokens=1)
    await n.ask("b", tokens=1)
    start = now()
    stream = n.open("c")
    await asyncio.sleep(EVICTION_S + 0.1)
    (view,) = n.service.outlook.replicas()
    assert view.ready_at == pytest.approx(start + EVICTION_S + LOAD_S + 1.5)
    assert n.service.outlook.evict_s == pytest.approx(EVICTION_S)
    stream.cancel()


@pytest.mark.parametrize("behind", ["another load", "a prefetch"])
def test_what_a_load_waits_for_others_is_not_counted_as_its_own(tmp_path, behind):
    async def play():
        n = make_node(tmp_path, pages=3)
        guess, acquire = n.service.outlook.beside_s(is_kept=False), n.store.acquire

        async def behind_others(model, placement, *, early):
            await asyncio.sleep(5.0 if model == "b" else 0.0)
            return await acquire(model, placement, early=early)

        async def begun(model):
            return None

        n.store.acquire = behind_others
        if behind == "a prefetch":
            n.store.begun = begun
            await n.ask("b", tokens=1)
        else:
            await asyncio.gather(n.ask("a", tokens=1), n.ask("b", tokens=1))
        assert n.service.outlook.beside_s(is_kept=False) == guess
        await n.service.close()

    run(play())


def test_an_eviction_that_failed_is_not_logged_as_one(tmp_path, caplog):
    async def play():
        n = make_node(tmp_path, pages=2)
        await n.ask("a")
        evict, n.store.evict = n.store.evict, None  # raises a TypeError
        with pytest.raises(TypeError):
            await n.service.unload("a")
        n.store.evict = evict
        await n.ask("b")
        await n.service.unload("b")
        await n.service.close()

    with caplog.at_level(logging.INFO):
        run(play())
    told = [(one.message, one.model) for one in caplog.records if "evict" in one.message]
    assert told == [("eviction failed", "a"), ("evicted", "b")]


@on_virtual_time
async def test_loads_side_by_side_say_nothing_worse_of_a_tier_than_one_alone(node):
    n = node(pages=3)
    await n.ask("a", tokens=1)
    rate, acquire = n.service.outlook.bandwidth(Tier.NVME), n.store.acquire

    async def in_twice_the_time(model, placement, *, early):
        lease = await acquire(model, placement, early=early)
        lease.report = replace(lease.report, elapsed_s=2 * LOAD_S)
        return lease

    n.store.acquire = in_twice_the_time
    await asyncio.gather(n.ask("b", tokens=1), n.ask("c", tokens=1))
    assert n.service.outlook.bandwidth(Tier.NVME) == rate
    await n.service.unload("a")
    await n.ask("a", tokens=1)
    assert n.service.outlook.bandwidth(Tier.NVME) < rate


@on_virtual_time
async def test_a_session_tells_for_what_it_waited(node):
    n = node()
    await n.ask("a", tokens=1)
    first = n.open("b")
    await asyncio.sleep(EVICTION_S + 0.5)
    second = n.open("b")
    await first.started.wait()
    assert first.waited.queue_s == pytest.approx(EVICTION_S)
    assert first.waited.load_s == pytest.approx(LOAD_S)
    assert second.waited.queue_s == pytest.approx(0.0)
    assert second.waited.load_s == pytest.approx(LOAD_S - 0.5)
    third = n.open("b")
    assert third.waited.total_s == 0
    for stream in (first, second, third):
        stream.cancel()
