"""Real peers, routers and services on virtual time, while nodes die and links are cut."""

import asyncio
import contextlib
import logging
import random
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.cluster.packing import pack
from sllm_node.cluster.texts import Known
from sllm_node.cluster.wire import Forward, unpack_record
from sllm_node.core import log as logs
from sllm_node.core.errors import (
    CancelledByOperatorError,
    CheckpointFormatError,
    ChecksumError,
    EngineError,
    HopLimitError,
    MisdirectedError,
    ModelNotFoundError,
    MoveRefusedError,
    PeerUnreachableError,
    PromptTooLongError,
    SessionLostError,
    SllmError,
)
from sllm_node.core.types import ModelState
from tests.sim.cluster_world import World, in_world, read
from tests.sim.loop import run
from tests.unit.schedule.fakes import CONTEXT_TOKENS, write_checkpoint


@in_world(a=(), b=("m",))
async def test_a_model_of_another_node_is_served_from_there(world):
    assert await read(world.open("a", "m")) == list(range(1, 21))
    assert world["a"].rig.store.loads == []
    assert world["b"].rig.store.loads == ["m"]


@in_world(a=("m",), b=("m",))
async def test_what_is_loaded_elsewhere_is_used_instead_of_loading_it_again(world):
    await read(world.open("a", "m"))
    await asyncio.sleep(0.2)
    assert await read(world.open("b", "m")) == list(range(1, 21))
    assert (world["a"].rig.store.loads, world["b"].rig.store.loads) == (["m"], [])


@in_world(a=(), b=("m",), c=("m",))
async def test_a_session_goes_on_when_its_node_crashes(world):
    stream = world.open("a", "m", tokens=60)
    await anext(stream)
    await asyncio.sleep(2.0)
    await world[stream.node].crash()
    assert await read(stream) == list(range(stream.position - 60 + 2, 61))


def logged(caplog, event):
    """Return the fields of the one line that says so."""
    (line,) = [record for record in caplog.records if record.message == event]
    return line


def test_where_a_session_goes_on_and_why_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", "sllm_node.cluster.retries")

    @in_world(a=(), b=("m",), c=("m",))
    async def crash(world):
        stream = world.open("a", "m", tokens=60)
        await anext(stream)
        before = stream.node
        await world[before].crash()
        await read(stream)
        line = logged(caplog, "session goes on")
        assert (line.session, line.after, line.node) == ("a-1-0", before, stream.node)
        assert line.why
        assert line.tokens

    crash(tmp_path)


@in_world(a=(), b=("m",), c=("m",))
async def test_a_move_takes_a_requests_id_and_names_the_entry_where_it_is_asked_elsewhere(world):
    stream = world.open("a", "m", tokens=60)
    await anext(stream)
    to = "c" if stream.node == "b" else "b"
    with pytest.raises(MoveRefusedError, match="ask node 'a'"):
        world[stream.node].router.move("a-1", to)
    assert world["a"].router.move("a-1", to)["session"] == "a-1-0"
    await read(stream)
    assert stream.node == to


@pytest.mark.parametrize("entry", ["a", "b"])
def test_a_move_is_no_cancellation_to_the_node_that_it_leaves(tmp_path, caplog, entry):
    caplog.set_level("INFO", "sllm_node")

    @in_world(a=(), b=("m",), c=("m",))
    async def move(world):
        stream = world.open(entry, "m", tokens=60)
        await anext(stream)
        to = "c" if world["b"].service.sessions() else "b"
        with logs.of_request("of-the-operator"):
            told = world[entry].router.move(stream.request.session, to)
        await read(stream)
        ends = [r for r in caplog.records if r.message == "session ended"]
        assert sorted(end.outcome for end in ends) == ["length", "moved"]
        (left,) = [end for end in ends if end.outcome == "moved"]
        assert left.migration == told["migration"]

    requests = {}

    def spy(record):
        requests[record.msg] = logs.request_id.get()
        return True

    movers = [logging.getLogger(f"sllm_node.cluster.{name}") for name in ("move", "movers")]
    for logger in movers:
        logger.addFilter(spy)
    try:
        move(tmp_path)
    finally:
        for logger in movers:
            logger.removeFilter(spy)
    assert requests == dict.fromkeys(("session moves", "session move ended"), f"{entry}-1")


@in_world(a=(), b=("m",))
async def test_a_session_waits_for_its_only_node_to_come_back(world):
    stream = world.open("a", "m", tokens=60)
    await anext(stream)
    await world["b"].crash()
    await asyncio.sleep(20.0)
    world["b"].start()
    assert await read(stream) == list(range(2, 61))


@in_world(a=(), b=("m",), more="patience_s = 12.0\n")
async def test_a_session_whose_only_node_stays_away_ends_when_the_file_says_and_tells_why(world):
    stream = world.open("a", "m", tokens=60)
    await anext(stream)
    loop = asyncio.get_running_loop()
    start = loop.time()
    await world["b"].crash()
    with pytest.raises(SessionLostError, match=r"within 12 s \(timing.patience_s\)"):
        await read(stream)
    assert 12.0 <= loop.time() - start < 14.0


