"""What the autoscaler is told of a model, taken from the cluster's view and the placement's estimates."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sllm_node.cluster.autoscale import Demand, ReplicaSeen, Start
from sllm_node.cluster.candidate import Candidate, PlacementRequest
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.placement import loads
from sllm_node.cluster.state import ReplicaState
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, NodeId


@dataclass(frozen=True, slots=True)
class Load:
    """Sessions without a replica, summed over the nodes where requests come in."""

    waiting: int = 0


def load_of(view: ClusterView, model: ModelId) -> Load:
    """Return what nodes tell of sessions that wait where no replica is."""
    told = (node.held.get(model) for node in view.nodes.values())
    return Load(waiting=sum(held.waiting for held in told if held is not None))


def demand_of(
    view: ClusterView,
    request: PlacementRequest,
    load: Load,
    slots: int,
    now: float,
    kept: AbstractSet[ModelId] = frozenset(),
) -> Demand:
    """Return the demand for a model; `slots`: of a replica, where there is none to be asked.

    No replica of the models in `kept` makes room for another one of this model.
    """
    model = request.model
    replicas = [
        (node, replica)
        for node in view.resident(model)
        for replica in view.nodes[node].by_model[model]
    ]
    starts = {
        candidate.node: candidate.startup_s
        for candidate in reversed(loads(view, request, now))  # which take nothing from who runs
        if not _evicted(view, candidate) & kept
    }
    return Demand(
        model=model,
        slots=max((replica.slots for _, replica in replicas), default=slots),
        waiting=load.waiting,
        replicas=tuple(_seen(view.nodes[node], replica) for node, replica in replicas),
        starts=tuple(Start(NodeId(node), startup_s) for node, startup_s in sorted(starts.items())),
    )


def _evicted(view: ClusterView, candidate: Candidate) -> set[ModelId]:
    gone = set(candidate.evicts)
    return {r.model for r in view.nodes[candidate.node].state.replicas if r.replica in gone}


def _seen(node: NodeView, replica: ReplicaState) -> ReplicaSeen:
    is_draining = node.state.is_draining
    return ReplicaSeen(
        replica=replica.replica,
        node=NodeId(node.node),
        sessions=len(replica.sessions),
        is_ready=replica.ready_s <= 0,
        is_leaving=replica.is_leaving or is_draining,
        is_draining=is_draining,
        is_pinned=replica.is_pinned,
        idle_s=replica.idle_s,
    )
