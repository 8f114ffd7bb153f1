"""From a placement to one node: what the entry node does with what `placement` decides. Pure.

Four rules on top of it. A node where no session can have as many tokens, or with
other weights than it began with, gets none. This node wins where a peer is no better: forwarding costs a little, and the
same state must not send the requests of all nodes to the one whose name comes first. A way that moves
running sessions has to be sooner by `gain_s` than the best that moves none, since their readers feel it.
And where no way is left a request queues, at a node that has the model: its scheduler keeps order there.
"""

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

from sllm_node.cluster.candidate import Candidate, Kind, PlacementRequest
from sllm_node.cluster.estimate import StartupParts
from sllm_node.cluster.placement import decide, decide_moves, ways_on
from sllm_node.cluster.reservations import Ask, Away, ReservationId
from sllm_node.cluster.state import DeviceShare, NodeId, NodeState
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import GenerationRequest, ModelId, Startup, Weights

FORWARD_S: Final = 0.002
"""What passing a request on may cost: a peer has to be better by that."""
_ROUNDING: Final = 1e-12
"""Of a limit: what is just within it is found, and judged after."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why."""

    node: NodeId
    way: str
    """The kind of the candidate in lower case, or `queue`."""
    reason: str
    candidate: Candidate | None = None
    forward_s: float = 0.0
    """What passing the request on is expected to add."""
    busy_ends: int = 0
    """How many of the two nodes of a forward have something to do."""
    began: "Choice | None" = None
    """What the request's hint began: this load is its own, however it stands now."""
    began_s: float = 0.0
    """How long before this choice."""

    @property
    def parts(self) -> StartupParts | None:
        """Return what the estimate is made of; None: it queues."""
        if self.began is not None and self.began.parts is not None:
            return replace(self.began.parts.later(self.began_s), forward_s=self.forward_s)
        if self.candidate is None:
            return None
        return StartupParts(self.candidate.wait_s, self.candidate.load_s, self.forward_s)

    @property
    def startup_s(self) -> float | None:
        """Return the estimate for the moment of the choice; None: it queues."""
        found = self.parts
        return None if found is None else found.queue_s + found.load_s + found.forward_s

    @property
    def moves(self) -> bool:
        """Whether sessions are to move for it."""
        return self.candidate is not None and bool(self.candidate.moves)


def startup_of(choice: Choice | None, startup_s: float | None) -> Startup:
    """Return how a session came to run that was placed so."""
    if choice is None:
        return Startup(startup_s=startup_s)
    shown = choice.began or choice
    return Startup(shown.node, shown.way, shown.reason, choice.startup_s, startup_s)


def request_for(
    view: ClusterView,
    model: ModelId,
    priority: int = 0,
    tokens: int = 0,
    weights: Weights | None = None,
) -> PlacementRequest:
    """Return what is to be placed for `model`: of what its nodes tell, the least memory."""
    told = [node.held[model] for node in view.nodes.values() if model in node.held]
    sizes = [(held.replica_shares, held.replica_bytes or held.bytes_decoded) for held in told] or [
        (1, 0)
    ]
    shares, size = min(sizes)
    return PlacementRequest(model, size, shares, priority, tokens, weights)


def choose(
    view: ClusterView,
    request: PlacementRequest,
    me: NodeId,
    now: float,
    excluded: AbstractSet[NodeId] = frozenset(),
    gain_s: float | None = None,
) -> Choice | None:
    """Return where a request goes; None: no node has the model that is not excluded, and fits.

    `gain_s`: how much sooner a way has to be that moves sessions; None: no such way is taken.
    """
    excluded = excluded | view.unfit(request.model, request.tokens, request.weights)
    decision = decide(view, request, now, may_move=False, excluded=excluded)
    best: Candidate | None = getattr(decision, "best", None)
    if gain_s is not None:
        best = _moving(view, request, now, excluded, best, gain_s) or best
    if best is None:
        return _queue(view, request.model, me, excluded)
    if best.node != me and me not in excluded:
        mine = ways_on(view, request, me, now)
        there = best
        best = next((candidate for candidate in mine if _is_as_good(candidate, there)), best)
    return Choice(best.node, best.kind.name.lower(), best.reason, best)


def ask_for(choice: Choice, request: PlacementRequest, state: NodeState, name: str) -> Ask:
    """Return what the choice counts on at its node, whose state was `state`."""
    ask = Ask(ReservationId(name), state.boot, state.version)
    found = choice.candidate
    if found is None:
        return ask
    if found.kind is Kind.SERVE:
        return Ask(ask.id, ask.boot, ask.version, replica=found.replica, places=1)
    if found.kind in (Kind.LOAD, Kind.EVICT):
        shares = tuple(DeviceShare(device, request.share_bytes) for device in found.devices)
        return Ask(ask.id, ask.boot, ask.version, shares=shares, evicts=found.evicts)
    if found.kind is Kind.MIGRATE:
        return Ask(
            ask.id, ask.boot, ask.version,
            shares=tuple(DeviceShare(device, request.share_bytes) for device in found.devices),
            evicts=found.evicts,
            frees=tuple(move.replica for move in found.moves),
            aways=tuple(Away(move.replica, move.sessions, move.to.node) for move in found.moves),
            ready_s=found.startup_s,
        )  # fmt: skip
    return ask


def placed_fields(request: GenerationRequest, choice: Choice) -> dict[str, object]:
    """Return what the log says of a request that was placed."""
    return {
        "session": request.session, "model": request.model, "node": choice.node,
        "way": choice.way, "why": choice.reason,
    }  # fmt: skip


def _moving(
    view: ClusterView, request: PlacementRequest, now: float, excluded: AbstractSet[NodeId],
    staying: Candidate | None, gain_s: float,
) -> Candidate | None:  # fmt: skip
    """Return the soonest way that moves sessions and wins by enough over `staying`; None: there is none."""
    limit_s = math.inf if staying is None else staying.startup_s * (1 + _ROUNDING) - gain_s
    found = decide_moves(view, request, now, limit_s, excluded)
    if found is None or staying is None:
        return found
    is_enough = found.startup_s + gain_s <= staying.startup_s and found.key < staying.key
    return found if is_enough else None


def _is_as_good(mine: Candidate, best: Candidate) -> bool:
    """Tell whether staying here costs nothing that counts."""
    if mine.startup_s > best.startup_s + FORWARD_S:
        return False
    return mine.kind is not Kind.SERVE or mine.crowding <= best.crowding + 0.05


def _queue(
    view: ClusterView, model: ModelId, me: NodeId, excluded: AbstractSet[NodeId]
) -> Choice | None:
    holders = [
        node for node in view.nodes.values()
        if (model in node.held or model in node.by_model)
        and node.node not in excluded and not node.state.is_draining
    ]  # fmt: skip
    if not holders:
        return None
    best = min(
        holders,
        key=lambda n: (sum(len(r.sessions) for r in n.state.replicas), n.node != me, n.node),
    )
    return Choice(best.node, "queue", f"{best.node}: no way is free; it waits there for its turn")