@in_world(a=(), b=("m",), c=("m",))
async def test_a_session_goes_on_when_its_node_is_cut_off(world):
    stream = world.open("a", "m", tokens=100)
    await anext(stream)
    world.part(stream.node)
    tokens = await read(stream)
    assert tokens[-1] == 100
    assert tokens == list(range(tokens[0], 101))
    world.heal()
    await asyncio.sleep(10.0)
    assert len(world["a"].peers.view.nodes) == 3


@in_world(a=(), b=("m",), c=("m",))
async def test_a_node_that_drains_hands_its_sessions_over(world):
    stream = world.open("a", "m", tokens=100)
    await anext(stream)
    node = world[stream.node]
    node.service.drain()
    node.peers.drain()
    await node.service.drained(1.0)
    tokens = await read(stream)
    assert tokens == list(range(tokens[0], 101))
    assert stream.node != node.name


@in_world(a=(), b=("m",))
async def test_a_request_waits_for_a_model_whose_node_is_away(world):
    await world["b"].crash()
    await asyncio.sleep(20.0)
    assert [status.model for status in world["a"].router.models()] == ["m"]
    stream = world.open("a", "m")
    await asyncio.sleep(10.0)
    world["b"].start()
    assert await read(stream) == list(range(1, 21))


class HoldersAsTexts:
    """Stands for tokenizers that are fetched: who would be asked."""

    async def get(self, held, holders):
        return SimpleNamespace(codec=(held.model, holders))

    def get_now(self, held):
        return None


@in_world(a=(), b=("m",))
async def test_a_node_that_has_just_started_listens_before_it_says_that_there_is_no_model(world):
    await world["a"].crash()
    await asyncio.sleep(1.0)
    world["a"].start()
    router = world["a"].router
    router.elsewhere.texts = HoldersAsTexts()
    assert set(world["a"].peers.view.nodes) <= {"a"}
    assert await router.prepare("m") == ("m", ["b"])
    now = asyncio.get_running_loop().time()
    with pytest.raises(ModelNotFoundError):
        await router.prepare("none")
    assert asyncio.get_running_loop().time() == now


class FirstUnreachable(HoldersAsTexts):
    """As above, once the holder can be reached."""

    def __init__(self, world):
        self.world, self.asked = world, 0

    async def get(self, held, holders):
        self.asked += 1
        if not self.world.is_open("a", holders[0]):
            raise PeerUnreachableError(holders[0], "nothing comes")
        return await super().get(held, holders)


@in_world(a=(), b=("m",))
async def test_a_request_waits_for_a_tokenizer_whose_node_is_cut_off(world):
    world["a"].router.elsewhere.texts = texts = FirstUnreachable(world)
    world.part("b")
    asked = asyncio.create_task(world["a"].router.prepare("m"))
    await asyncio.sleep(8.0)
    world.heal()
    assert await asked == ("m", ["b"])
    assert 1 < texts.asked < 100


@in_world(a=(), b=("m",))
async def test_a_tokenizer_whose_node_stays_away_is_told_as_that(world):
    world["a"].router.elsewhere.texts = FirstUnreachable(world)
    world.part("b")
    with pytest.raises(PeerUnreachableError):
        await world["a"].router.prepare("m")
    world.heal()


@in_world(a=(), b=("m",))
async def test_a_node_that_has_left_says_nothing_more(world):
    peers = world["a"].peers
    await peers.close()
    peers.changed()
    await asyncio.sleep(5.0)
    assert not peers._heartbeats.is_sending("b")
    assert not peers._alarm.is_set


@in_world(a=(), b=("m",))
async def test_a_node_that_starts_beside_dead_ones_waits_for_them_but_not_for_ever(world):
    await world["a"].crash()
    await world["b"].crash()
    world["a"].start()
    await asyncio.sleep(10.0)
    router = world["a"].router
    router.elsewhere.texts = HoldersAsTexts()
    asked = asyncio.create_task(router.prepare("m"))
    await asyncio.sleep(5.0)
    world["b"].start()
    assert await asked == ("m", ["b"])
    await world["a"].crash()
    await world["b"].crash()
    world["a"].start()
    with pytest.raises(ModelNotFoundError):
        await world["a"].router.prepare("m")


@in_world(a=(), b=("m",))
async def test_a_request_for_a_model_whose_node_stays_away_is_refused_in_the_end(world):
    await world["b"].crash()
    await asyncio.sleep(20.0)
    with pytest.raises(SllmError, match="no node takes"):
        await read(world.open("a", "m"))


