"""Real peers, routers and services on virtual time: nodes that load what only peers have."""

import asyncio

import pytest

from sllm_node.checkpoint.cards import PEERS
from sllm_node.cluster.choice import choose, request_for
from sllm_node.core.errors import (
    ModelElsewhereError,
    ModelNotFoundError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.types import ModelId, NodeId
from tests.sim.cluster_world import in_world, read
from tests.unit.schedule.fakes import LOAD_S

TOKENS = list(range(1, 21))


def with_peer_loads(more="", **nodes):
    """Run an async test in a world whose nodes load from peers."""
    return in_world(more=more, peer_loads=True, **nodes)


def loads(world, name):
    return world[name].rig.store.loads


def now():
    return asyncio.get_running_loop().time()


def drain(world, name):
    world[name].service.drain()
    world[name].peers.drain()


@with_peer_loads(a=(), b=("m",))
async def test_a_node_that_has_a_model_is_better_than_one_that_must_fetch_it(world):
    assert await read(world.open("a", "m")) == TOKENS
    assert (loads(world, "a"), loads(world, "b")) == ([], ["m"])


@with_peer_loads(a=(), b=("m",))
async def test_a_model_of_a_node_that_drains_is_loaded_from_it_once(world):
    drain(world, "b")
    await asyncio.sleep(1.0)
    streams = [world.open("a", "m") for _ in range(3)]
    for stream in streams:
        assert await read(stream) == TOKENS
    assert loads(world, "a") == ["m"]


@with_peer_loads(a=(), b=("m",), c=())
async def test_a_forwarded_session_has_its_model_fetched_where_it_goes(world):
    drain(world, "b")
    await asyncio.sleep(1.0)
    entry = world["a"]
    view, me = entry.peers.view, NodeId("a")
    at_c = choose(view, request_for(view, ModelId("m")), me, 0.0, frozenset({me}))
    assert at_c is not None
    assert (at_c.node, at_c.way) == ("c", "load")
    real, entry.router.choose = entry.router.choose, lambda *_: at_c
    stream = world.open("a", "m")
    entry.router.choose = real
    assert await read(stream) == TOKENS
    assert (loads(world, "a"), loads(world, "c")) == ([], ["m"])
    assert world["c"].fetching.ensured == ["m"]


async def opened_and_left(world):
    """Open a session at a, whose node is to fetch the model from b; b crashes before a knows it."""
    drain(world, "b")
    await asyncio.sleep(1.0)
    stream = world.open("a", "m")
    await asyncio.sleep(0.1)
    await world["b"].crash()
    return stream


@with_peer_loads(a=(), b=("m",))
async def test_a_model_whose_peers_stay_away_before_it_is_known_is_told_as_that_in_the_end(world):
    stream = await opened_and_left(world)
    start = now()
    with pytest.raises(SllmError, match=r"no node that lives has all of it|can't be reached"):
        await read(stream)
    patience_s = world["a"].router._tools.limits.patience_s
    assert patience_s - 1.0 <= now() - start < patience_s + 10.0


@with_peer_loads(a=(), b=("m",))
async def test_a_model_whose_peers_go_before_it_is_known_is_loaded_when_they_are_back(world):
    stream = await opened_and_left(world)
    await asyncio.sleep(20.0)
    world["b"].start()
    assert await read(stream) == TOKENS


def gone(remote=PEERS):
    return RemoteUnreachableError(remote, "m/shard-00000.bin", "no node that lives has all of it")


@with_peer_loads(a=(), b=("m",))
async def test_who_waits_for_a_load_whose_sender_dies_waits_for_another_one(world):
    drain(world, "b")
    await asyncio.sleep(1.0)
    first = world.open("a", "m")
    await asyncio.sleep(1.0)
    second = world.open("a", "m")  # the model is known by now: it waits at home
    await world["b"].crash()
    store = world["a"].rig.store
    assert store.loading == {"m"}
    store.error = gone()
    await asyncio.sleep(LOAD_S)
    assert store.loading == set()
    store.error = None
    assert await read(first) == TOKENS
    assert await read(second) == TOKENS
    assert store.loads == ["m", "m"]


@with_peer_loads(a=("m",), b=("m",))
async def test_who_waits_for_a_load_whose_remote_is_gone_is_served_by_who_has_the_model(world):
    world["a"].rig.store.error = gone("bucket")
    assert await read(world.open("a", "m")) == TOKENS
    assert (loads(world, "a"), loads(world, "b")) == (["m"], ["m"])


@with_peer_loads(a=("m",))
async def test_who_waits_for_a_load_whose_remote_is_gone_is_told_if_nobody_else_can_load_it(
    world,
):
    world["a"].rig.store.error = gone("bucket")
    start = now()
    with pytest.raises(RemoteUnreachableError, match="bucket"):
        await read(world.open("a", "m"))
    assert now() - start == pytest.approx(LOAD_S)


@with_peer_loads(a=(), b=("m",))
async def test_an_operator_loads_what_only_a_peer_has(world):
    await world["a"].router.load("m")
    assert loads(world, "a") == ["m"]


WISH = "[models.m]\nmin_replicas = 2\nmax_replicas = 2\n"


@with_peer_loads(more=WISH, a=(), b=("m",))
async def test_a_second_replica_is_started_where_the_model_is_not_yet(world):
    await asyncio.sleep(40.0)
    assert (loads(world, "a"), loads(world, "b")) == (["m"], ["m"])


@with_peer_loads(a=("mine",), b=("m",))
async def test_what_an_operator_does_to_a_model_of_peers_brings_it_or_tells_where_it_is(world):
    router = world["a"].router
    for act in (router.unload, router.unpin):
        with pytest.raises(ModelElsewhereError, match="a node that has it: b"):
            await act("m")
        with pytest.raises(ModelNotFoundError, match="there are: m, mine"):
            await act("none")
    await router.pin("m")
    await router.load("m")
    assert loads(world, "a") == ["m"]
    assert router.status("m").pinned
    await router.unpin("m")
    await router.unload("m")


@with_peer_loads(a=("mine",), b=("m",))
async def test_who_asks_for_a_model_that_no_node_has_is_told_of_those_of_all_nodes(world):
    router = world["a"].router
    for ask in (router.status, router.context_limit):
        with pytest.raises(ModelNotFoundError, match="there are: m, mine"):
            ask("none")
