"""Sessions that leave a device so that another model can start there: whole nodes on virtual time."""

import asyncio
import functools
import io
import json
import logging
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest

from sllm_node.core.errors import InternalError, MoveRefusedError
from sllm_node.core.log import JsonFormatter
from sllm_node.core.types import GenerationRequest, ModelId, SamplingParameters, SessionId
from sllm_node.schedule.stream import request_of
from tests.sim import cluster_world
from tests.sim.cluster_world import World, read
from tests.sim.loop import run

EXAMPLE = {"east": ("a", "b"), "gate": (), "west": ("a",)}
"""The paper's: b lies on east only, whose one place a takes; west has a and nothing to do."""


def in_world(nodes=EXAMPLE, more="", pages=1):
    """Run an async test in a world, the example if nothing else is said."""
    return cluster_world.in_world(pages, more, **nodes)


async def running(world, entry, tokens=200, model="a", at="east"):
    """Begin a session; return its stream and the task that reads it, once it runs on the node `at`."""
    stream = world.open(entry, model, tokens)
    first = await anext(stream)
    await asyncio.sleep(0.5)
    assert any(s.session == stream.request.session for s in world[at].service.sessions())
    return stream, asyncio.create_task(rest(stream, first))


async def rest(stream, first):
    return [*first.tokens, *await read(stream)]


def outcomes(world, name="east"):
    return [vacate["outcome"] for vacate in world[name].vacating.recent()]


def count(tokens):
    return list(range(1, tokens + 1))


@in_world()
async def test_a_model_starts_where_it_lies_and_the_reader_of_the_other_notices_nothing(world):
    _, reading = await running(world, "gate")
    assert await read(world.open("gate", "b")) == count(20)
    assert world["east"].rig.store.loads == ["a", "b"]
    assert world["west"].rig.store.loads == ["a"]
    assert await reading == count(200)
    (told,) = world["east"].vacating.recent()
    assert (told["vacate"], told["outcome"], told["to"]) == ("gate-2-0", "freed", ["west"])
    (move,) = world["gate"].router.moves()
    assert (move["reason"], move["vacate"], move["outcome"]) == ("placement", "gate-2-0", "moved")


@in_world()
async def test_readers_of_the_node_itself_and_of_two_others_are_moved_at_once(world):
    sessions = [await running(world, entry) for entry in ("east", "gate", "east")]
    held = []
    west = world["west"].service
    west_open = west.open

    def opened(request, **more):
        held.append(request.held)
        return west_open(request, **more)

    west.open = opened
    assert await read(world.open("gate", "b")) == count(20)
    for _, reading in sessions:
        assert await reading == count(200)
    assert held == [True] * 3
    assert outcomes(world) == ["freed"]


@in_world()
async def test_a_request_of_the_nodes_own_client_makes_room_too(world):
    _, reading = await running(world, "gate")
    assert await read(world.open("east", "b")) == count(20)
    assert await reading == count(200)
    assert outcomes(world) == ["freed"]


@in_world()
async def test_who_wants_the_model_too_waits_for_the_same_room(world):
    _, reading = await running(world, "gate")
    both = [world.open("gate", "b"), world.open("west", "b")]
    assert await asyncio.gather(*map(read, both)) == [count(20)] * 2
    assert await reading == count(200)
    assert outcomes(world) == ["freed"]
    assert world["east"].rig.store.loads == ["a", "b"]


@in_world()
async def test_a_replica_takes_nothing_new_while_its_sessions_leave(world):
    _, reading = await running(world, "gate")
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    await asyncio.sleep(0.5)
    (a,) = [r for r in world["east"].peers.refresh().replicas if r.model == "a"]
    assert a.is_leaving
    late = world.open("gate", "a", 5)
    assert await read(late) == count(5)
    assert late.node == "west"
    assert await wanted == count(20)
    assert await reading == count(200)


@in_world(more="[placement]\nmoves = false\n")
async def test_an_operator_may_want_no_moves(world):
    _, reading = await running(world, "gate", 60)
    queued = world.open("gate", "b")
    assert await read(queued) == count(20)
    assert await reading == count(60)
    assert (outcomes(world), world["gate"].router.moves()) == ([], [])


@pytest.mark.parametrize("entry", ["gate", "east"])
@pytest.mark.parametrize("reader", ["gate", "east"])
def test_an_entry_that_refuses_leaves_all_as_it_was_and_the_request_waits_its_turn(
    tmp_path, reader, entry
):
    in_world()(functools.partial(refuses, reader=reader, entry=entry))(tmp_path)


