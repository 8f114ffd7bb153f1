"""Real peers and routers on virtual time: what clients are told while nodes drain, leave and die."""

import asyncio

import pytest

from sllm_node.cluster.file import TimingConfig
from sllm_node.cluster.messages import Edition
from sllm_node.cluster.peer import PeerState, PeerView
from sllm_node.cluster.shown import served, why
from sllm_node.core.errors import (
    DrainingError,
    GivenBackError,
    ModelNotFoundError,
    NoPlaceError,
    PeerDeniedError,
    WrongKeyError,
)
from sllm_node.core.types import NodeId
from sllm_node.server.faults import status_of
from tests.sim.cluster_world import in_world, read


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
    path = other._file._path = world.path.with_name("other.toml")
    path.write_text(world.path.read_text() + "[models.m]\nmin_replicas = 0\nmax_replicas = 3\n")
    await asyncio.sleep(4.0)
    assert [peer["problem"] for peer in peers.status()] == ["has another cluster file"]
    assert [peer["problem"] for peer in other.status()] == ["has another cluster file"]
    path.write_text(world.path.read_text())
    await asyncio.sleep(4.0)
    assert [peer["problem"] for peer in peers.status()] == [None]


@in_world(a=("m",), b=("m",))
async def test_a_node_that_is_undrained_is_alive_to_its_peers_and_serves_again(world):
    peers, drained = world["a"].peers, world["b"].router
    drained.drain()
    await asyncio.sleep(1.0)
    assert (peers.status()[0]["state"], peers.view.nodes["b"].state.is_draining) == (
        "draining",
        True,
    )
    drained.undrain()
    await asyncio.sleep(1.0)
    assert (peers.status()[0]["state"], peers.view.nodes["b"].state.is_draining) == ("alive", False)
    assert await read(world.open("b", "m")) == list(range(1, 21))
    running = world.open("a", "m", tokens=1000)
    await anext(running)  # where the model is ready
    assert [session.node for session in world["a"].router.sessions()] == ["b"]
    running.cancel()


@in_world(a=(), b=("m",))
async def test_a_peer_that_falls_silent_is_shown_with_its_last_heartbeat_and_what_followed(world):
    peers = world["a"].peers

    def shown():
        (peer,) = peers.status()
        return peer["state"], peer["heard_s"], peer["why"]

    await asyncio.sleep(2.0)
    state, heard_s, why = shown()
    assert (state, why) == ("alive", "")
    assert heard_s <= 1.0
    await world["b"].crash()
    await asyncio.sleep(4.5)
    state, heard_s, why = shown()
    assert (state, 4.0 < heard_s < 6.0) == ("suspect", True)
    assert why == f"silent for {heard_s:.1f} s (suspect after 3 s); refused"
    await asyncio.sleep(4.0)
    state, heard_s, why = shown()
    assert (state, why) == ("dead", f"silent for {heard_s:.1f} s (dead after 6 s); refused")
    world["b"].start()
    await asyncio.sleep(2.0)
    assert shown()[::2] == ("alive", "")


@in_world(a=(), b=("m",))
async def test_a_session_is_shown_with_the_node_of_its_client_at_both_ends(world):
    stream = world.open("a", "m", tokens=1000)
    await anext(stream)
    await asyncio.sleep(1.5)
    for name in ("a", "b"):
        (session,) = world[name].router.sessions()
        assert (session.entry, session.node) == ("a", "b")
        (told,) = served(world[name].peers.view.nodes["b"].state)
        assert (told["session"], told["model"], told["entry"]) == (session.session, "m", "a")
    stream.cancel()


@pytest.mark.parametrize(
    ("state", "was_heard", "unreachable", "said"),
    [
        (PeerState.UNKNOWN, False, None, "not heard yet, for 4.0 s (dead after 10 s)"),
        (PeerState.DEAD, False, "no route to host", "never heard, for 4.0 s"),
        (PeerState.DRAINING, True, None, "it drains: it takes nothing new"),
        (PeerState.GONE, True, "connection refused", "it said that it leaves"),
        (PeerState.ALIVE, True, "no answer in time", "heard, but messages to it fail: no answer"),
    ],
)
def test_every_state_but_alive_says_why(state, was_heard, unreachable, said):
    peer = PeerView(NodeId("b"), state, Edition(0, 0), None, 96.0, was_heard)
    assert why(peer, 100.0, TimingConfig(), unreachable).startswith(said)


@in_world(a=("m",), b=("m",))
async def test_a_request_that_a_drain_turns_away_keeps_its_age_in_the_queue(world):
    """It waits for its model's load at one node, and counts from then on at the other."""
    world["b"].router.drain()
    await asyncio.sleep(0.5)
    stream = world.open("a", "m")
    await asyncio.sleep(0.05)
    assert stream.session_status().state == "waiting"
    age_s = stream.waited_s(asyncio.get_running_loop().time())
    world["b"].router.undrain()
    world["a"].service.give_back(stream.request.session, GivenBackError("m", "there is a place"))
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0.05)
    assert stream.routed.request.waited_s >= age_s
    assert await reading == list(range(1, 21))
    assert stream.startup().startup_s > age_s


@in_world(a=("m",), b=("m",))
async def test_a_node_whose_later_life_a_peer_knew_says_so_in_its_status(world):
    peers = world["b"].peers
    assert peers.problem() is None
    await world["b"].crash()
    world["b"].lives = 100
    world["b"].start()  # another process with this id
    await asyncio.sleep(2.0)
    await world["b"].crash()
    world["b"].lives = 50
    world["b"].start()
    await asyncio.sleep(2.0)
    assert "node 'a' knew a later life of this node" in world["b"].peers.problem()
    assert "another process runs with its id" in world["b"].peers.problem()
    assert world["a"].peers.problem() is None
    await asyncio.sleep(600.0)
    assert world["b"].peers.problem() is None