@in_world(a=(), b=("m",))
async def test_what_a_node_had_that_left_is_forgotten_after_a_while(world):
    await world["b"].stop()
    await asyncio.sleep(30.0)
    assert [status.model for status in world["a"].router.models()] == ["m"]
    await asyncio.sleep(10.0)
    assert world["a"].router.models() == []
    with pytest.raises(ModelNotFoundError):
        world.open("a", "m")


@in_world(a=(), b=("m",))
async def test_a_cancel_leaves_nothing_behind(world):
    stream = world.open("a", "m", tokens=1000)
    await anext(stream)
    assert [s.session for s in world["b"].service.sessions()] == [stream.request.session]
    stream.cancel()
    await asyncio.sleep(0.1)
    assert world["b"].service.sessions() == []


@in_world(a=(), b=("m",))
async def test_an_operator_of_the_serving_node_ends_a_session_for_good(world):
    stream = world.open("a", "m", tokens=1000)
    await anext(stream)
    request_id = stream.request.session.rpartition("-")[0]
    assert world["b"].router.cancel_request(request_id) == 1
    with pytest.raises(SllmError, match="operator"):
        await read(stream)


@in_world(a=(), b=("m",))
async def test_an_operator_of_the_entry_node_ends_a_session_on_both(world):
    stream = world.open("a", "m", tokens=1000)
    await anext(stream)
    assert world["a"].router.cancel_request("a-1") == 1
    with pytest.raises(SllmError, match="operator"):
        await read(stream)
    await asyncio.sleep(0.1)
    assert world["b"].service.sessions() == []


@in_world(a=("m",), b=())
async def test_a_forward_is_served_by_who_gets_it_or_by_nobody(world):
    asked = world.open("a", "m")
    request, ask = asked.request, world["b"].router.ask
    await read(asked)
    state = world["b"].peers.refresh()
    answers: list[Any] = []

    class Reply:
        async def send(self, payload):
            answers.append(unpack_record(payload))

    ask = world["a"].router.ask(world["a"].router.choose(request, frozenset()), request)
    ask = type(ask)(ask.id, state.boot, state.version)
    forward = pack(Forward(request, ask, 1, "test"))
    await world["b"].serving.generate("a", forward, Reply())
    assert [answer.code for answer in answers] == [ModelNotFoundError.code]
    with pytest.raises(HopLimitError):
        await world["b"].serving.generate("a", pack(Forward(request, ask, 2, "test")), Reply())


@in_world(a=(), b=("m",))
async def test_a_heartbeat_in_anothers_name_is_refused(world):
    from sllm_node.cluster.messages import encode

    membership = world["b"].peers._membership
    membership.on_timer(membership.next_timer())
    (message,) = membership.to_send()
    with pytest.raises(MisdirectedError):
        await world["a"].peers.receive("c", encode(message, 1 << 20))


@in_world(a=(), b=("m",))
async def test_a_changed_file_is_followed_and_a_wrong_one_is_not(world):
    good = world.path.read_text()
    peers = world["a"].peers
    world.path.write_text(good + "[[nodes]]\nid = 3\n")
    await asyncio.sleep(2.0)
    assert world["a"].rig.count("sllm_cluster_reloads_total", result="refused") == 1
    assert len(peers.view.nodes) == 2
    world.path.write_text(good.replace('id = "b"', 'id = "c"'))
    await asyncio.sleep(2.0)
    assert world["a"].rig.count("sllm_cluster_reloads_total", result="ok") == 1
    assert list(peers.view.nodes) == ["a"]
    with pytest.raises(ModelNotFoundError):
        world.open("a", "m")


@in_world(a=(), b=("x", "y"), c=("x", "y"))
async def test_two_models_asked_for_at_once_are_loaded_side_by_side(world):
    streams = [world.open("a", model) for model in ("x", "y", "x", "y")]
    assert await asyncio.gather(*map(read, streams)) == [list(range(1, 21))] * 4
    loads = world["b"].rig.store.loads + world["c"].rig.store.loads
    assert sorted(loads) == ["x", "y"]


MODELS = tuple(f"m{i}" for i in range(8))


@pytest.mark.parametrize("seed", range(6))
def test_no_token_is_lost_or_doubled_while_nodes_crash_and_links_are_cut(tmp_path, seed):
    async def play():
        rng = random.Random(seed)
        world = World(
            tmp_path, {"a": (), "b": MODELS, "c": MODELS[::2], "d": MODELS[1::2]}, pages=3
        )
        await asyncio.sleep(3.0)
        faults = asyncio.create_task(trouble(world, rng))
        sessions = []
        for _ in range(60):
            await asyncio.sleep(rng.expovariate(1.0))
            sessions.append(asyncio.create_task(one(world, rng.choice(MODELS), rng.randint(1, 80))))
        faults.cancel()
        await asyncio.gather(faults, return_exceptions=True)
        world.heal()
        for node in world.nodes.values():
            if not node.is_up:
                node.start()
        await asyncio.gather(*sessions)
        assert all(node.router.sessions() == [] for node in world.nodes.values())
        await world.close()

    async def one(world, model, count):
        assert await read(world.open("a", model, tokens=count)) == list(range(1, count + 1))

    async def trouble(world, rng):
        while True:
            await asyncio.sleep(rng.uniform(2, 8))
            node = world[rng.choice("bcd")]
            if rng.random() < 0.3:
                world.part(node.name)
                await asyncio.sleep(rng.uniform(1, 12))
                world.heal()
                continue
            await node.crash()
            await asyncio.sleep(rng.uniform(0.5, 10))
            node.start()

    run(play())