async def refuses(world, reader, entry):
    world[reader].router._movers.move = refused
    _, reading = await running(world, reader, 60)
    assert await read(world.open(entry, "b")) == count(20)
    assert await reading == count(60)
    assert outcomes(world) == ["refused"]  # and not asked again soon
    assert "no way" in world["east"].vacating.recent()[0]["reason"]


def refused(*_):
    raise MoveRefusedError("s", "there is no way")


@in_world()
async def test_a_destination_that_refuses_ends_it_and_the_sessions_go_on(world):
    _, reading = await running(world, "gate", 60)
    world["west"].service.drain()  # nobody has heard it when the move begins
    assert await read(world.open("gate", "b")) == count(20)
    assert await reading == count(60)
    assert outcomes(world) == ["refused"]


@in_world(more="[placement]\nvacate_s = 3.0\n")
async def test_what_takes_too_long_is_given_up_and_the_sessions_go_on(world):
    _, reading = await running(world, "gate", 150)
    world.cut |= {("west", "gate")}
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    await asyncio.sleep(3.5)
    assert outcomes(world) == ["late"]
    world.heal()
    assert await wanted == count(20)
    assert await reading == count(150)


@in_world()
async def test_a_request_that_is_cancelled_meanwhile_leaves_the_replica_open(world):
    _, reading = await running(world, "gate", 60)
    wanted = world.open("gate", "b")
    await asyncio.sleep(0.5)
    wanted.cancel()
    await asyncio.sleep(0.2)
    assert outcomes(world) == ["over"]
    (a,) = world["east"].peers.refresh().replicas
    assert not a.is_leaving
    assert await reading == count(60)


TWO = {"east": ("a", "b"), "gate": (), "north": ("b", "c"), "west": ("a",)}
"""b lies on north as well, whose one place c takes."""


@pytest.mark.parametrize("is_first_cancelled", [False, True])
def test_all_who_wait_for_room_that_is_not_made_are_placed_anew(tmp_path, is_first_cancelled):
    test = functools.partial(waits_in_vain, is_first_cancelled=is_first_cancelled)
    in_world(TWO, "[placement]\nvacate_s = 8.0\n")(test)(tmp_path)


async def waits_in_vain(world, is_first_cancelled):
    other = world.open("gate", "c", 60, keep_alive_s=0.0)
    await anext(other)
    stays, reading = await running(world, "gate", 900)
    world["gate"].router.leave = lambda *_: None  # it moves nobody, and does not say so
    first, second = both = [world.open("gate", "b"), world.open("north", "b")]
    waits = [asyncio.create_task(read(stream)) for stream in both]
    await asyncio.sleep(0.5)
    assert [outcomes(world), *(s.node for s in both)] == [["leaving"], "east", "east"]
    if is_first_cancelled:
        waits.pop(0).cancel()
        first.cancel()
    await read(other)
    assert outcomes(world) == ["leaving"]
    for wait in waits:
        assert await wait == count(20)
    assert (outcomes(world), second.node) == (["late"], "north")
    assert not reading.done()
    reading.cancel()
    stays.cancel()


@in_world()
async def test_a_node_that_dies_meanwhile_costs_no_token_and_the_request_is_placed_again(world):
    _, reading = await running(world, "gate", 150)
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    await asyncio.sleep(0.5)
    assert outcomes(world) == ["leaving"]
    await world["east"].crash()
    await asyncio.sleep(1.0)
    world["east"].start()
    assert await wanted == count(20)
    assert await reading == count(150)


@in_world()
async def test_an_entry_that_dies_meanwhile_makes_room_as_well(world):
    _, reading = await running(world, "gate", 1000)
    wanted = asyncio.create_task(read(world.open("west", "b")))
    await asyncio.sleep(0.5)
    reading.cancel()
    assert outcomes(world) == ["leaving"]
    await world["gate"].crash()
    assert await wanted == count(20)
    assert outcomes(world) == ["freed"]


@in_world()
async def test_a_destination_that_dies_meanwhile_ends_it_and_the_sessions_go_on(world):
    _, reading = await running(world, "gate", 60)
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    await asyncio.sleep(0.5)
    await world["west"].crash()
    assert await wanted == count(20)
    assert await reading == count(60)
    assert outcomes(world) == ["refused"]


@in_world()
async def test_a_reader_that_goes_away_meanwhile_makes_room_as_well(world):
    stream, reading = await running(world, "gate", 1000)
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    await asyncio.sleep(0.5)
    reading.cancel()
    stream.cancel()
    assert await wanted == count(20)
    assert outcomes(world) == ["freed"]


