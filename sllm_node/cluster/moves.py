"""Which replicas to move off some devices so that a model fits there: exactly the cheapest set.

The sessions of a replica move together, to a replica of the model elsewhere that has places for all of
them, or to devices where the model is loaded first. Moving one costs the wait and the load at the
destination and the resume time of each session; moves are reckoned one after another, so costs add
up. A device is promised once in a decision: no two destinations share one, and none is among the
devices to be freed. Victims may be larger than what is short.

The paper solves a 0/1 knapsack; conflicts of destinations don't fit in one, so this is branch and
bound: victims in order of cost by byte, each with its destinations cheapest first, against the
fractional knapsack without conflicts as the lower bound.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from sllm_node.cluster.state import NO_REPLICA, NodeId, ReplicaId, ReplicaState
from sllm_node.cluster.view import ClusterView, NodeView, Slot
from sllm_node.core.types import SessionId

_ROUNDING: Final = 1 - 1e-12
"""Takes from a bound what rounding may have added."""
_STEPS_MAX: Final = 20_000
"""Of one search; then the best found so far counts. Devices with a dozen replicas need hundreds."""


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


def destinations(
    view: ClusterView, home: NodeView, victim: ReplicaState, now: float
) -> Iterator[Destination]:
    """Yield every destination of a replica's sessions, cheapest first, looking no farther than asked."""
    heap = list(_joins(view, home, victim, now))
    heapq.heapify(heap)
    size = max(share.size for share in victim.shares)
    for load_s, node_id in view.paths_with_room(victim.model, size):
        while heap and heap[0].cost_s < load_s:
            yield heapq.heappop(heap)
        for found in _loads(view.nodes[node_id], home, victim, load_s, now):
            heapq.heappush(heap, found)
    while heap:
        yield heapq.heappop(heap)


def _joins(
    view: ClusterView, home: NodeView, victim: ReplicaState, now: float
) -> Iterator[Destination]:
    for node_id in view.resident(victim.model):
        node = view.nodes[node_id]
        if node.state.is_draining:
            continue
        for other in node.by_model[victim.model]:
            is_self = node is home and other.replica == victim.replica
            if is_self or other.ready_s > 0 or other.free_slots < len(victim.sessions):
                continue
            cost_s = home.sessions_resume_s(victim, node, now)
            devices = tuple(sorted({share.device for share in other.shares}))
            yield Destination(cost_s, node_id, devices, other.replica)


def _loads(
    node: NodeView, home: NodeView, victim: ReplicaState, load_s: float, now: float
) -> Iterator[Destination]:
    size = max(share.size for share in victim.shares)
    if node.room < size:
        return
    fitting = [d for d in node.devices if d.room >= size and victim.model not in d.models]
    if len(fitting) < len(victim.shares):
        return
    resume = home.sessions_resume_s(victim, node, now)
    for chosen in combinations(sorted(fitting, key=lambda d: d.name), len(victim.shares)):
        wait_s = max(0.0, max(d.ready_at for d in chosen) - now)
        names = tuple(d.name for d in chosen)
        evicts = evictions(node, dict.fromkeys(names, size))
        yield Destination(wait_s + load_s + resume, node.node, names, evicts=evicts)


class Streams:
    """Destinations of the victims of one decision, kept as far as they were looked at."""

    def __init__(self, view: ClusterView, now: float) -> None:
        self.view = view
        self._now = now
        self._open: dict[tuple[NodeId, ReplicaId], tuple[list[Destination], Iterator[Destination]]]
        self._open = {}

    def least_s(self, home: NodeView, victim: ReplicaState) -> float:
        """Return the cost of the victim's cheapest destination; infinite: it has none."""
        return next((to.cost_s for to in self.of(home, victim)), math.inf)

    def of(self, home: NodeView, victim: ReplicaState) -> Iterator[Destination]:
        """Yield the victim's destinations, cheapest first."""
        key = (home.node, victim.replica)
        if key not in self._open:
            self._open[key] = ([], destinations(self.view, home, victim, self._now))
        seen, rest = self._open[key]
        position = 0
        while True:
            if position == len(seen):
                found = next(rest, None)
                if found is None:
                    return
                seen.append(found)
            yield seen[position]
            position += 1


