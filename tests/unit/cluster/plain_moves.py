"""The search for moves as it was before floors and detours: simple, slow, and exact if it has time enough.

What is quick now has to find what this finds, on clusters larger than those where everything can be tried.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from sllm_node.cluster.candidate import Kind, PlacementRequest
from sllm_node.cluster.estimate import resume_s
from sllm_node.cluster.floors import Lazy
from sllm_node.cluster.moves import Destination, Move, evictions
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.placement import Reject, decide
from sllm_node.cluster.state import NO_REPLICA, NodeId, ReplicaId, ReplicaState
from sllm_node.cluster.view import ClusterView, Slot
from sllm_node.core.types import ModelId

_ROUNDING: Final = 1 - 1e-12


def plain_best(
    view: ClusterView, request: PlacementRequest, now: float, steps_max: int = 2_000_000
):
    """Return the key of the best way (None: there is none) and whether no better one can have been missed."""
    decision = decide(view, request, now, may_move=False)
    best = None if isinstance(decision, Reject) else decision.best.key
    streams, size = PlainStreams(view, now, steps_max), request.share_bytes
    for load_s, name in view.paths(request.model):
        node = view.nodes[name]
        path_at = node.path_ready_at(view.path(request.model, name).source)
        usable = sorted(d.name for d in node.devices if request.model not in d.models)
        for chosen in combinations(usable, request.shares):
            devices = [node.by_name[device] for device in chosen]
            if all(d.room >= size for d in devices):
                continue
            needs = dict.fromkeys(chosen, size)
            found = plain_cheapest(streams, node, needs, request.priority, math.inf)
            if found is None:
                continue
            queue_s = max(0.0, path_at - now, *(d.ready_at - now for d in devices))
            startup_s = max(queue_s, found[0] + node.state.bandwidths.evict_s) + load_s
            key = (startup_s, Kind.MIGRATE, 0.0, name, chosen, NO_REPLICA)
            best = key if best is None else min(best, key)
    return best, streams.steps_left >= 0


_Load = tuple[float, NodeId, tuple[str, ...]]
"""A load somewhere: seconds with the wait, node, devices."""
_Way = tuple[float, NodeId, tuple[str, ...], ReplicaId]
"""A destination without its evictions, which are looked up when it is the cheapest left."""


class PlainStreams:
    """Destinations of the victims of one decision, each list made no farther than it is read."""

    def __init__(self, view: ClusterView, now: float, steps_max: int) -> None:
        self.view = view
        self.steps_left = steps_max
        """Of branch and bound."""
        self._now = now
        self._of: dict[tuple[NodeId, ReplicaId], Lazy[Destination]] = {}
        self._loads: dict[tuple[ModelId, int, int], Lazy[_Load]] = {}

    def of(self, home: NodeView, victim: ReplicaState) -> Iterator[Destination]:
        """Yield the victim's destinations, cheapest first."""
        key = (home.node, victim.replica)
        if key not in self._of:
            self._of[key] = Lazy(self._destinations(home, victim))
        return iter(self._of[key])

    def least_s(self, home: NodeView, victim: ReplicaState) -> float:
        """Return the cost of the victim's cheapest destination; infinite: it has none."""
        return next((to.cost_s for to in self.of(home, victim)), math.inf)

    def _tokens(self, home: NodeView, victim: ReplicaState) -> float:
        age_s = max(0.0, self._now - home.seen_at)
        return sum(session.tokens(age_s) for session in victim.sessions)

    def _destinations(self, home: NodeView, victim: ReplicaState) -> Iterator[Destination]:
        tokens = self._tokens(home, victim)
        heap = list(self._joins(home, victim, tokens))
        heapq.heapify(heap)
        for load_s, node, devices in self._loads_of(victim):
            while heap and heap[0][0] < load_s:
                yield self._destination(victim, heapq.heappop(heap))
            cost_s = load_s + self._resume_s(victim, tokens, node)
            heapq.heappush(heap, (cost_s, node, devices, NO_REPLICA))
        while heap:
            yield self._destination(victim, heapq.heappop(heap))

    def _destination(self, victim: ReplicaState, way: _Way) -> Destination:
        cost_s, node, devices, joins = way
        if joins != NO_REPLICA:
            return Destination(cost_s, node, devices, joins)
        needs = dict.fromkeys(devices, max(share.size for share in victim.shares))
        evicts = evictions(self.view.nodes[node], needs)
        return Destination(cost_s, node, devices, evicts=evicts)

    def _resume_s(self, victim: ReplicaState, tokens: float, node: NodeId) -> float:
        """Return the seconds to resume all sessions of a replica, one after another."""
        held = self.view.nodes[node].held.get(victim.model)
        return resume_s(held.resume if held else None, tokens, len(victim.sessions))

    def _joins(self, home: NodeView, victim: ReplicaState, tokens: float) -> Iterator[_Way]:
        for node_id in self.view.resident(victim.model):
            node = self.view.nodes[node_id]
            if node.state.is_draining:
                continue
            for other in node.by_model[victim.model]:
                is_self = node is home and other.replica == victim.replica
                if is_self or other.ready_s > 0 or other.free_slots < len(victim.sessions):
                    continue
                cost_s = self._resume_s(victim, tokens, node_id)
                devices = tuple(sorted({share.device for share in other.shares}))
                yield cost_s, node_id, devices, other.replica

    def _loads_of(self, victim: ReplicaState) -> Lazy[_Load]:
        size, count = max(share.size for share in victim.shares), len(victim.shares)
        key = (victim.model, size, count)
        if key not in self._loads:
            self._loads[key] = Lazy(self._some_loads(*key))
        return self._loads[key]

    def _some_loads(self, model: ModelId, size: int, count: int) -> Iterator[_Load]:
        yield from _loads(self.view, model, size, count, self._now)