@in_world(a=(), b=("m",))
async def test_models_of_all_nodes_are_listed_with_their_state(world):
    (status,) = world["a"].router.models()
    assert (status.model, status.state, status.context_tokens) == (
        "m",
        ModelState.IDLE,
        CONTEXT_TOKENS,
    )
    await read(world.open("a", "m"))
    await asyncio.sleep(0.2)
    assert world["a"].router.status("m").state is ModelState.READY
    with pytest.raises(ModelNotFoundError):
        world["a"].router.status("none")
    told = world["a"].router.explain("m")
    assert (told["node"], told["candidates"][0]["way"]) == ("b", "serve")


@in_world(a=(), b=("m",), c=("m",))
async def test_a_load_that_stalls_draws_no_more_requests_while_another_node_can_load_the_model(
    world,
):
    world["b"].rig.engines.open_s = 30.0
    first = world.open("a", "m", tokens=3)
    await asyncio.sleep(5.0)
    second = world.open("a", "m", tokens=3)
    assert (first.node, second.node) == ("b", "c")
    assert await read(second) == [1, 2, 3]
    assert first.status() is not None  # it waits still
    assert await read(first) == [1, 2, 3]


# --- hints ----------------------------------------------------------------------------------------


@in_world(a=(), b=("m",))
async def test_a_load_begins_at_a_peer_before_its_request_is_tokens(world):
    world["a"].router.hints.give("m")
    await asyncio.sleep(0.5)
    assert world["b"].rig.store.loads == ["m"]
    stream = world.open("a", "m", tokens=3)
    assert await read(stream) == [1, 2, 3]
    assert world["b"].rig.store.loads == ["m"]
    assert world["b"].rig.count("sllm_hints_total", outcome="followed") == 1


@in_world(a=(), b=("m",))
async def test_a_session_that_overtakes_the_answer_to_its_hint_is_taken(world):
    world["b"].rig.store.room = 1
    world["a"].router.hints.give("m")
    await asyncio.sleep(0.0015)  # the hint has come, and its answer has not
    assert world["b"].service.status("m").state is ModelState.LOADING
    assert await read(world.open("a", "m", tokens=3)) == [1, 2, 3]
    assert world["a"].rig.count("sllm_forwards_total", peer="b", outcome="refused") is None


@in_world(a=("m",), b=("m",))
async def test_a_session_follows_its_hint_to_the_same_node(world):
    world["a"].router.hints.give("m")
    await asyncio.sleep(0.5)
    assert world["a"].rig.store.loads == ["m"]
    await read(world.open("a", "m"))
    assert world["b"].rig.store.loads == []


@in_world(pages=1, a=(), b=("m", "n"), c=("n", "o"))
async def test_a_session_follows_its_hint_to_the_node_where_another_model_is_evicted_for_it(world):
    await read(world.open("b", "m", tokens=1))
    await read(world.open("c", "o", tokens=1))
    await asyncio.sleep(1.0)  # their nodes have said that they are idle
    world["a"].router.hints.give("n")
    await asyncio.sleep(0.05)  # the eviction has not ended
    assert world["b"].service.status("n").state is ModelState.QUEUED
    stream = world.open("a", "n", tokens=3)
    assert await read(stream) == [1, 2, 3]
    assert (world["b"].rig.store.loads, world["c"].rig.store.loads) == (["m", "n"], ["o"])
    assert world["b"].rig.count("sllm_hints_total", outcome="followed") == 1


@in_world(pages=1, a=(), b=("m", "n"), c=("n", "o"))
async def test_sessions_at_once_wait_for_one_load_while_another_model_is_evicted_for_it(world):
    await read(world.open("b", "m", tokens=1))
    await read(world.open("c", "o", tokens=1))
    await asyncio.sleep(1.0)  # their nodes have said that they are idle
    first = asyncio.create_task(read(world.open("a", "n", tokens=3)))
    await asyncio.sleep(0.2)  # the eviction has not ended, and its node has said so
    assert await read(world.open("a", "n", tokens=3)) == await first
    assert (world["b"].rig.store.loads, world["c"].rig.store.loads) == (["m", "n"], ["o"])


