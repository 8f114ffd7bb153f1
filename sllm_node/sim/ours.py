"""Our placement: the objects that nodes decide with, fed as nodes feed them.

One view stands for those of all entry nodes, so what one has placed all know. A node's state comes into it
`publish_s` after a change at most, or with its answer to a reservation of memory or to one that it
refused; in between decisions are made on old news, and the target's `Reservations` refuse what is not
so any more. A refused request decides again on the fresh state. Whether running sessions may be moved for
a request is a switch; `sim.preempting` stops them instead.

Nodes know less. A `Granted` has no state there: an entry learns from refusals, and else from heartbeats, a second
apart by default where `publish_s` is 0.1 here. On the example (Gamma, 18 requests a second, CV 8, 8 seeds) the
median P99 goes from 6.4 s to 7.3 s without states on grants (refusals from 34 to 94 of 1,000 requests), and to
7.5 s with heartbeats of a second as well. And here a way with moves has to win by nothing, where nodes want
`placement.gain_s`, and moves may go to other devices of the same node.
"""

from typing import TYPE_CHECKING, Final

from sllm_node.cluster.candidate import Candidate, Kind, PlacementRequest
from sllm_node.cluster.moves import Move
from sllm_node.cluster.placement import Decision, Reject, decide
from sllm_node.cluster.reservations import Ask, Refused, ReservationId, Reservations
from sllm_node.cluster.state import BootId, DeviceShare, NodeId, ReplicaId
from sllm_node.cluster.view import ClusterView
from sllm_node.sim.hardware import Device, Model, Node, Session
from sllm_node.sim.policy import Choice, Go, Join, Load, Queue
from sllm_node.sim.publishing import Publishing

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_TRIES: Final = 4
"""Targets asked for one request before it has to wait."""
_TTL_S: Final = 10.0


