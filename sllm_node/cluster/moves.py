"""Moves, and where they could go: the destinations of a replica's sessions, cheapest first.

The sessions of a replica move together, to a replica of the model elsewhere that has places for all of
them, or to devices where the model is loaded first. Moving one costs the wait and the load at the
destination and the resume time of each session; moves are reckoned one after another, so costs add
up. A device is promised once in a decision: no two destinations share one, and none is among the
devices to be freed. Victims may be larger than what is short.
Which replicas to move is found in `cluster.move_search`.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Final, NamedTuple

from sllm_node.cluster.estimate import resume_s
from sllm_node.cluster.floors import Lazy
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.state import NO_REPLICA, NodeId, ReplicaId, ReplicaState
from sllm_node.cluster.view import ClusterView, Slot
from sllm_node.core.types import SessionId

STEPS_MAX: Final = 20_000
"""Of all searches of one decision; then the best found so far counts. The hardest measured need 2,000."""
LOADS_MAX: Final = 512
"""Of one model that are looked at as destinations, on the nodes that load it quickest."""


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """Where the sessions of a replica could go; ordered by cost, then by name."""

    cost_s: float
    """From the decision until all of them decode there, if it is the only move."""
    node: NodeId
    devices: tuple[str, ...]
    joins: ReplicaId = NO_REPLICA
    """The replica that takes them; none: one is loaded."""
    evicts: tuple[ReplicaId, ...] = ()

    @property
    def slots(self) -> frozenset[Slot]:
        """Return what it promises."""
        return frozenset((self.node, device) for device in self.devices)


@dataclass(frozen=True, slots=True)
class Move:
    """One replica's sessions and where they go; the replica is evicted behind them."""

    replica: ReplicaId
    sessions: tuple[SessionId, ...]
    to: Destination


def evictions(
    node: NodeView, needs: Mapping[str, int], *, leaving: Iterable[ReplicaId] = ()
) -> tuple[ReplicaId, ...]:
    """Return idle replicas to evict for so many bytes on each device, longest idle first, no more than needed."""
    gone = set(leaving)
    moved = [r for r in node.state.replicas if r.replica in gone]
    left = {
        name: size - node.by_name[name].free - sum(r.size_on(name) for r in moved)
        for name, size in needs.items()
    }
    if all(size <= 0 for size in left.values()):
        return ()
    idle = {r.replica: r for name in needs for r in node.by_name[name].idle}
    chosen: list[ReplicaState] = []
    for replica in sorted(idle.values(), key=lambda r: (-r.idle_s, r.replica)):
        if any(size > 0 and replica.size_on(name) for name, size in left.items()):
            chosen.append(replica)
            left = {name: size - replica.size_on(name) for name, size in left.items()}
    assert all(size <= 0 for size in left.values()), "no room even without idle replicas"
    for replica in reversed(chosen.copy()):
        if all(size + replica.size_on(name) <= 0 for name, size in left.items()):
            chosen.remove(replica)
            left = {name: size + replica.size_on(name) for name, size in left.items()}
    return tuple(replica.replica for replica in chosen)


class Way(NamedTuple):
    """A destination without its evictions, which are looked up once it is chosen."""

    cost_s: float
    node: NodeId
    devices: tuple[str, ...]
    joins: ReplicaId = NO_REPLICA


@dataclass(frozen=True, slots=True)
class Ways:
    """The destinations of one victim, cheapest first."""

    all: Lazy[Way]
    is_single: bool
    """Each is one device."""


class Streams:
    """Destinations of the victims of one decision, each list made no farther than it is read."""

    def __init__(self, view: ClusterView, now: float, steps_max: int = STEPS_MAX) -> None:
        self.view = view
        self.steps_left = steps_max
        """Of branch and bound."""
        self.is_cut = False
        """Whether destinations were left out (`LOADS_MAX`)."""
        self._now = now
        self._of: dict[tuple[NodeId, ReplicaId], Ways] = {}

    def of(self, home: NodeView, victim: ReplicaState) -> Ways:
        """Return the victim's destinations."""
        key = (home.node, victim.replica)
        found = self._of.get(key)
        if found is None:
            age_s = max(0.0, self._now - home.seen_at)
            tokens = sum(session.tokens(age_s) for session in victim.sessions)
            joins = list(self._joins(home, victim, tokens))
            is_single = len(victim.shares) == 1 and all(len(way.devices) == 1 for way in joins)
            rest = self._ways(victim, tokens, joins)
            found = self._of[key] = Ways(Lazy(rest), is_single)
        return found

    def least_s(self, home: NodeView, victim: ReplicaState) -> float:
        """Return the cost of the victim's cheapest destination; infinite: it has none."""
        return next((way.cost_s for way in self.of(home, victim).all), math.inf)

    def destination(self, victim: ReplicaState, way: Way) -> Destination:
        """Return a destination with what is to be evicted there."""
        if way.joins != NO_REPLICA:
            return Destination(*way)
        needs = dict.fromkeys(way.devices, max(share.size for share in victim.shares))
        evicts = evictions(self.view.nodes[way.node], needs)
        return Destination(*way, evicts=evicts)

    def _joins(self, home: NodeView, victim: ReplicaState, tokens: float) -> Iterator[Way]:
        for node, other in self.view.floors.joins(home.node, victim):
            held = node.held.get(victim.model)
            cost_s = resume_s(held.resume if held else None, tokens, len(victim.sessions))
            devices = tuple(sorted({share.device for share in other.shares}))
            yield Way(cost_s, node.node, devices, other.replica)

    def _ways(self, victim: ReplicaState, tokens: float, heap: list[Way]) -> Iterator[Way]:
        heapq.heapify(heap)
        size, shares, now = (
            max(share.size for share in victim.shares),
            len(victim.shares),
            self._now,
        )
        loads = 0
        for place in self.view.floors.places(victim.model, size, shares):
            while heap and heap[0].cost_s < place.load_s:
                yield heapq.heappop(heap)
            load_resume_s = resume_s(place.fit, tokens, len(victim.sessions))
            name = place.node.node
            path_at = place.node.path_ready_at(self.view.path(victim.model, name).source)
            evict_s = place.node.state.bandwidths.evict_s
            for chosen in combinations(place.devices, shares):
                wait_s = max(0.0, path_at - now, max(d.ready_at for d in chosen) - now)
                if any(d.free < size for d in chosen):
                    wait_s = max(wait_s, evict_s)
                devices = tuple(d.name for d in chosen)
                cost_s = wait_s + place.load_s + load_resume_s
                heapq.heappush(heap, Way(cost_s, name, devices))
                loads += 1
            if loads >= LOADS_MAX:
                self.is_cut = True
                break
        while heap:
            yield heapq.heappop(heap)