@in_world(a=(), b=("m",))
async def test_a_hint_to_a_node_that_says_nothing_is_forgotten(world):
    world.part("b")
    world["a"].router.hints.give("m")
    await asyncio.sleep(4.0)
    assert world["b"].rig.store.loads == []
    world.heal()


# --- nodes of unequal size --------------------------------------------------------------------------


@in_world(a=("m",), b=("m",), c=())
async def test_a_request_runs_where_it_fits_whoever_is_asked_and_wherever_the_model_is_warm(world):
    world["b"].rig.engines.capacity_tokens = 128
    await world["b"].service.load("m")
    await asyncio.sleep(1.5)
    for entry in "abc":
        assert world[entry].router.context_limit("m") == CONTEXT_TOKENS
        assert len(await read(world.open(entry, "m", tokens=300))) == 300
        assert len(await read(world.open(entry, "m", tokens=20))) == 20
    assert world["a"].rig.store.loads == ["m"]


@in_world(a=("m",), b=("m",), c=())
async def test_a_request_that_fits_at_no_node_that_is_there_waits_only_if_another_was(world):
    world["b"].rig.engines.capacity_tokens = 128
    await world["b"].service.load("m")
    await asyncio.sleep(1.5)
    await world["a"].crash()
    await asyncio.sleep(4.0)
    stream = world.open("c", "m", tokens=300)
    await asyncio.sleep(1.0)
    world["a"].start()
    assert len(await read(stream)) == 300


@in_world(a=("m",), b=("m",))
async def test_a_request_without_a_limit_ends_where_its_node_does_though_another_tells_of_more(
    world,
):
    for node in world.nodes.values():
        node.rig.engines.capacity_tokens = 128
    world["b"].rig.engines.told_tokens = CONTEXT_TOKENS  # it has not looked yet
    await asyncio.sleep(1.5)
    for entry in "ab":
        limit = world[entry].router.context_limit("m")
        assert limit == CONTEXT_TOKENS
        assert len(await read(world.open(entry, "m", limit - 2, open_ended=True))) == 126


@in_world(a=("m",), b=("m",), c=())
async def test_a_session_without_a_limit_goes_on_where_there_is_less_room_and_ends_with_that(
    world,
):
    world["b"].rig.engines.capacity_tokens = 128
    await world["a"].service.load("m")
    await asyncio.sleep(1.5)
    for entry in "bc":
        stream = world.open(entry, "m", CONTEXT_TOKENS - 2, open_ended=True)
        await anext(stream)
        assert stream.node == "a"
        world[entry].router.move(stream.request.session, "b")
        assert (await read(stream))[-1] == 126
        assert stream.node == "b"


@in_world(a=("m",), b=("m",), c=())
async def test_a_dead_node_counts_in_no_limit_while_others_have_the_model(world):
    world["b"].rig.engines.capacity_tokens = 128
    await world["a"].service.load("m")
    await asyncio.sleep(1.5)
    streams = [world.open(entry, "m", CONTEXT_TOKENS - 2, open_ended=True) for entry in "bc"]
    for stream in streams:
        await anext(stream)
        assert stream.node == "a"
    await world["a"].crash()
    for stream in streams:
        assert (await read(stream))[-1] == 126
        assert stream.node == "b"
    assert [world[entry].router.context_limit("m") for entry in "bc"] == [128, 128]
    await world["b"].crash()
    await asyncio.sleep(4.0)
    assert world["c"].router.context_limit("m") == CONTEXT_TOKENS


@in_world(a=(), b=("m",))
async def test_the_limit_follows_a_node_that_comes_back_with_more_room(world):
    engines = world["b"].rig.engines
    engines.capacity_tokens = 128
    await asyncio.sleep(1.5)
    elsewhere, known = world["a"].router.elsewhere, Known(None, 128)
    elsewhere.texts = SimpleNamespace(get_now=lambda _: known)  # as it told with its tokenizer
    assert world["a"].router.context_limit("m") == 128
    engines.capacity_tokens = 256
    await asyncio.sleep(1.5)
    assert world["a"].router.context_limit("m") == 256


# --- moves -----------------------------------------------------------------------------------------


DAMAGED = ChecksumError("m", "shard-00001.bin", 0, 4096)


@in_world(a=("m",), b=("m",))
async def test_a_request_at_a_node_whose_checkpoint_is_damaged_is_served_by_another(world):
    world["a"].rig.store.error = DAMAGED
    for _ in range(2):
        stream = world.open("a", "m")
        assert await read(stream) == list(range(1, 21))
        assert (stream.startup().node, stream.startup().earlier) == ("b", ())
    assert world["b"].rig.store.loads == ["m"]


@in_world(a=("m",), b=("m",))
async def test_a_session_whose_engine_fails_at_its_own_entry_goes_on_at_another_node(world):
    stream = world.open("a", "m", tokens=40)
    given = list((await anext(stream)).tokens)
    world["a"].rig.fail_replica("m")
    assert given + await read(stream) == list(range(1, 41))
    told = stream.startup()
    assert told.node == "b"
    assert [(stay.node, stay.tokens, stay.left) for stay in told.earlier] == [
        ("a", len(given), "engine_error"),
    ]  # fmt: skip
    assert world["a"].rig.count("sllm_resumptions_total", model="m") == 1


