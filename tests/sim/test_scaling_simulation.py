"""Replicas by demand on real nodes over virtual time: minima, homes that die, room that lacks, retiring."""

import asyncio

import pytest

from sllm_node.cluster.autoscale import home_of
from sllm_node.cluster.packing import pack
from sllm_node.cluster.scale_messages import ScaleAnswer, ScaleAsk, unpack_answer, unpack_ask
from sllm_node.core.errors import MessageFormatError, ModelNotFoundError
from sllm_node.core.types import ModelId, NodeId
from tests.sim.cluster_world import in_world, read

SETTLED_S = 15.0
"""The file is read, a new home has watched, a load has ended."""


def wish(world, **models):
    """Write [models.NAME] of `minimum, maximum, keep_alive_s` into the cluster file."""
    text = world.path.read_text().partition("[models.")[0]
    for name, (minimum, maximum, keep_alive_s) in models.items():
        text += f"[models.{name}]\nmin_replicas = {minimum}\nmax_replicas = {maximum}\n"
        text += f"keep_alive_s = {keep_alive_s}\n"
    world.path.write_text(text)


def loads(world):
    return {name: node.rig.store.loads for name, node in world.nodes.items() if node.is_up}


def on_device(world):
    found = [node.rig.store.on_device for node in world.nodes.values() if node.is_up]
    return sorted(model for models in found for model in models)


@in_world(a=(), b=("m",), c=())
async def test_a_minimum_of_one_brings_a_model_up_without_a_request_and_keeps_it(world):
    wish(world, m=(1, 2, 30.0))
    await asyncio.sleep(SETTLED_S)
    assert loads(world) == {"a": [], "b": ["m"], "c": []}
    for node in world.nodes.values():
        (told,) = node.scaling.status()
        assert (told["model"], told["home"]) == ("m", home_of(ModelId("m"), world.nodes))
        assert (told["wanted"], told["ready"]) == (1, 1)
    await asyncio.sleep(1000.0)  # beyond every keep-alive
    assert loads(world) == {"a": [], "b": ["m"], "c": []}


@in_world(a=("m",), b=("m",), c=("m",))
async def test_when_a_home_or_a_replicas_node_dies_the_minimum_is_there_again(world):
    wish(world, m=(1, 1, 30.0))
    await asyncio.sleep(SETTLED_S)
    assert on_device(world) == ["m"]
    home = world.nodes[home_of(ModelId("m"), world.nodes)]
    holder = next(node for node in world.nodes.values() if node.rig.store.on_device)
    for victim in {home, holder}:
        await victim.crash()
    await asyncio.sleep(2 * SETTLED_S)
    assert on_device(world) == ["m"]


@in_world(a=("m",), b=("m",))
async def test_a_replica_above_the_need_is_retired_after_the_keep_alive(world):
    wish(world, m=(2, 2, 20.0))
    await asyncio.sleep(2 * SETTLED_S)
    assert on_device(world) == ["m", "m"]
    wish(world, m=(1, 2, 20.0))
    await asyncio.sleep(15.0)
    assert on_device(world) == ["m", "m"]
    await asyncio.sleep(10.0)
    assert on_device(world) == ["m"]
    wish(world)
    await asyncio.sleep(400.0)  # it is nobody's any more: its node's keep-alive counts
    assert on_device(world) == []


@in_world(a=("m",))
async def test_a_replica_that_retires_ends_its_sessions_first(world):
    stream = world.open("a", "m", tokens=100)
    await asyncio.sleep(3.0)
    world["a"].service.retire(ModelId("m"))
    (replica,) = world["a"].peers.refresh().replicas
    assert (replica.is_leaving, replica.free_slots) == (True, 0)
    assert len(await read(stream)) == 100
    await asyncio.sleep(1.0)
    assert on_device(world) == []


@in_world(a=("m",), b=("m",), c=())
async def test_a_drained_nodes_replica_is_replaced(world):
    wish(world, m=(1, 1, 30.0))
    await asyncio.sleep(SETTLED_S)
    (drained,) = [name for name, node in world.nodes.items() if node.rig.store.on_device]
    world[drained].router.drain()
    await asyncio.sleep(SETTLED_S + 5.0)
    (other,) = {"a", "b"} - {drained}
    assert world[other].rig.store.on_device == {"m"}
    (told,) = world[other].scaling.status()
    assert (told["wanted"], told["ready"], told["leaving"]) == (1, 1, 1)
    world[drained].router.undrain()
    await asyncio.sleep(SETTLED_S + 5.0)
    assert len(on_device(world)) == 1  # not above the maximum


@in_world(a=("m",), b=("m",), c=())
async def test_a_node_that_drains_goes_on_to_show_the_replicas_of_its_cluster(world):
    wish(world, m=(1, 1, 30.0))
    await asyncio.sleep(SETTLED_S)
    (drained,) = [node for node in world.nodes.values() if node.rig.store.on_device]
    drained.router.drain()
    await asyncio.sleep(SETTLED_S + 5.0)
    shown = [node.scaling.status()[0] for node in world.nodes.values()]
    assert [(told["ready"], told["leaving"]) for told in shown] == [(1, 1)] * 3
    assert len({told["home"] for told in shown}) == 1
    assert drained.rig.count("sllm_replicas", model="m", state="leaving") == 1
    wish(world)
    await asyncio.sleep(5.0)
    assert drained.scaling.status() == []
    assert drained.rig.count("sllm_replicas", model="m", state="leaving") is None


@in_world(a=("m", "n", "o"))
async def test_minima_that_do_not_fit_together_do_not_displace_each_other(world):
    wish(world, m=(1, 1, 30.0), n=(1, 1, 30.0), o=(1, 1, 30.0))
    await asyncio.sleep(SETTLED_S)
    before = list(world["a"].rig.store.loads)
    assert len(before) == 2
    await asyncio.sleep(200.0)
    assert world["a"].rig.store.loads == before
    lacking = [told for told in world["a"].scaling.status() if not told["ready"]]
    assert "no node can start another" in lacking[0]["reason"]


@in_world(a=(), b=("m",))
async def test_what_a_node_does_not_start_is_said_to_the_home_that_asked(world):
    answers = []

    class Reply:
        async def send(self, payload):
            answers.append(unpack_answer(payload).problem)

    for name in ("m", "unknown"):
        await world["b"].scaling.answer(NodeId("a"), pack(ScaleAsk("start", name)), Reply())
    await world["b"].service.pin("m")
    await asyncio.sleep(5.0)
    await world["b"].scaling.answer(NodeId("a"), pack(ScaleAsk("retire", "m")), Reply())
    assert answers[0] == ""
    assert answers[1]
    assert "pinned" in answers[2]
    with pytest.raises(ModelNotFoundError):
        world["b"].service.status("unknown")


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x92\xa4kill\xa1m", b"\x92\xa5start\xa0"])
def test_what_is_no_request_of_a_home_is_refused(data):
    with pytest.raises(MessageFormatError):
        unpack_ask(data)


def test_a_request_and_its_answer_come_back_as_they_were():
    ask, answer = ScaleAsk("retire", "m"), ScaleAnswer("no")
    assert (unpack_ask(pack(ask)), unpack_answer(pack(answer))) == (ask, answer)
