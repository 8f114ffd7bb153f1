"""What a node shows of the cluster: who is away and why, who serves whom, why a request would go where. Pure."""

from typing import Any

from sllm_node.cluster.choice import choose, request_for
from sllm_node.cluster.file import TimingConfig
from sllm_node.cluster.peer import PeerState, PeerView
from sllm_node.cluster.placement import explain
from sllm_node.cluster.state import HeldModel, NodeState
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, ModelState, ModelStatus, NodeId, Tier, Weights


def status_elsewhere(view: ClusterView, held: HeldModel) -> ModelStatus:
    """Return how a model stands that this node does not have."""
    replicas = [
        replica for node in view.nodes.values() for replica in node.by_model.get(held.model, ())
    ]
    is_ready = any(replica.ready_s <= 0 for replica in replicas)
    coming = ModelState.LOADING if replicas else ModelState.IDLE
    return ModelStatus(
        model=held.model,
        state=ModelState.READY if is_ready else coming,
        tier=Tier.REMOTE,
        bytes_total=held.bytes_decoded,
        bytes_by_tier={},
        dtype="", architecture="",
        context_tokens=held.context_tokens,
        pinned=any(replica.is_pinned for replica in replicas), priority=0,
        running=sum(len(replica.sessions) for replica in replicas), waiting=0,
        keep_alive_until_s=None, progress=None, created=held.created,
        devices=tuple(
            f"{name}/{share.device}"
            for name, node in sorted(view.nodes.items())
            for replica in node.by_model.get(held.model, ())
            for share in replica.shares
        ),
    )  # fmt: skip


def explanation(
    view: ClusterView, model: ModelId, me: NodeId, now: float, gain_s: float | None = None
) -> dict[str, Any]:
    """Return where a request for `model` would go now, and what all ways were estimated at."""
    asked = request_for(view, model)
    choice = choose(view, asked, me, now, gain_s=gain_s)
    return {
        "model": model,
        "node": None if choice is None else choice.node,
        "reason": "no node has this model" if choice is None else choice.reason,
        "candidates": [
            {
                "node": c.node, "devices": list(c.devices), "way": c.kind.name.lower(),
                "startup_s": c.startup_s, "wait_s": c.wait_s, "load_s": c.load_s,
                "source": None if c.source is None else c.source.value,
                "crowding": c.crowding, "evicts": list(c.evicts), "moves": len(c.moves),
                "moving": [
                    {"replica": m.replica, "sessions": len(m.sessions), "to": m.to.node}
                    for m in c.moves
                ],
                "reason": c.reason,
            }
            for c in explain(view, asked, now)
        ],
    }  # fmt: skip


def why(peer: PeerView, now: float, timing: TimingConfig, unreachable: str | None) -> str:
    """Return why a peer is not simply alive, as `status --cluster` says it; empty: it is.

    `unreachable`: what happened to the last message to it.
    """
    said = _said(peer, now - peer.heard_at, timing)
    if unreachable is None or peer.state is PeerState.GONE:
        return said
    return f"{said}; {unreachable}" if said else f"heard, but messages to it fail: {unreachable}"


def _said(peer: PeerView, silent_s: float, timing: TimingConfig) -> str:
    since = "silent" if peer.was_heard else "never heard,"
    match peer.state:
        case PeerState.ALIVE:
            return ""
        case PeerState.DRAINING:
            return "it drains: it takes nothing new"
        case PeerState.GONE:
            return "it said that it leaves"
        case PeerState.UNKNOWN:
            return f"not heard yet, for {silent_s:.1f} s (dead after {timing.dead_s:g} s)"
        case PeerState.SUSPECT:
            return f"{since} for {silent_s:.1f} s (suspect after {timing.suspect_s:g} s)"
        case PeerState.DEAD:
            return f"{since} for {silent_s:.1f} s (dead after {timing.dead_s:g} s)"


def differing(view: ClusterView) -> dict[ModelId, list[list[NodeId]]]:
    """Return the models of which nodes have different weights under one name, and who has which, the newest first."""
    told: dict[ModelId, list[list[tuple[Weights, NodeId]]]] = {}
    for name, node in sorted(view.nodes.items()):
        for model, held in node.held.items():
            kinds = told.setdefault(model, [])
            same = next((kind for kind in kinds if kind[0][0].is_same(held.weights)), None)
            if same is None:
                kinds.append([(held.weights, name)])
            else:
                same.append((held.weights, name))
    found: dict[ModelId, list[list[NodeId]]] = {}
    for model, kinds in sorted(told.items()):
        if len(kinds) > 1:
            kinds.sort(key=lambda kind: -max(one.created for one, _ in kind))
            found[model] = [[name for _, name in kind] for kind in kinds]
    return found


def served(state: NodeState) -> list[dict[str, Any]]:
    """Return the sessions that a node serves or has waiting, each with the node of its client."""
    return [
        {
            "session": session.session, "model": replica.model,
            "entry": session.entry or state.node,
            "prompt_tokens": session.tokens_in, "generated_tokens": session.tokens_out,
        }
        for replica in state.replicas
        for session in replica.sessions
    ]  # fmt: skip