@in_world(a=("m",), b=("other",))
async def test_what_fails_at_the_only_node_that_has_the_model_is_told_at_once_as_it_is(world):
    stream = world.open("a", "m", tokens=40)
    await anext(stream)
    world["a"].rig.fail_replica("m")
    now = asyncio.get_running_loop().time()
    with pytest.raises(EngineError, match="broken"):
        await read(stream)
    assert asyncio.get_running_loop().time() - now < 1.0
    await asyncio.sleep(2.0)
    world["a"].rig.store.error = DAMAGED
    with pytest.raises(ChecksumError):
        await read(world.open("a", "m"))
    assert asyncio.get_running_loop().time() - now < 6.0


@in_world(a=("m",), b=("m",))
async def test_what_an_operator_ends_at_the_entry_is_not_carried_on(world):
    stream = world.open("a", "m", tokens=40)
    await anext(stream)
    assert world["a"].router.cancel_request("a-1") == 1
    with pytest.raises(CancelledByOperatorError):
        await read(stream)
    assert world["b"].rig.store.loads == []


@in_world(a=("m", "alone"), b=("m",), c=())
async def test_a_model_whose_index_is_damaged_here_is_served_by_another_node(world):
    router = world["a"].router
    router.elsewhere.texts = HoldersAsTexts()
    for model in ("m", "alone"):
        index = world["a"].root / model / INDEX_FILE
        index.write_bytes(index.read_bytes()[:50])
    await asyncio.sleep(2.0)
    assert await router.prepare("m") == ("m", ["b"])
    assert router.context_limit("m") == CONTEXT_TOKENS
    assert router.status("m").model == "m"
    assert await read(world.open("a", "m")) == list(range(1, 21))
    with pytest.raises(CheckpointFormatError):
        router.status("alone")
    with pytest.raises(CheckpointFormatError):
        await router.prepare("alone")


def elsewhere(name):
    return "c" if name == "b" else "b"


@in_world(a=(), b=("m",), c=("m",))
async def test_a_drain_tries_again_although_nothing_is_heard_of_anybody(world):
    stream = world.open("a", "m", tokens=200)
    await anext(stream)
    source = world[stream.node]
    other = world[elsewhere(source.name)]
    engines = other.rig.engines
    engines.submit_error = EngineError("m", "no memory")
    source.router.drain()
    await asyncio.sleep(8.0)
    world["a"].router._movers._peers.on_change = lambda: None  # deaf to news from here on
    assert stream.node == source.name
    engines.submit_error = None
    await asyncio.sleep(8.0)
    assert stream.node == other.name
    tokens = await read(stream)
    assert tokens == list(range(tokens[0], 201))


@in_world(a=(), b=("m",), c=("m",), d=("m",))
async def test_a_drain_asks_another_node_after_one_that_refused_and_that_one_if_there_is_no_other(
    world,
):
    stream = world.open("a", "m", tokens=300)
    await anext(stream)
    source = world[stream.node]
    warm, empty = (world[name] for name in "bcd" if name != source.name)
    await warm.service.load("m")
    await asyncio.sleep(1.0)
    warm.rig.engines.submit_error = PromptTooLongError(302, 128, "KV memory")
    empty.rig.engines.submit_error = PromptTooLongError(302, 128, "KV memory")
    source.router.drain()
    await asyncio.sleep(6.0)
    asked = [report["to"] for report in reversed(world["a"].router.moves())]
    assert asked[:3] == [warm.name, empty.name, warm.name]
    empty.rig.engines.submit_error = None
    await asyncio.sleep(4.0)
    assert stream.node == empty.name
    tokens = await read(stream)
    assert tokens == list(range(tokens[0], 301))


def test_nodes_with_different_checkpoints_are_warned_of_once(tmp_path, caplog):
    @in_world(a=("m",), b=("m",))
    async def differ(world):
        write_checkpoint(world["b"].root, "m", digest=1)
        world["b"].service.models()
        await asyncio.sleep(20.0)
        assert await read(world.open("a", "m")) == list(range(1, 21))

    caplog.set_level(logging.WARNING)
    differ(tmp_path)
    told = [r.__dict__ for r in caplog.records if r.message == "nodes have different checkpoints"]
    assert [(line["model"], line["nodes"]) for line in told] == [("m", "a; b")] * 2  # by each node


async def begun_beside_others(world):
    """Return a session that runs where its client is, and whose peer has another checkpoint of its model."""
    write_checkpoint(world["b"].root, "m", digest=1)
    world["b"].service.models()
    await asyncio.sleep(2.0)
    await world["a"].service.load("m")
    await asyncio.sleep(1.0)
    stream = world.open("a", "m", tokens=100)
    await anext(stream)
    return stream


