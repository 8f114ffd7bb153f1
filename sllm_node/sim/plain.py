"""Policies that look at load times little or not at all: a random device, the least loaded node.

As with any router, a request joins a replica that has a place, ready or loading, before anything is loaded.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from sllm_node.sim.hardware import Device, Model, Node, Replica, Session
from sllm_node.sim.policy import Choice, Join, Load

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_DRAWS: Final = 32
"""Nodes tried at random before all are looked at in order."""


def open_replica(simulation: "Simulation", model: Model) -> Replica | None:
    """Return the replica with a place that starts soonest, the emptiest of equals."""
    best: Replica | None = None
    best_key = (0.0, 0)
    for replica in simulation.replicas[model.number].values():
        if replica.free_slots <= 0:
            continue
        wait_s = 0.0 if replica.is_ready else max(1e-9, replica.expected_at - simulation.now)
        key = wait_s, len(replica.sessions)
        if best is None or key < best_key:
            best, best_key = replica, key
            if key == (0.0, 0):
                break
    return best


class _Space:
    """What a device has free, and what it would have if idle replicas left."""

    __slots__ = ("device", "idle", "models", "room")

    def __init__(self, node: Node, device: Device) -> None:
        here = [replica for replica in node.replicas.values() if device in replica.devices]
        idle = [replica for replica in here if replica.is_idle]
        self.device = device
        self.idle = sorted(idle, key=lambda replica: (replica.idle_since, replica.name))
        """The longest idle first."""
        self.models = {replica.model.number for replica in here}
        self.room = device.free + sum(replica.model.share for replica in idle)

    def evicts(self, size: int) -> list[Replica]:
        """Return the idle replicas that have to leave for so many bytes; there must be room."""
        short = size - self.device.free
        chosen: list[Replica] = []
        for replica in self.idle:
            if short <= 0:
                break
            chosen.append(replica)
            short -= replica.model.share
        return chosen


class Rooms:
    """What is free on each node, looked up again when the node has changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int, list[_Space]]] = {}

    def room_for(
        self, node: Node, model: Model
    ) -> tuple[tuple[Device, ...], tuple[Replica, ...]] | None:
        """Return devices and the idle replicas to evict, the fewest; None: there is no room."""
        known = self._known.get(node.id)
        if known is None or known[0] != node.version:
            spaces = [_Space(node, device) for device in node.devices] if node.is_up else []
            most = max((space.room for space in spaces), default=0)
            known = self._known[node.id] = (node.version, most, spaces)
        if known[1] < model.share:
            return None
        return _choose(known[2], model)


def _choose(
    spaces: list[_Space], model: Model
) -> tuple[tuple[Device, ...], tuple[Replica, ...]] | None:
    found: list[tuple[int, float, str, Device, list[Replica]]] = []
    for space in spaces:
        if space.room >= model.share and model.number not in space.models:
            evicts, device = space.evicts(model.share), space.device
            found.append((len(evicts), device.link_until, device.name, device, evicts))
    if len(found) < model.shares:
        return None
    chosen = sorted(found, key=lambda entry: entry[:3])[: model.shares]
    leaving: dict[str, Replica] = {r.name: r for entry in chosen for r in entry[4]}
    return tuple(entry[3] for entry in chosen), tuple(leaving.values())


class Serverless:
    """A random device that is free: as serverless platforms place functions."""

    def __init__(self, simulation: "Simulation", seed: int) -> None:
        self._simulation = simulation
        self._rng = np.random.default_rng([seed, 6])
        self._names = list(simulation.nodes)
        self._rooms = Rooms()

    def on_tick(self) -> None:
        """Decides on what is so now."""

    def on_changed(self, node: Node) -> None:
        """Decides on what is so now."""

    def place(self, session: Session) -> Choice:
        replica = open_replica(self._simulation, session.model)
        if replica is not None:
            return Join(replica)
        count = len(self._names)
        for place in self._rng.integers(0, count, min(count, _DRAWS)):
            load = self._load(int(place), session.model)
            if load is not None:
                return load
        start = int(self._rng.integers(0, count))
        loads = (self._load((start + i) % count, session.model) for i in range(count))
        return next((load for load in loads if load is not None), None)

    def _load(self, place: int, model: Model) -> Load | None:
        node = self._simulation.nodes[self._names[place]]
        room = self._rooms.room_for(node, model)
        return Load(node, *room) if room else None


class LeastLoaded:
    """The node with the fewest sessions and loads for its devices that has room."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._rooms = Rooms()

    def on_tick(self) -> None:
        """Decides on what is so now."""

    def on_changed(self, node: Node) -> None:
        """Decides on what is so now."""

    def place(self, session: Session) -> Choice:
        replica = open_replica(self._simulation, session.model)
        if replica is not None:
            return Join(replica)
        nodes = sorted(self._simulation.nodes.values(), key=_load_of)
        for node in nodes:
            room = self._rooms.room_for(node, session.model)
            if room:
                return Load(node, *room)
        return None


def _load_of(node: Node) -> tuple[float, str]:
    sessions = sum(len(replica.sessions) for replica in node.replicas.values())
    return sessions / len(node.devices), node.id
