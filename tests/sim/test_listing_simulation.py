"""Peers that the directory lists: they come, stay while they speak, and go."""

import asyncio

from sllm_node.core.types import NodeId
from tests.sim.cluster_world import in_world

C = NodeId("c")


async def with_c_listed(world):
    """Take c out of the file, and let a and b know of it by the directory."""
    text = world.path.read_text().replace('[[nodes]]\nid = "c"\naddress = "10.0.0.3:8100"\n', "")
    world.path.write_text(text + '[directory]\nendpoints = ["http://etcd:2379"]\n')
    for node in world.nodes.values():
        assert node.peers.reload()
    assert world["a"].peers.address(C) is None
    for name in "ab":
        world[name].peers.list_peer(C, "10.0.0.3:8100")
    await asyncio.sleep(3.0)
    return world["a"].peers


@in_world(a=(), b=(), c=("m",))
async def test_a_listed_peer_is_placed_at_and_stays_unlisted_for_as_long_as_it_speaks(world):
    peers = await with_c_listed(world)
    assert (peers.address(C), C in peers.view.nodes) == ("10.0.0.3:8100", True)
    peers.unlist(C, has_left=False)
    await asyncio.sleep(30.0)
    assert C in peers.view.nodes
    await world["c"].crash()
    await asyncio.sleep(10.0)
    assert (peers.address(C), C in peers.view.nodes) == (None, False)


@in_world(a=(), b=(), c=("m",))
async def test_a_peer_that_is_listed_again_before_it_dies_is_waited_for(world):
    peers = await with_c_listed(world)
    peers.unlist(C, has_left=False)
    peers.list_peer(C, "10.0.0.3:8100")
    await world["c"].crash()
    await asyncio.sleep(10.0)
    assert (peers.address(C), C in peers.view.nodes) == ("10.0.0.3:8100", False)


@in_world(a=(), b=(), c=("m",))
async def test_a_peer_that_left_the_directory_is_gone_at_once(world):
    peers = await with_c_listed(world)
    peers.unlist(C, has_left=True)
    assert (peers.address(C), C in peers.view.nodes) == (None, False)
    peers.unlist(C, has_left=True)
    assert peers.address(NodeId("b")) == "10.0.0.2:8100"
