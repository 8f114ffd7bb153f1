"""The policies that ServerlessLLM (OSDI 2024) describes: its own, and its Shepherd* to compare with.

Both know at every moment what is so everywhere, as a central scheduler with its own books does, and
both reckon a load as q + n / b. A request joins a replica that has a place. Else the node is taken whose
load ends soonest. Where the devices of a nearer node are busy, `ServerlessLLM` moves running sessions
away, if the moves and the load are quicker than any load elsewhere: which ones is a 0/1 knapsack over a
device's replicas, each weighing the memory that it frees and costing its load and resume time (a *
(t_in + t_out) + b) elsewhere. `Shepherd` stops them instead; they are placed again and compute their
tokens anew. A session is stopped at most once, or two models could stop each other for ever.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from sllm_node.core.units import MIB
from sllm_node.sim.hardware import Device, Model, Node, Replica, Session
from sllm_node.sim.plain import Rooms, open_replica
from sllm_node.sim.policy import Choice, Go, Join, Load

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_UNIT: Final = 256 * MIB
"""Of the knapsack."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A load and when it would end."""

    end_s: float
    load: Load


class LoadTimes:
    """q + n / b on the nodes of a simulation."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._names = list(simulation.nodes)
        self._rooms = Rooms()
        self._cursor = 0

    def soonest(self, model: Model, without: frozenset[int] = frozenset()) -> Estimate | None:
        """Return the load where there is room that ends soonest; not on devices with these `id`s."""
        best: Estimate | None = None
        for node in self._near(model):
            best = self._better(best, node, model, without)
        for node in self._rest(model):
            if best is not None and best.end_s <= self.load_s(node, model):
                break
            best = self._better(best, node, model, without)
        return best

    def load_s(self, node: Node, model: Model) -> float:
        """Return n / b."""
        return self._simulation.loading.path(node, model, node.told).load_s

    def end_s(self, node: Node, model: Model, devices: tuple[Device, ...]) -> float:
        """Return q + n / b."""
        loading = self._simulation.loading
        path = loading.path(node, model, node.told)
        return loading.wait_s(node, devices, path.source) + path.load_s

    def near(self, model: Model) -> list[Node]:
        """Return the nodes that are up and have the model, those that load it quickest first."""
        nodes = [node for node in self._near(model) if node.is_up]
        return sorted(nodes, key=lambda node: (self.load_s(node, model), node.id))

    def _near(self, model: Model) -> Iterator[Node]:
        return iter(list(self._simulation.loading.holders[model.number].values()))

    def _rest(self, model: Model) -> Iterator[Node]:
        """Yield the other nodes, beginning with another one each time."""
        holders = self._simulation.loading.holders[model.number]
        self._cursor = (self._cursor + 1) % len(self._names)
        for i in range(len(self._names)):
            name = self._names[(self._cursor + i) % len(self._names)]
            if name not in holders:
                yield self._simulation.nodes[name]

    def _better(
        self, best: Estimate | None, node: Node, model: Model, without: frozenset[int]
    ) -> Estimate | None:
        room = self._rooms.room_for(node, model)
        if room is None or any(id(device) in without for device in room[0]):
            return best
        end_s = self.end_s(node, model, room[0])
        if best is None or end_s < best.end_s:
            return Estimate(end_s, Load(node, *room))
        return best


class _ByStartup:
    """Joins what has a place; else takes the device where a load, or making room for it, ends first."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._times = LoadTimes(simulation)

    def on_tick(self) -> None:
        """Decides on what is so now."""

    def on_changed(self, node: Node) -> None:
        """Decides on what is so now."""

    def place(self, session: Session) -> Choice:
        replica = open_replica(self._simulation, session.model)
        if replica is not None:
            return Join(replica)
        best = self._times.soonest(session.model)
        for node in self._times.near(session.model):
            load_s = self._times.load_s(node, session.model)
            if best is not None and load_s >= best.end_s:
                break
            for device in node.devices if session.model.shares == 1 else ():
                limit_s = math.inf if best is None else best.end_s
                best = self._after_room(session.model, node, device, limit_s) or best
        return best.load if best else None

    def _after_room(
        self, model: Model, node: Node, device: Device, limit_s: float
    ) -> Estimate | None:
        """Return the load on a device once there is room, if it ends before the limit."""
        raise NotImplementedError