class Ours:
    """Places by estimated startup time."""

    def __init__(
        self, simulation: "Simulation", *, may_move: bool = True, guards_stopped: bool = False
    ) -> None:
        self._simulation = simulation
        self._may_move = may_move
        self._view = ClusterView()
        self._publishing = Publishing(simulation, guards_stopped=guards_stopped)
        self._changed: dict[NodeId, Node] = {}
        self._rejected: set[int] = set()
        """Models without a place as far as the view knows; asked again after the next news."""
        self._reservations = {name: Reservations(_TTL_S) for name in simulation.nodes}
        self._asked = 0
        for node in simulation.nodes.values():
            self._publish(node)

    def on_changed(self, node: Node) -> None:
        self._changed[node.id] = node

    def on_tick(self) -> None:
        if self._changed:
            self._rejected.clear()
        for node in self._changed.values():
            self._publish(node)
        self._changed.clear()

    def _publish(self, node: Node) -> None:
        if node.is_up:
            self._view.refresh(self._publishing.state(node), self._simulation.now)
        else:
            self._view.remove(node.id)

    def place(self, session: Session) -> Choice:
        model = session.model
        if model.number in self._rejected:
            return None
        request = PlacementRequest(model.id, model.share, model.shares)
        for _ in range(_TRIES):
            decision = self._decide(request)
            self._count(decision)
            if isinstance(decision, Reject):
                break
            choice = self._ask(decision.best, model)
            if isinstance(choice, Load):
                self._simulation.push(self._simulation.now, self._learn, choice)
            if choice is not None:
                return choice
        self._rejected.add(model.number)
        return None

    def _decide(self, request: PlacementRequest) -> Decision:
        return decide(self._view, request, self._simulation.now, may_move=self._may_move)

    def _learn(self, choice: Load) -> None:
        """Take the states that come with the answers of all who were asked for memory."""
        for node in (choice.node, *(go.node for go in choice.moves if go.node is not None)):
            self._publish(node)

    def _count(self, decision: Decision) -> None:
        kind = "reject" if isinstance(decision, Reject) else decision.best.kind.name.lower()
        self._simulation.journal.counts[f"decision_{kind}"] += 1

    def _ask(self, best: Candidate, model: Model) -> Choice:
        """Ask all targets of a decision; None: one refused, and the view has its fresher state."""
        full = self._simulation.nodes[best.node].replicas.get(best.replica)
        if best.kind is Kind.WAIT and full and not full.is_leaving and full.free_slots <= 0:
            return Queue(full, best.startup_s)
        home = self._simulation.nodes[best.node]
        if any(move.replica not in home.replicas for move in best.moves):
            self._publish(home)
            return None
        asks = [(best.node, self._ask_for(best, model))]
        asks += self._asks_for_moves(best)
        granted: list[tuple[NodeId, Ask]] = []
        for name, ask in asks:
            if not self._is_granted(self._simulation.nodes[name], ask):
                break
            granted.append((name, ask))
        for name, ask in granted:
            self._reservations[name].release(ask.id)
        if len(granted) < len(asks):
            return None
        return self._choice(best)

    def _is_granted(self, node: Node, ask: Ask) -> bool:
        if not node.is_up:
            self._view.remove(node.id)
            return False
        named = (*ask.evicts, *ask.frees, *((ask.replica,) if ask.replica else ()))
        state = self._publishing.state(node, named)
        answer = self._reservations[node.id].ask(ask, state, self._simulation.now)
        if isinstance(answer, Refused):
            self._simulation.journal.counts["refusal"] += 1
            self._publish(node)
            return False
        return True

    def _ask_for(self, best: Candidate, model: Model) -> Ask:
        if best.kind in (Kind.SERVE, Kind.WAIT):
            return self._new_ask(best.node, replica=best.replica)
        shares = tuple(DeviceShare(device, model.share) for device in best.devices)
        frees = tuple(move.replica for move in best.moves)
        return self._new_ask(best.node, shares=shares, evicts=best.evicts, frees=frees)

    def _asks_for_moves(self, best: Candidate) -> list[tuple[NodeId, Ask]]:
        return [(move.to.node, self._ask_for_move(move, best.node)) for move in best.moves]

    def _ask_for_move(self, move: Move, home: NodeId) -> Ask:
        to = move.to
        if to.joins:
            return self._new_ask(to.node, replica=to.joins, places=len(move.sessions))
        size = self._simulation.nodes[home].replicas[move.replica].model.share
        shares = tuple(DeviceShare(device, size) for device in to.devices)
        return self._new_ask(to.node, shares=shares, evicts=to.evicts)

    def _new_ask(
        self, name: NodeId, *, shares: tuple[DeviceShare, ...] = (),
        evicts: tuple[ReplicaId, ...] = (), frees: tuple[ReplicaId, ...] = (),
        replica: ReplicaId | None = None, places: int = 1,
    ) -> Ask:  # fmt: skip
        self._asked += 1
        boot = BootId(str(self._simulation.nodes[name].boot))
        number = ReservationId(str(self._asked))
        count = 0 if replica is None else places
        return Ask(number, boot, 0, shares, evicts, frees, replica, count)

    def _choice(self, best: Candidate) -> Choice:
        node = self._simulation.nodes[best.node]
        if best.kind in (Kind.SERVE, Kind.WAIT):
            return Join(node.replicas[best.replica])
        evicts = tuple(node.replicas[name] for name in best.evicts)
        moves = tuple(self._go(move, node) for move in best.moves)
        return Load(node, _devices(node, best.devices), evicts, moves)

    def _go(self, move: Move, home: Node) -> Go:
        node = self._simulation.nodes[move.to.node]
        victim = home.replicas[move.replica]
        if move.to.joins:
            return Go(victim, joins=node.replicas[move.to.joins])
        evicts = tuple(node.replicas[name] for name in move.to.evicts)
        return Go(victim, None, node, _devices(node, move.to.devices), evicts)


def _devices(node: Node, names: tuple[str, ...]) -> tuple[Device, ...]:
    return tuple(device for device in node.devices if device.name in names)
