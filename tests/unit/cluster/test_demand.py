from dataclasses import replace

from sllm_node.cluster.autoscale import ReplicaSeen, Start
from sllm_node.cluster.candidate import PlacementRequest
from sllm_node.cluster.demand import Load, demand_of, load_of
from sllm_node.cluster.state import (
    Bandwidths,
    BootId,
    DeviceShare,
    DeviceState,
    HeldModel,
    NodeId,
    NodeState,
    ReplicaId,
    ReplicaState,
    SessionState,
)
from sllm_node.cluster.view import ClusterView
from sllm_node.core import types
from sllm_node.core.types import ModelId, SessionId

M = ModelId("m")
A, B = types.NodeId("a"), types.NodeId("b")
REQUEST = PlacementRequest(M, share_bytes=8)


def node(name, *, free, in_dram, replicas=()):
    held = HeldModel(M, 8, 8, bytes_dram=8 if in_dram else 0, bytes_nvme=8)
    return NodeState(
        NodeId(name), BootId("1"), 1, (DeviceState("d0", 16, free),), Bandwidths(8, 8, 4, 1),
        (held,), replicas,
    )  # fmt: skip


def seen(*nodes):
    view = ClusterView()
    for state in nodes:
        view.update(state, 0.0)
    return view


def test_a_start_is_known_for_each_node_with_room_with_its_estimate():
    view = seen(
        node("a", free=8, in_dram=False),
        node("b", free=8, in_dram=True),
        node("c", free=0, in_dram=True),
    )
    demand = demand_of(view, REQUEST, Load(waiting=3), 5, 0.0)
    assert demand.starts == (Start(A, 8.0), Start(B, 2.0))
    assert (demand.slots, demand.waiting, demand.sessions()) == (5, 3, 3)
    assert demand.replicas == ()


def test_replicas_are_known_as_their_nodes_tell_of_them():
    replica = ReplicaState(
        ReplicaId("r"), M, (DeviceShare("d0", 8),), slots=7,
        sessions=(SessionState(SessionId("s"), 1, 1),), is_pinned=True,
    )  # fmt: skip
    coming = ReplicaState(ReplicaId("q"), M, (DeviceShare("d0", 8),), slots=7, ready_s=2.0)
    view = seen(node("a", free=0, in_dram=True, replicas=(replica, coming)))
    demand = demand_of(view, REQUEST, Load(), 5, 0.0)
    assert demand.slots == 7
    assert demand.replicas == (
        ReplicaSeen(ReplicaId("r"), A, sessions=1, is_pinned=True),
        ReplicaSeen(ReplicaId("q"), A, is_ready=False),
    )


def test_of_a_model_that_nobody_knows_there_is_only_the_load():
    demand = demand_of(seen(), REQUEST, Load(waiting=1), 5, 0.0)
    assert (demand.slots, demand.waiting, demand.replicas, demand.starts) == (5, 1, (), ())


def test_what_nodes_tell_of_waiting_sessions_is_added_up():
    states = [node(name, free=8, in_dram=True) for name in "ab"]
    held = replace(states[0].models[0], waiting=3)
    view = seen(replace(states[0], models=(held,)), states[1])
    assert load_of(view, M) == Load(waiting=3)


def test_a_replica_that_is_kept_makes_no_room_and_one_that_leaves_is_told():
    other = ReplicaState(ReplicaId("o"), ModelId("o"), (DeviceShare("d0", 16),), 7, is_leaving=True)
    view = seen(node("a", free=0, in_dram=True, replicas=(other,)))
    assert [start.node for start in demand_of(view, REQUEST, Load(), 5, 0.0).starts] == [A]
    kept = demand_of(view, REQUEST, Load(), 5, 0.0, frozenset({ModelId("o")}))
    assert kept.starts == ()
    (told,) = demand_of(view, PlacementRequest(ModelId("o"), 16), Load(), 5, 0.0).replicas
    assert told.is_leaving


def test_a_replica_on_a_node_that_drains_leaves():
    replica = ReplicaState(ReplicaId("r"), M, (DeviceShare("d0", 8),), slots=7)
    state = node("a", free=8, in_dram=True, replicas=(replica,))
    view = seen(replace(state, is_draining=True), node("b", free=8, in_dram=True))
    demand = demand_of(view, REQUEST, Load(), 5, 0.0)
    assert demand.replicas == (ReplicaSeen(ReplicaId("r"), A, is_leaving=True, is_draining=True),)
    assert demand.starts == (Start(B, 2.0),)
