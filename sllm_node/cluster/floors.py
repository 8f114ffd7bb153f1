"""What moves cost at least, kept from one news of the cluster to the next: so that few are searched for.

A decision that needs moves has hundreds of devices to choose from, and nearly all are out of the question
at once: even if each victim had the destination that suits it best, without waiting, the moves would
take longer than the best way known. That floor does not depend on the moment (waits only shorten, and
sessions only grow) nor on what is asked for beyond its size, so it is made once for many decisions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from sllm_node.cluster.estimate import resume_s
from sllm_node.cluster.node_view import DeviceView, NodeView
from sllm_node.cluster.state import NodeId, ReplicaId, ReplicaState, ResumeFit
from sllm_node.core.types import ModelId

if TYPE_CHECKING:
    from sllm_node.cluster.view import ClusterView

ROUNDING: Final = 1 - 1e-12
"""Takes from a bound what rounding may have added."""
_WHOLE_MAX: Final = 10
"""Replicas on one device; of more, parts are taken."""
_T = TypeVar("_T")


class Lazy(Generic[_T]):
    """An iterator that many read from its start, kept as far as it was read."""

    __slots__ = ("_rest", "_seen")

    def __init__(self, rest: Iterator[_T]) -> None:
        self._seen: list[_T] = []
        self._rest = rest

    def __iter__(self) -> Iterator[_T]:
        position = 0
        while True:
            if position == len(self._seen):
                found = next(self._rest, None)
                if found is None:
                    return
                self._seen.append(found)
            yield self._seen[position]
            position += 1


@dataclass(frozen=True, slots=True)
class Place:
    """A node that could load a model now."""

    load_s: float
    node: NodeView
    fit: ResumeFit | None
    devices: tuple[DeviceView, ...]
    """That have room, by name."""


class Floors:
    """Of one view; `clear` it with every news."""

    def __init__(self, view: "ClusterView") -> None:
        self._view = view
        self._places: dict[tuple[ModelId, int, int], Lazy[Place]] = {}
        self._least: dict[tuple[NodeId, ReplicaId], float] = {}
        self._parts: dict[NodeId, dict[str, list[tuple[int, float, int]]]] = {}
        self._devices: dict[tuple[NodeId, int, bool], dict[str, float]] = {}
        self._nodes: dict[tuple[int, int], dict[NodeId, float]] = {}

    def clear(self) -> None:
        """Forget all: something has changed."""
        for kept in (self._places, self._least, self._parts, self._devices, self._nodes):
            kept.clear()

    def places(self, model: ModelId, size: int, count: int) -> Lazy[Place]:
        """Return where so many shares could be loaded, quickest nodes first, waits not counted."""
        key = (model, size, count)
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = Lazy(self._find_places(*key))
        return found

    def _find_places(self, model: ModelId, size: int, count: int) -> Iterator[Place]:
        for load_s, node_id in self._view.paths_with_room(model, size):
            node = self._view.nodes[node_id]
            if node.room < size:
                continue
            fitting = [d for d in node.devices if d.room >= size and model not in d.models]
            if len(fitting) >= count:
                held = node.held.get(model)
                devices = tuple(sorted(fitting, key=attrgetter("name")))
                yield Place(load_s, node, held.resume if held else None, devices)

    def least_s(self, home: NodeId, victim: ReplicaState) -> float:
        """Return a time that moving its sessions takes at least, now or later; infinite: no place."""
        key = (home, victim.replica)
        found = self._least.get(key)
        if found is None:
            found = self._least[key] = ROUNDING * self._find_least(home, victim)
        return found

    def _find_least(self, home: NodeId, victim: ReplicaState) -> float:
        tokens = sum(session.tokens(0.0) for session in victim.sessions)
        count, least_s = len(victim.sessions), math.inf
        for node, _ in self.joins(home, victim):
            held = node.held.get(victim.model)
            least_s = min(least_s, resume_s(held.resume if held else None, tokens, count))
        size = max(share.size for share in victim.shares)
        quickest_s = resume_s(self._view.least_resume(victim.model), tokens, count)
        for place in self.places(victim.model, size, len(victim.shares)):
            if place.load_s + quickest_s >= least_s:
                break
            least_s = min(least_s, place.load_s + resume_s(place.fit, tokens, count))
        return least_s

    def joins(self, home: NodeId, victim: ReplicaState) -> Iterator[tuple[NodeView, ReplicaState]]:
        """Yield the replicas of its model that have places for all its sessions, with their nodes."""
        count = len(victim.sessions)
        if self._view.most_free_slots(victim.model) < count:
            return
        for node_id in self._view.resident(victim.model):
            node = self._view.nodes[node_id]
            if node.state.is_draining:
                continue
            for other in node.by_model[victim.model]:
                is_self = node_id == home and other.replica == victim.replica
                if not is_self and other.ready_s <= 0 and other.free_slots >= count:
                    yield node, other

    def on_devices(self, node: NodeView, size: int, *, is_split: bool) -> dict[str, float]:
        """Return for each device what freeing so many bytes costs at least; infinite: it can't be.

        With `is_split` a replica of several devices costs each of them its part, so that floors of
        devices may be added.
        """
        key = (node.node, size, is_split)
        found = self._devices.get(key)
        if found is None:
            parts = self._parts_of(node)
            found = self._devices[key] = {
                device.name: _least_cover(parts[device.name], size - device.room, is_split=is_split)
                for device in node.devices
            }
        return found

    def on_nodes(self, size: int, shares: int) -> dict[NodeId, float]:
        """Return what `on_node` has found for such a request."""
        return self._nodes.setdefault((size, shares), {})

    def on_node(self, node: NodeView, size: int, shares: int) -> float:
        """Return what freeing so many bytes on so many of its devices costs at least."""
        floors = self.on_devices(node, size, is_split=shares > 1)
        able = [floors[d.name] for d in node.devices if shares > 1 or d.room < size]
        least = sorted(floor for floor in able if floor < math.inf)[:shares]
        found = sum(least) * ROUNDING if len(least) == shares else math.inf
        self.on_nodes(size, shares)[node.node] = found
        return found

    def _may_have_place(self, victim: ReplicaState) -> bool:
        """Tell, without looking far, whether its sessions might go anywhere."""
        if self._view.most_room >= victim.shares[0].size:
            return True
        return self._view.most_free_slots(victim.model) >= len(victim.sessions)

    def _parts_of(self, node: NodeView) -> dict[str, list[tuple[int, float, int]]]:
        """Return bytes, floor and number of shares of what could leave each device."""
        found = self._parts.get(node.node)
        if found is None:
            found = self._parts[node.node] = {
                device.name: [
                    (replica.size_on(device.name), least_s, len(replica.shares))
                    for replica in device.busy
                    if self._may_have_place(replica)
                    and (least_s := self.least_s(node.node, replica)) < math.inf
                ]
                for device in node.devices
            }
        return found


def _least_cover(parts: list[tuple[int, float, int]], need: int, *, is_split: bool) -> float:
    """Return the least cost of parts that make up so many bytes together."""
    if need <= 0:
        return 0.0
    if sum(size for size, _, _ in parts) < need:
        return math.inf
    costs = [(size, cost / shares if is_split else cost) for size, cost, shares in parts]
    if len(costs) > _WHOLE_MAX:
        return _least_fraction(costs, need)
    sums, best = [(0, 0.0)], math.inf
    for size, cost in costs:
        more = [(freed + size, spent + cost) for freed, spent in sums]
        best = min([best, *(spent for freed, spent in more if freed >= need)])
        sums += [(freed, spent) for freed, spent in more if freed < need]
    return best * ROUNDING


def _least_fraction(costs: list[tuple[int, float]], need: int) -> float:
    least_s = 0.0
    for size, cost in sorted(costs, key=lambda part: part[1] / part[0]):
        if need <= 0:
            break
        least_s += cost * min(1.0, need / size)
        need -= size
    return least_s * ROUNDING