def _loads(view: ClusterView, model: ModelId, size: int, count: int, now: float) -> Iterator[_Load]:
    """Yield every load of so many shares, soonest first."""
    heap: list[_Load] = []
    for load_s, node_id in view.paths_with_room(model, size):
        while heap and heap[0][0] < load_s:
            yield heapq.heappop(heap)
        node = view.nodes[node_id]
        if node.room < size:
            continue
        path_at = node.path_ready_at(view.path(model, node_id).source)
        fitting = [d for d in node.devices if d.room >= size and model not in d.models]
        for chosen in combinations(sorted(fitting, key=lambda d: d.name), count):
            wait_s = max(0.0, path_at - now, max(d.ready_at for d in chosen) - now)
            if any(d.free < size for d in chosen):
                wait_s = max(wait_s, node.state.bandwidths.evict_s)
            names = tuple(d.name for d in chosen)
            heapq.heappush(heap, (wait_s + load_s, node_id, names))
    while heap:
        yield heapq.heappop(heap)


@dataclass(frozen=True, slots=True)
class _Victim:
    state: ReplicaState
    weight: int
    """Bytes on the devices that lack some."""
    least_s: float


@dataclass(slots=True)
class _Search:
    """One branch and bound."""

    streams: PlainStreams
    home: NodeView
    victims: Sequence[_Victim]
    limit_s: float
    """Costs above are of no use."""
    best_s: float = math.inf
    best: tuple[Move, ...] | None = None

    def run(self, index: int, left: dict[str, int], taken: frozenset[Slot], cost_s: float,
            moves: tuple[Move, ...]) -> None:  # fmt: skip
        """Decide on the victims from `index` on."""
        self.streams.steps_left -= 1
        if all(size <= 0 for size in left.values()):
            if self._is_useful(cost_s):
                self.best_s, self.best = cost_s, moves
            return
        if self.streams.steps_left < 0 or not self._is_useful(cost_s + self._bound(index, left)):
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


def plain_cheapest(
    streams: PlainStreams, home: NodeView, needs: Mapping[str, int], priority: int, limit_s: float
) -> tuple[float, tuple[Move, ...]] | None:
    """Return the cheapest moves for so many bytes on each device, idle replicas evicted, and their seconds.

    None: there are none for at most `limit_s`. Sessions of a higher priority than `priority` stay, and those
    that say so.
    """
    left = {name: size - home.by_name[name].room for name, size in needs.items()}
    left = {name: size for name, size in left.items() if size > 0}
    victims = {
        replica.replica: replica
        for name in left
        for replica in home.by_name[name].busy
        if all(s.priority <= priority and not s.stays for s in replica.sessions)
    }
    exact = _ordered(victims.values(), left, lambda replica: streams.least_s(home, replica))
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