@in_world()
async def test_a_session_that_has_just_moved_is_left_alone(world):
    _, reading = await running(world, "gate", 250)
    assert await read(world.open("gate", "b")) == count(20)
    (a,) = [r for r in world["west"].peers.refresh().replicas if r.model == "a"]
    assert [session.stays for session in a.sessions] == [True]
    assert not reading.done()
    await asyncio.sleep(30.0)
    assert await reading == count(250)


@pytest.mark.parametrize("entry", ["gate", "east"])
def test_who_counts_on_moves_where_room_is_free_since_loads_there_and_moves_nobody(tmp_path, entry):
    nodes = {**EXAMPLE, "east": ("a", "b", "c")}
    in_world(nodes, pages=2)(functools.partial(finds_room, entry=entry))(tmp_path)


async def finds_room(world, entry):
    _, reading = await running(world, "gate")
    other = world.open("gate", "c", 10, keep_alive_s=0.0)
    await anext(other)
    await asyncio.sleep(0.5)
    request, choice = chosen(world, entry, "b")
    await read(other)
    await asyncio.sleep(1.0)  # its page is free now, and the choice an old one
    assert await read(world[entry].router._route(request, None, choice)) == count(20)
    assert outcomes(world) == []
    assert await reading == count(200)


def chosen(world, entry, model, tokens=20):
    """Return a request, and a choice for it that counts on moves."""
    world.sessions += 1
    name = SessionId(f"{entry}-{world.sessions}-0")
    request = GenerationRequest(name, ModelId(model), (1, 2), SamplingParameters(), tokens)
    choice = world[entry].router.choose(request, frozenset())
    assert (choice.node, bool(choice.moves)) == ("east", True)
    return request, choice


@in_world({**EXAMPLE, "east": ("a", "b", "c")})
async def test_two_of_the_nodes_own_that_count_on_the_same_moves_do_not_both_get_them(world):
    _, reading = await running(world, "gate", 900)
    placed = [chosen(world, "east", model) for model in ("b", "c")]
    router = world["east"].router
    waits = [read(router._route(request, None, choice)) for request, choice in placed]
    both = asyncio.gather(*waits)
    await asyncio.sleep(0.5)
    assert [(v["model"], v["outcome"]) for v in world["east"].vacating.recent()] == [
        ("b", "leaving")
    ]
    assert await both == [count(20)] * 2
    assert outcomes(world) == ["freed"]
    assert await reading == count(900)


@in_world()
async def test_two_of_the_nodes_own_that_count_on_moves_for_one_model_wait_for_the_same_room(world):
    _, reading = await running(world, "gate")
    placed = [chosen(world, "east", "b") for _ in range(2)]
    router = world["east"].router
    both = [router._route(request, None, choice) for request, choice in placed]
    assert await asyncio.gather(*map(read, both)) == [count(20)] * 2
    assert outcomes(world) == ["freed"]
    ended = [world["east"].rig.count("sllm_forwards_total", peer="east", outcome=how)
             for how in ("ok", "failed")]  # fmt: skip
    assert ended == [2, None]
    assert await reading == count(200)


@pytest.mark.parametrize("entry", ["gate", "east"])
def test_a_mistake_while_room_is_made_leaves_no_session_behind(tmp_path, entry):
    in_world()(functools.partial(goes_wrong, entry=entry))(tmp_path)


async def goes_wrong(world, entry):
    _, reading = await running(world, "gate", 60)
    world["east"].vacating.begin = broken
    with pytest.raises((InternalError, ZeroDivisionError)):
        await read(world.open(entry, "b"))
    assert [s.model for s in world["east"].service.sessions()] == ["a"]
    assert await reading == count(60)


def broken(*_):
    raise ZeroDivisionError("it")


@in_world()
async def test_sessions_of_a_higher_priority_are_not_moved(world):
    router = world["gate"].router
    stream = world.open("gate", "a", 1)
    await read(stream)
    urgent = router.open(replace(stream.request, session="u-0", priority=5, max_tokens=60))
    await anext(urgent)
    wanted = asyncio.create_task(read(world.open("gate", "b")))
    assert len(await read(urgent)) == 59
    assert await wanted == count(20)
    assert outcomes(world) == []