@in_world(a=("m",), b=("m",))
async def test_a_session_is_not_moved_to_a_node_with_other_weights(world):
    stream = await begun_beside_others(world)
    with pytest.raises(MoveRefusedError, match="other weights"):
        world["a"].router.move(stream.request.session, "b")
    world["a"].router.drain()
    await asyncio.sleep(5.0)
    assert world["a"].router.moves() == []
    assert len(await read(stream)) == 99
    world["a"].router.undrain()


@in_world(a=("m",), b=("m",))
async def test_a_destination_refuses_a_session_that_began_with_other_weights(world):
    stream = await begun_beside_others(world)
    unfit, world["a"].peers.view.unfit = world["a"].peers.view.unfit, lambda *_: frozenset()
    world["a"].router.move(stream.request.session, "b")
    assert len(await read(stream)) == 99
    world["a"].peers.view.unfit = unfit
    (report,) = world["a"].router.moves()
    assert report["outcome"] == "failed"
    assert "began with another checkpoint of 'm'" in report["error"]


@in_world(a=(), b=("m",), c=("m",))
async def test_a_session_that_lost_its_node_waits_for_a_node_with_its_weights(world):
    write_checkpoint(world["c"].root, "m", digest=1)
    world["c"].service.models()
    await asyncio.sleep(2.0)
    stream = world.open("a", "m", tokens=100)
    await anext(stream)
    source = world[stream.node]
    await source.crash()
    await asyncio.sleep(3.0)
    source.start()
    await read(stream)
    assert stream.node == source.name
    again = world.open("a", "m", tokens=100)
    await anext(again)
    await world[again.node].crash()
    with pytest.raises(SessionLostError):
        await read(again)


@in_world(a=(), b=("m",), c=("m",))
async def test_a_session_that_has_no_token_yet_begins_with_other_weights(world):
    write_checkpoint(world["c"].root, "m", digest=1)
    world["c"].service.models()
    await asyncio.sleep(2.0)
    stream = world.open("a", "m")
    await asyncio.sleep(1.0)
    await world[stream.node].crash()
    assert await read(stream) == list(range(1, 21))


async def turned_away(world, *, is_alone=False):
    """Return a session that a drain of node a will turn away: its device is full until something is evicted."""
    await read(world.open("a", "x"))
    await read(world.open("a", "y"))
    asked = world.open("b", "z")
    asked.cancel()
    await asyncio.sleep(1.0)
    if is_alone:
        world.part("b")
        await asyncio.sleep(10.0)
    return world["a"].router._open_here(asked.request, None, None)


@in_world(a=("x", "y", "z"), b=("z",))
async def test_a_drain_waits_for_sessions_that_it_turns_away_before_they_begin(world):
    stream = await turned_away(world, is_alone=True)
    world["a"].router.drain()
    assert world["a"].service.sessions() == []
    drained = asyncio.create_task(world["a"].router.drained(60.0))
    await asyncio.sleep(0.5)
    assert not drained.done()
    world.heal()
    assert await read(stream) == list(range(1, 21))
    assert await drained == 0


@in_world(a=("x", "y", "z"), b=("z",))
async def test_a_move_of_a_session_that_a_drain_turns_away_is_told_as_failed(world):
    stream = await turned_away(world)
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    world["a"].router.move(stream.request.session, "b")
    world["a"].router.drain()
    assert await reading == list(range(1, 21))
    (report,) = world["a"].router.moves()
    assert (report["outcome"], report["reason"]) == ("failed", "operator")


@in_world(a=("m",), b=("m",))
async def test_a_move_of_a_session_that_ends_before_it_begins_is_told_as_ended(world):
    stream = world.open("a", "m", tokens=1)
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0.1)
    world["a"].router.move(stream.request.session, "b")
    await reading
    assert [m["outcome"] for m in world["a"].router.moves()] == ["ended"]


@pytest.mark.parametrize("holder", ["a", "b"])
def test_a_load_that_a_requests_hint_began_is_told_as_its_own(tmp_path, holder):
    @in_world(**{"a": (), "b": (), holder: ("m",)})
    async def explain(world):
        with logs.of_request("a-1"):
            world["a"].router.hints.give("m")
        await asyncio.sleep(0.05)  # of its load: the placement that follows sees it coming
        first = world.open("a", "m")
        await read(first)
        told = first.startup()
        assert (told.node, told.way) == (holder, "load")
        assert told.expected_s > 0.05
        second = world.open("a", "m")
        await read(second)
        told = second.startup()
        assert told.way == "serve"
        assert told.expected_s < 0.05

    explain(tmp_path)


