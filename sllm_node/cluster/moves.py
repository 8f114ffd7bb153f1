"""Which replicas to move off some devices so that a model fits there: exactly the cheapest set.

The sessions of a replica move together, to a replica of the model elsewhere that has places for all of
them, or to devices where the model is loaded first. Moving one costs the wait and the load at the
destination and the resume time of each session; moves are reckoned one after another, so costs add
up. A device is promised once in a decision: no two destinations share one, and none is among the
devices to be freed. Victims may be larger than what is short.

The paper solves a 0/1 knapsack; conflicts of destinations don't fit in one, so this is branch and bound
twice. First over sets of victims, in order of cost by byte, each at its cheapest destination, against the
fractional knapsack as the lower bound. Then, for a set that frees enough and might be the cheapest, over
destinations that don't conflict. Where few devices have room, all want the same ones: what k different ones
cost beyond the cheapest (`_detours`) refutes most sets before their destinations are tried.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from sllm_node.cluster.estimate import resume_s
from sllm_node.cluster.floors import ROUNDING, Lazy
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
            path_s = max(0.0, place.path_at - now)
            for ready_at, devices in place.devices:
                wait_s = max(path_s, ready_at - now)
                cost_s = wait_s + place.load_s + load_resume_s
                heapq.heappush(heap, Way(cost_s, place.node, devices))
            loads += len(place.devices)
            if loads >= LOADS_MAX:
                self.is_cut = True
                break
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

    streams: Streams
    home: NodeView
    victims: Sequence[_Victim]
    wanted: frozenset[str]
    """Devices of `home` to be freed: no destination."""
    limit_s: float
    """Costs above are of no use."""
    _heaviest: int
    """The most bytes that one victim frees."""
    best_s: float = math.inf
    best: tuple[tuple[_Victim, Way], ...] | None = None
    _detours: list[float] | None = None
    _usable: dict[ReplicaId, Lazy[Way]] = field(default_factory=dict)

    def run(
        self, index: int, left: Mapping[str, int], cost_s: float, chosen: tuple[_Victim, ...]
    ) -> None:
        """Decide on the victims from `index` on."""
        self.streams.steps_left -= 1
        if all(size <= 0 for size in left.values()):
            self._settle(chosen)
            return
        if self.streams.steps_left < 0 or not self._is_useful(
            self._bound(index, left, cost_s, chosen)
        ):
            return
        victim = self.victims[index]
        rest = {name: size - victim.state.size_on(name) for name, size in left.items()}
        if any(rest[name] < size for name, size in left.items() if size > 0):
            self.run(index + 1, rest, cost_s + victim.least_s, (*chosen, victim))
        self.run(index + 1, left, cost_s, chosen)

    def _bound(
        self, index: int, left: Mapping[str, int], cost_s: float, chosen: tuple[_Victim, ...]
    ) -> float:
        """Return what these victims and those that must still be chosen cost at least."""
        need = sum(size for size in left.values() if size > 0)
        count = len(chosen) + math.ceil(need / self._heaviest)
        return (cost_s + self._detour_s(count)) * ROUNDING + _least_s(self.victims, index, need)

    def _settle(self, chosen: tuple[_Victim, ...]) -> None:
        """Find the cheapest destinations for this set of victims, if they can be the cheapest of all."""
        least_s = [0.0]
        for victim in reversed(chosen):
            least_s.append(victim.least_s + least_s[-1])
        if not self._is_useful((least_s[-1] + self._detour_s(len(chosen))) * ROUNDING):
            return
        least_s.reverse()
        self._assign(chosen, least_s, 0, frozenset(), 0.0, ())

    def _assign(
        self, chosen: tuple[_Victim, ...], least_s: Sequence[float], index: int,
        taken: frozenset[Slot], cost_s: float, ways: tuple[Way, ...],
    ) -> None:  # fmt: skip
        self.streams.steps_left -= 1
        if index == len(chosen):
            if self._is_useful(cost_s):
                self.best_s, self.best = cost_s, tuple(zip(chosen, ways, strict=True))
            return
        for way in self._ways(chosen[index]):
            after_s = cost_s + way.cost_s
            if self.streams.steps_left < 0:
                return
            if not self._is_useful((after_s + least_s[index + 1]) * ROUNDING):
                return
            slots = [(way.node, device) for device in way.devices]
            if taken.isdisjoint(slots):
                self._assign(chosen, least_s, index + 1, taken.union(slots), after_s, (*ways, way))

    def _ways(self, victim: _Victim) -> Lazy[Way]:
        """Return the destinations that are not among the devices to be freed."""
        found = self._usable.get(victim.state.replica)
        if found is None:
            every = self.streams.of(self.home, victim.state).all
            here, wanted = self.home.node, self.wanted
            rest = (w for w in every if w.node != here or wanted.isdisjoint(w.devices))
            found = self._usable[victim.state.replica] = Lazy(rest)
        return found

    def _detour_s(self, count: int) -> float:
        """Return what so many victims cost at least beyond the cheapest destination of each.

        Each takes a device of its own, and a device costs whoever takes it no less than some detour: so
        the least detours of so many devices, added up. Where every destination is one device, none
        needs more destinations than there are victims: one of its cheapest is left by the others.
        """
        if self._detours is None:
            self._detours = self._find_detours()
        return self._detours[count] if count < len(self._detours) else math.inf

    def _find_detours(self) -> list[float]:
        count = len(self.victims)
        if not all(self.streams.of(self.home, v.state).is_single for v in self.victims):
            return [0.0] * (count + 1)
        least: dict[Slot, float] = {}
        for victim in self.victims:
            for way in islice(self._ways(victim), count):
                slot, more_s = (way.node, way.devices[0]), way.cost_s - victim.least_s
                if more_s < least.get(slot, math.inf):
                    least[slot] = more_s
        sums = [0.0]
        for more_s in sorted(least.values()):
            sums.append(sums[-1] + more_s)
        return sums

    def _is_useful(self, cost_s: float) -> bool:
        return cost_s < self.best_s and cost_s <= self.limit_s


def _least_s(victims: Sequence[_Victim], index: int, need: int) -> float:
    """Return what freeing so many bytes costs at least: parts of victims, the cheapest by byte first."""
    cost_s = 0.0
    for victim in islice(victims, index, None):
        if need <= 0:
            break
        cost_s += victim.least_s * min(1.0, need / victim.weight)
        need -= victim.weight
    return cost_s * ROUNDING if need <= 0 else math.inf


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
    floors = streams.view.floors
    rough = _ordered(victims.values(), left, lambda replica: floors.least_s(home.node, replica))
    if _least_s(rough, 0, sum(left.values())) > limit_s:
        return None
    exact = _ordered((v.state for v in rough), left, lambda replica: streams.least_s(home, replica))
    heaviest = max((victim.weight for victim in exact), default=1)
    search = _Search(streams, home, exact, frozenset(needs), limit_s, heaviest)
    search.run(0, left, 0.0, ())
    if search.best is None:
        return None
    return search.best_s, tuple(_move(streams, victim, way) for victim, way in search.best)


def _move(streams: Streams, victim: _Victim, way: Way) -> Move:
    sessions = tuple(session.session for session in victim.state.sessions)
    return Move(victim.state.replica, sessions, streams.destination(victim.state, way))


def _ordered(
    replicas: Iterable[ReplicaState], left: Mapping[str, int], least_s: Callable[[ReplicaState], float]
) -> list[_Victim]:  # fmt: skip
    """Return those that can move at all, the cheapest by byte first."""
    victims = [_Victim(r, sum(map(r.size_on, left)), least_s(r)) for r in replicas]
    movable = [victim for victim in victims if victim.least_s < math.inf]
    return sorted(movable, key=lambda v: (v.least_s / v.weight, v.state.replica))
