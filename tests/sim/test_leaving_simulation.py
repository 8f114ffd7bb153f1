"""Real peers and routers on virtual time: what clients are told while nodes drain, leave and die."""

import asyncio

import pytest

from sllm_node.core.errors import (
    DrainingError,
    ModelNotFoundError,
    NoPlaceError,
    PeerDeniedError,
    WrongKeyError,
)
from sllm_node.server.faults import status_of
from tests.sim.cluster_world import read
from tests.sim.test_cluster_simulation import in_world


@in_world(a=("mine",), b=("m",))
async def test_an_entry_that_drains_says_so_for_models_of_peers_as_for_its_own(world):
    router = world["a"].router
    router.drain()
    for model in ("mine", "m"):
        with pytest.raises(DrainingError):
            world.open("a", model)
    with pytest.raises(DrainingError):
        await router.prepare("m")
    with pytest.raises(ModelNotFoundError):
        await router.prepare("none")
    await asyncio.sleep(1.0)


async def stays_away(world, seconds=10.0):
    """Return a session of node a that waits for node b, and runs when that is there again."""
    stream = world.open("a", "m")
    await asyncio.sleep(seconds)
    assert stream.status().model == "m"
    world["b"].start()
    assert await read(stream) == list(range(1, 21))
    assert stream.status() is None


@in_world(a=(), b=("m",))
async def test_a_request_waits_for_a_model_whose_only_node_left_not_long_ago(world):
    await world["b"].stop()
    await asyncio.sleep(1.0)
    await stays_away(world)


@in_world(a=(), b=("m",))
async def test_a_request_waits_for_a_model_whose_only_node_drains_before_it_leaves(world):
    world["b"].router.drain()
    await asyncio.sleep(1.0)
    stream = world.open("a", "m")
    await world["b"].stop()
    await asyncio.sleep(5.0)
    world["b"].start()
    assert await read(stream) == list(range(1, 21))


@in_world(a=(), b=("m",))
async def test_a_request_for_a_model_whose_only_node_left_and_stays_away_may_be_sent_again(world):
    await world["b"].stop()
    await asyncio.sleep(1.0)
    with pytest.raises(NoPlaceError) as caught:
        await read(world.open("a", "m"))
    assert status_of(caught.value) == 503


@in_world(a=(), b=("m",))
async def test_a_session_that_lost_its_node_tells_that_it_waits(world):
    stream = world.open("a", "m", tokens=60)
    await anext(stream)
    assert stream.status() is None
    await world["b"].crash()
    await asyncio.sleep(1.0)
    assert stream.status().model == "m"
    world["b"].start()
    await read(stream)


async def deny(sender, payload, reply):
    """Answer as a listener that has another key."""
    raise PeerDeniedError("b", f"{WrongKeyError(sender).code}: {WrongKeyError(sender)}")


@in_world(a=(), b=("m",))
async def test_a_peer_with_another_key_is_told_as_that_and_not_only_as_dead(world):
    peers, rightly = world["a"].peers, world["b"].handlers["heartbeat"]
    world["b"].handlers["heartbeat"] = deny
    await asyncio.sleep(2.0)
    assert [peer["problem"] for peer in peers.status()] == ["refuses our key"]
    world["b"].handlers["heartbeat"] = rightly
    await asyncio.sleep(2.0)
    peers.refused(WrongKeyError("b"))
    assert [peer["problem"] for peer in peers.status()] == ["has another key"]
    await asyncio.sleep(2.0)
    assert [peer["problem"] for peer in peers.status()] == [None]


@in_world(a=(), b=("m",))
async def test_a_peer_that_follows_another_cluster_file_is_shown_until_the_files_agree(world):
    peers, other = world["a"].peers, world["b"].peers
    other._path = world.path.with_name("other.toml")
    other._path.write_text(
        world.path.read_text() + "[models.m]\nmin_replicas = 0\nmax_replicas = 3\n"
    )
    await asyncio.sleep(4.0)
    assert [peer["problem"] for peer in peers.status()] == ["has another cluster file"]
    assert [peer["problem"] for peer in other.status()] == ["has another cluster file"]
    other._path.write_text(world.path.read_text())
    await asyncio.sleep(4.0)
    assert [peer["problem"] for peer in peers.status()] == [None]