@in_world(a=("m",), b=("m",), c=("m",))
async def test_all_nodes_that_a_session_ran_at_are_told_and_how_it_left_each(world):
    stream = world.open("a", "m", tokens=40)
    chunk = await anext(stream)
    first = stream.startup()
    assert (first.node, first.earlier) == ("a", ())
    world["a"].router.move(stream.request.session, "b")
    while stream.startup().node == "a":
        chunk = await anext(stream)
    await world["b"].crash()
    given = [*chunk.tokens, *await read(stream)]
    told = stream.startup()
    assert told.node in ("a", "c")
    assert [(stay.node, stay.left) for stay in told.earlier] == [
        ("a", "moved"), ("b", "peer_unreachable"),
    ]  # fmt: skip
    assert all(stay.tokens > 0 for stay in told.earlier)
    assert sum(stay.tokens for stay in told.earlier) < given[-1]
    assert told.startup_s == first.startup_s


@in_world(a=("m",), b=("m",))
async def test_a_session_that_waits_for_its_load_moves_when_it_has_begun(world):
    stream = world.open("a", "m")
    await asyncio.sleep(0.1)
    world["a"].router.move(stream.request.session, "b")
    assert await read(stream) == list(range(1, 21))
    (report,) = world["a"].router.moves()
    assert (report["outcome"], report["to"]) == ("moved", "b")


@in_world(a=(), b=("m",), c=("m",))
async def test_who_serves_a_session_for_a_node_that_is_cut_off_lets_it_go(world):
    stream = world.open("a", "m", tokens=1000)
    await anext(stream)
    source = world[stream.node]
    (number,) = [world["a"].router.move(stream.request.session, elsewhere(source.name))]
    assert number["to"] != source.name
    world.part("a")
    await asyncio.sleep(10.0)
    for name in "bc":
        assert world[name].service.sessions() == []
    stream.cancel()
    world.heal()
    await asyncio.sleep(10.0)


@in_world(a=(), b=("m",), c=("m",), d=("m",))
async def test_a_destination_that_drains_during_a_move_is_left_again(world):
    stream = world.open("a", "m", tokens=300)
    await anext(stream)
    first = world[stream.node]
    to = world[elsewhere(first.name)]
    world["a"].router.move(stream.request.session, to.name)
    await asyncio.sleep(0.5)
    to.router.drain()
    first.router.drain()
    await asyncio.sleep(15.0)
    assert stream.node not in (to.name, first.name)
    tokens = await read(stream)
    assert tokens == list(range(tokens[0], 301))


@pytest.mark.parametrize("seed", range(4))
def test_no_token_is_lost_or_doubled_while_sessions_move_and_nodes_drain_and_die(tmp_path, seed):
    names = "abcd"

    async def play():
        rng = random.Random(seed)
        world = World(tmp_path, dict.fromkeys(names, ("m",)), pages=1)
        await asyncio.sleep(3.0)
        faults = asyncio.create_task(trouble(world, rng))
        sessions = []
        for _ in range(60):
            await asyncio.sleep(rng.expovariate(1.0))
            entry = rng.choice([n for n in "ab" if not world[n].router.is_draining])
            sessions.append(asyncio.create_task(one(world, rng, entry, rng.randint(1, 150))))
        await asyncio.sleep(0.1)
        faults.cancel()
        await asyncio.gather(faults, return_exceptions=True)
        world.heal()
        await asyncio.gather(*sessions)
        await asyncio.sleep(10.0)
        for node in world.nodes.values():
            if node.is_up:
                assert node.router.sessions() == []
                assert node.service.sessions() == []
        await world.close()
        assert len(asyncio.all_tasks()) == 1

    async def one(world, rng, entry, count):
        stream = world.open(entry, "m", tokens=count)
        session = stream.request.session
        moving = asyncio.create_task(movings(world, rng, entry, session))
        try:
            if rng.random() < 0.2:
                for _ in range(rng.randint(1, count)):
                    if (await anext(stream)).finish is not None:
                        break
                stream.cancel()
            else:
                assert await read(stream) == list(range(1, count + 1))
        finally:
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)

    async def movings(world, rng, entry, session):
        while True:
            await asyncio.sleep(rng.uniform(0.1, 4.0))
            with contextlib.suppress(MoveRefusedError):
                world[entry].router.move(session, rng.choice(names))

    async def trouble(world, rng):
        """What befalls nodes without readers; a node with readers drains, one after the other."""
        while True:
            await asyncio.sleep(rng.uniform(2, 8))
            node, way = world[rng.choice("cd")], rng.random()
            if way < 0.3:
                world.part(node.name)
                await asyncio.sleep(rng.uniform(1, 12))
                world.heal()
            elif way < 0.7:
                await node.crash()
                await asyncio.sleep(rng.uniform(0.5, 10))
                node.start()
            else:
                node = world[rng.choice(names)]
                node.router.drain()
                assert await node.router.drained(120.0) == 0
                await node.stop()
                await asyncio.sleep(rng.uniform(0.5, 5))
                node.start()

    run(play())