class ServerlessLLM(_ByStartup):
    """Startup-time-optimised placement with live migration."""

    @override
    def _after_room(
        self, model: Model, node: Node, device: Device, limit_s: float
    ) -> Estimate | None:
        """Return the load on a device once sessions have moved, if it ends before the limit."""
        load_s = self._times.end_s(node, model, (device,))
        if load_s >= limit_s or any(device in r.devices for r in _of(node, model)):
            return None
        busy, idle = _victims(node, device)
        free = device.free + sum(r.model.share for r in idle)
        moves = [move for victim in busy if (move := self._move(victim, device))]
        chosen = _knapsack(moves, model.share - free)
        if not chosen or len({_target(go) for _, go in chosen}) < len(chosen):
            return None
        end_s = sum(cost_s for cost_s, _ in chosen) + load_s
        goes = tuple(go for _, go in chosen)
        if end_s >= limit_s or _is_conflicting(goes, idle):
            return None
        evicts = tuple(idle)
        return Estimate(end_s, Load(node, (device,), evicts, goes))

    def _move(self, victim: Replica, device: Device) -> tuple[float, Go] | None:
        """Return the quickest way of a victim's sessions to another device, and its seconds."""
        now = self._simulation.now
        sessions = list(victim.sessions.values())
        resume_s = sum(victim.model.resume_s(s.tokens_in + s.out_at(now)) for s in sessions)
        for other in self._simulation.replicas[victim.model.number].values():
            if other is not victim and other.is_ready and other.free_slots >= len(sessions):
                return resume_s, Go(victim, joins=other)
        if victim.model.shares > 1:
            return None
        found = self._times.soonest(victim.model, frozenset((id(device),)))
        if found is None:
            return None
        load = found.load
        go = Go(victim, None, load.node, load.devices, load.evicts)
        return found.end_s + resume_s, go


class Shepherd(_ByStartup):
    """The same estimates; sessions in the way are stopped."""

    @override
    def _after_room(
        self, model: Model, node: Node, device: Device, limit_s: float
    ) -> Estimate | None:
        end_s = self._times.end_s(node, model, (device,))
        if end_s >= limit_s or any(device in r.devices for r in _of(node, model)):
            return None
        busy, idle = _victims(node, device)
        free = device.free + sum(r.model.share for r in idle)
        now = self._simulation.now
        lost = [
            (float(sum(s.tokens_in + s.out_at(now) for s in r.sessions.values())), Go(r))
            for r in busy
            if not any(s.preempted for s in r.sessions.values())
        ]
        chosen = _knapsack(lost, model.share - free)
        if not chosen:
            return None
        preempts = tuple(go.victim for _, go in chosen)
        return Estimate(end_s, Load(node, (device,), tuple(idle), preempts=preempts))


def _of(node: Node, model: Model) -> list[Replica]:
    return [replica for replica in node.replicas.values() if replica.model is model]


def _victims(node: Node, device: Device) -> tuple[list[Replica], list[Replica]]:
    """Return the replicas on a device whose sessions could go, and the idle ones."""
    here = [r for r in node.replicas.values() if device in r.devices and not r.is_leaving]
    ready = [r for r in here if r.is_ready and not r.incoming]
    return [r for r in ready if r.sessions], [r for r in ready if r.is_idle]


def _is_conflicting(goes: tuple[Go, ...], idle: list[Replica]) -> bool:
    """Tell whether a replica would be evicted twice, or evicted and joined."""
    gone = [replica.name for go in goes for replica in go.evicts]
    gone += [replica.name for replica in idle]
    joined = {go.joins.name for go in goes if go.joins is not None}
    return len(set(gone)) < len(gone) or not joined.isdisjoint(gone)


def _target(go: Go) -> str:
    if go.joins is not None:
        return go.joins.name
    assert go.node is not None
    return f"{go.node.id} {go.devices[0].name}"


def _knapsack(moves: list[tuple[float, Go]], short: int) -> list[tuple[float, Go]] | None:
    """Return the cheapest moves that free so many bytes: dynamic programming over what is freed.

    None: all together don't.
    """
    wanted = math.ceil(max(0, short) / _UNIT)
    best: list[tuple[float, tuple[int, ...]] | None] = [None] * (wanted + 1)
    best[0] = (0.0, ())
    for i, (cost_s, go) in enumerate(moves):
        weight = go.victim.model.share // _UNIT
        for freed in range(wanted, -1, -1):
            before = best[freed]
            if before is None:
                continue
            reached = min(wanted, freed + weight)
            after = (before[0] + cost_s, (*before[1], i))
            old = best[reached]
            if reached > freed and (old is None or after < old):
                best[reached] = after
    found = best[wanted]
    return None if found is None else [moves[i] for i in found[1]]
