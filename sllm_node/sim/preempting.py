"""Our placement with preemption in the place of moves: to see what each of the two mechanisms is worth.

Everything else is as in `sim.ours`: states up to `publish_s` old, refusals, loads, keep-alive. Where
a load would end sooner on a device that sessions are on, the replicas that lose the fewest tokens are
stopped; nobody is waited for. Their sessions are placed again at once and compute their tokens anew. A
session is stopped at most once, as with `sim.paper.Shepherd`, or two models could stop each other for ever.
"""

from collections.abc import Iterator
from itertools import chain, combinations
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from sllm_node.cluster.candidate import Candidate, Kind, PlacementRequest
from sllm_node.cluster.moves import Destination, Move, evictions
from sllm_node.cluster.node_view import DeviceView, NodeView
from sllm_node.cluster.placement import Decision, MigrateThenLoad, Reject
from sllm_node.cluster.reservations import Ask
from sllm_node.cluster.state import NodeId, ReplicaState
from sllm_node.sim.ours import Ours
from sllm_node.sim.policy import Choice, Load

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_NOWHERE: Final = Destination(0.0, NodeId(""), ())
"""Where sessions go that are stopped."""


class OursPreempting(Ours):
    """Places by estimated startup time and stops sessions that are in the way."""

    def __init__(self, simulation: "Simulation") -> None:
        super().__init__(simulation, may_move=False, guards_stopped=True)

    @override
    def _decide(self, request: PlacementRequest) -> Decision:
        decision = super()._decide(request)
        best = None if isinstance(decision, Reject) else decision.best
        found = min(self._stops(request, best), default=None, key=lambda way: (way[0], way[1].key))
        if found is None:
            return decision
        return MigrateThenLoad(found[1], (found[1],))

    def _stops(
        self, request: PlacementRequest, best: Candidate | None
    ) -> Iterator[tuple[float, Candidate]]:
        """Yield loads after stops that start sooner than `best`, soonest nodes first, with their times."""
        limit_s = float("inf") if best is None else best.startup_s
        for load_s, name in self._view.paths(request.model) if request.shares == 1 else ():
            if load_s >= limit_s:
                return
            node = self._view.nodes[name]
            for device in node.devices:
                way = self._stop_on(request, node, device, load_s)
                if way is not None and way.startup_s < limit_s:
                    limit_s = way.startup_s
                    yield way.startup_s, way

    def _stop_on(
        self, request: PlacementRequest, node: NodeView, device: DeviceView, load_s: float
    ) -> Candidate | None:
        """Return the load on a device once the cheapest sessions are stopped; None: there is no room."""
        size, now = request.share_bytes, self._simulation.now
        if device.room >= size or device.within_reach < size or request.model in device.models:
            return None
        victims = _fewest_tokens(device, size, request.priority)
        if victims is None:
            return None
        source = self._view.path(request.model, node.node).source
        wait_s = max(0.0, node.path_ready_at(source) - now, device.ready_at - now)
        names = [victim.replica for victim in victims]
        moves = tuple(
            Move(victim.replica, tuple(s.session for s in victim.sessions), _NOWHERE)
            for victim in victims
        )
        return Candidate(
            Kind.MIGRATE, wait_s + load_s, node.node, (device.name,), wait_s=wait_s, load_s=load_s,
            source=source, evicts=evictions(node, {device.name: size}, leaving=names), moves=moves,
        )  # fmt: skip

    @override
    def _asks_for_moves(self, best: Candidate) -> list[tuple[NodeId, Ask]]:
        return []

    @override
    def _choice(self, best: Candidate) -> Choice:
        if not best.moves:
            return super()._choice(best)
        node = self._simulation.nodes[best.node]
        devices = tuple(device for device in node.devices if device.name in best.devices)
        evicts = tuple(node.replicas[name] for name in best.evicts)
        preempts = tuple(node.replicas[move.replica] for move in best.moves)
        return Load(node, devices, evicts, preempts=preempts)


def _fewest_tokens(device: DeviceView, size: int, priority: int) -> tuple[ReplicaState, ...] | None:
    """Return the replicas whose sessions have the fewest tokens of those that free so many bytes."""
    able = [r for r in device.busy if all(s.priority <= priority for s in r.sessions)]
    short = size - device.room
    sets = chain.from_iterable(combinations(able, count) for count in range(1, len(able) + 1))
    enough = (some for some in sets if sum(r.size_on(device.name) for r in some) >= short)
    return min(enough, default=None, key=lambda some: (_tokens(some), [r.replica for r in some]))


def _tokens(replicas: tuple[ReplicaState, ...]) -> int:
    return sum(s.tokens_in + s.tokens_out for r in replicas for s in r.sessions)