@in_world({"east": ("a",), "gate": (), "west": ("a",)}, "[placement]\nrebalance_s = 2.0\n")
async def test_who_waits_where_all_is_full_goes_where_a_place_is_free_since(world):
    for node in world.nodes.values():
        node.service.outlook.slots = node.service._scheduler._max_sessions = 1
    stream, other = await running(world, "gate", 300)
    _, reading = await running(world, "gate", 300, at="west")
    wanted = [world.open("east", "a", 20) for _ in range(2)]
    waits = [asyncio.create_task(read(one)) for one in wanted]
    await asyncio.sleep(3.0)
    waiting = [s for s in world["west"].service.sessions() if s.state == "waiting"]
    assert len(waiting) == 2
    assert given_back(world, "west") == 0  # there is no place anywhere
    other.cancel()
    stream.cancel()
    with written("sllm_node.cluster.rebalancing") as lines:
        assert await asyncio.gather(*waits) == [count(20)] * 2
    asked = sorted(request_of(one.request.session) for one in wanted)
    assert sorted(json.loads(line)["request"] for line in lines()) == asked
    assert not reading.done()
    assert given_back(world, "west") == 2
    assert await reading == count(300)


@in_world({"east": ("a",), "gate": (), "west": ("a",)}, "[placement]\nrebalance_s = 1.0\n")
async def test_who_fits_nowhere_else_keeps_its_place_in_the_queue_though_others_have_places(world):
    world["east"].rig.engines.capacity_tokens = 64
    world["west"].service.outlook.slots = world["west"].service._scheduler._max_sessions = 1
    await world["east"].service.load("a")
    _, reading = await running(world, "gate", 400, at="west")
    wanted = world.open("gate", "a", 100)
    assert await read(wanted) == count(100)
    assert (wanted.node, given_back(world, "west")) == ("west", 0)
    assert await reading == count(400)


@in_world({"east": ("a",), "gate": (), "west": ("a",)}, "[placement]\nrebalance_s = 1.0\n")
async def test_who_moves_to_a_node_that_loads_for_it_is_not_given_back(world):
    stream, reading = await running(world, "gate", 300)
    world["west"].rig.engines.open_s = 5.0
    world["gate"].router.move(str(stream.request.session), "west")
    await asyncio.sleep(9.0)
    assert [move["outcome"] for move in world["gate"].router.moves()] == ["moved"]
    assert (stream.node, given_back(world, "west")) == ("west", 0)
    assert await reading == count(300)


@in_world({"east": ("a",), "gate": (), "west": ("a",)}, "[placement]\nrebalance_s = 1.0\n")
async def test_who_waits_for_a_load_under_way_stays_though_a_place_is_free_since(world):
    for node in world.nodes.values():
        node.service.outlook.slots = node.service._scheduler._max_sessions = 1
    other, _ = await running(world, "gate", 300)
    world["west"].rig.engines.open_s = 8.0
    wanted = world.open("gate", "a")
    reading = asyncio.create_task(read(wanted))
    await asyncio.sleep(2.0)
    assert wanted.node == "west"
    other.cancel()
    assert await reading == count(20)
    assert (wanted.node, given_back(world, "west")) == ("west", 0)
    assert world["west"].rig.store.loads == ["a"]


@contextmanager
def written(logger):
    """Give what is logged inside, as lines of JSON."""
    told, log = io.StringIO(), logging.getLogger(logger)
    handler = logging.StreamHandler(told)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield lambda: told.getvalue().splitlines()
    log.setLevel(level)
    log.removeHandler(handler)


def given_back(world, name):
    return world[name].rig.count("sllm_rebalanced_total", model="a") or 0


@pytest.mark.parametrize("seed", range(2))
def test_full_devices_and_moves_all_the_time_lose_no_token(tmp_path, seed):
    models = tuple(f"m{i}" for i in range(6))
    nodes = {"n0": models[:4], "n1": models[2:], "n2": models[:4], "n3": models[2:], "gate": ()}
    more = "[placement]\nsettle_s = 1.0\ngain_s = 0.0\n"

    async def play():
        rng = random.Random(seed)
        world = World(tmp_path, nodes, 1, more)
        await asyncio.sleep(3.0)
        sessions = []
        for _ in range(40):
            await asyncio.sleep(rng.expovariate(0.3))
            tokens, entry = rng.randint(1, 150), rng.choice(list(nodes))
            reading = asyncio.create_task(read(world.open(entry, rng.choice(models), tokens)))
            sessions.append((tokens, reading))
        for tokens, reading in sessions:
            assert await reading == count(tokens)
        ended = [v for name in nodes for v in outcomes(world, name)]
        assert "freed" in ended
        await asyncio.sleep(1.0)
        for node in world.nodes.values():
            assert node.router.sessions() == []
            assert node.vacating._vacates.active == ()
        await world.close()
        assert all(node.rig.store.leased == set() for node in world.nodes.values())

    run(play())