@dataclass(frozen=True, slots=True)
class _Victim:
    state: ReplicaState
    weight: int
    """Bytes on the devices that lack some."""
    least_s: float


@dataclass(slots=True)
class _Search:
    """One branch and bound."""

    streams: Streams
    home: NodeView
    victims: Sequence[_Victim]
    limit_s: float
    """Costs above are of no use."""
    best_s: float = math.inf
    best: tuple[Move, ...] | None = None
    steps: int = field(default=0)

    def run(self, index: int, left: dict[str, int], taken: frozenset[Slot], cost_s: float,
            moves: tuple[Move, ...]) -> None:  # fmt: skip
        """Decide on the victims from `index` on."""
        self.steps += 1
        if all(size <= 0 for size in left.values()):
            if self._is_useful(cost_s):
                self.best_s, self.best = cost_s, moves
            return
        if self.steps > _STEPS_MAX or not self._is_useful(cost_s + self._bound(index, left)):
            return
        victim = self.victims[index].state
        rest = {name: size - victim.size_on(name) for name, size in left.items()}
        after = self._bound(index + 1, rest)
        for to in self.streams.of(self.home, victim):
            if not self._is_useful(cost_s + to.cost_s + after):
                break
            if not (to.slots & taken):
                sessions = tuple(session.session for session in victim.sessions)
                move = Move(victim.replica, sessions, to)
                self.run(index + 1, rest, taken | to.slots, cost_s + to.cost_s, (*moves, move))
        self.run(index + 1, left, taken, cost_s, moves)

    def _is_useful(self, cost_s: float) -> bool:
        return cost_s < self.best_s and cost_s <= self.limit_s

    def _bound(self, index: int, left: Mapping[str, int]) -> float:
        return _least_s(self.victims[index:], left)


def _least_s(victims: Sequence[_Victim], left: Mapping[str, int]) -> float:
    """Return what freeing the rest costs at least: parts of victims, the cheapest by byte first."""
    need = sum(size for size in left.values() if size > 0)
    cost_s = 0.0
    for victim in victims:
        if need <= 0:
            break
        cost_s += victim.least_s * min(1.0, need / victim.weight)
        need -= victim.weight
    return cost_s * _ROUNDING if need <= 0 else math.inf


def cheapest_moves(
    streams: Streams, home: NodeView, needs: Mapping[str, int], priority: int, limit_s: float
) -> tuple[float, tuple[Move, ...]] | None:
    """Return the cheapest moves for so many bytes on each device, idle replicas evicted, and their seconds.

    None: there are none for at most `limit_s`. Sessions of a higher priority than `priority` stay.
    """
    left = {name: size - home.by_name[name].room for name, size in needs.items()}
    left = {name: size for name, size in left.items() if size > 0}
    victims = {
        replica.replica: replica
        for name in left
        for replica in home.by_name[name].busy
        if all(session.priority <= priority for session in replica.sessions)
    }
    rough = _ordered(victims.values(), left, streams.view.least_move_s)
    if _least_s(rough, left) > limit_s:
        return None
    exact = _ordered((v.state for v in rough), left, lambda replica: streams.least_s(home, replica))
    search = _Search(streams, home, exact, limit_s)
    search.run(0, left, frozenset((home.node, name) for name in needs), 0.0, ())
    return None if search.best is None else (search.best_s, search.best)


def _ordered(
    replicas: Iterable[ReplicaState], left: Mapping[str, int], least_s: Callable[[ReplicaState], float]
) -> list[_Victim]:  # fmt: skip
    """Return those that can move at all, the cheapest by byte first."""
    victims = [_Victim(r, sum(map(r.size_on, left)), least_s(r)) for r in replicas]
    movable = [victim for victim in victims if victim.least_s < math.inf]
    return sorted(movable, key=lambda v: (v.least_s / v.weight, v.state.replica))
