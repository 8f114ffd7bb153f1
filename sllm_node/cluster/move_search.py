"""Which replicas to move off some devices so that a model fits there: exactly the cheapest set.

The paper solves a 0/1 knapsack; conflicts of destinations don't fit in one, so this is branch and bound
twice. First over sets of victims, in order of cost by byte, each at its cheapest destination, against what
every device takes at least by itself. Then, for a set that frees enough and might be the cheapest,
over destinations that don't conflict. Where few devices have room, all want the same ones: what so many
different ones cost beyond the cheapest (`_detour_s`) refutes most sets before their destinations are tried.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from sllm_node.cluster.floors import ROUNDING, Lazy
from sllm_node.cluster.moves import Move, Streams, Way
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.state import ReplicaId, ReplicaState
from sllm_node.cluster.view import Slot

COVERS_MAX: Final = 4096
"""Sums of victims that a search keeps; beyond them it takes the rest for free, which is slower, not wrong."""


@dataclass(frozen=True, slots=True)
class _Victim:
    state: ReplicaState
    weight: int
    """Bytes on the devices that lack some."""
    least_s: float
    touches: int
    """How many of those devices it is on."""


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
    best_s: float = math.inf
    best: tuple[tuple[_Victim, Way], ...] | None = None
    _detours: list[float] | None = None
    _covers: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict)
    _usable: dict[ReplicaId, Lazy[Way]] = field(default_factory=dict)

    def run(
        self, index: int, left: Mapping[str, int], cost_s: float, chosen: tuple[_Victim, ...]
    ) -> None:
        """Decide on the victims from `index` on."""
        self.streams.steps_left -= 1
        if all(size <= 0 for size in left.values()):
            self._settle(chosen)
            return
        if self.streams.steps_left < 0 or not self._is_promising(
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
        count = 0.0
        for name, size in left.items():
            least_s, fewest = self._cover(name, index, size)
            cost_s += least_s
            count += fewest
        if cost_s == math.inf:
            return cost_s
        return cost_s + self._detour_s(len(chosen) + math.ceil(count * ROUNDING))

    def _cover(self, name: str, index: int, need: int) -> tuple[float, float]:
        """Return what freeing a device takes at least: seconds and victims, of those from `index` on.

        Of one that is on several of the devices each takes its part, so that devices may be added.
        """
        if need <= 0:
            return 0.0, 0.0
        key = (name, index, need)
        found = self._covers.get(key)
        if found is None:
            if len(self._covers) >= COVERS_MAX:
                return 0.0, 0.0
            found = math.inf, math.inf
            if index < len(self.victims):
                victim = self.victims[index]
                found = self._cover(name, index + 1, need)
                size = victim.state.size_on(name)
                if size:
                    more_s, more = self._cover(name, index + 1, need - size)
                    found = (
                        min(found[0], more_s + victim.least_s / victim.touches),
                        min(found[1], more + 1 / victim.touches),
                    )
            self._covers[key] = found
        return found

    def _settle(self, chosen: tuple[_Victim, ...]) -> None:
        """Find the cheapest destinations for this set of victims, if they can be the cheapest of all."""
        least_s = [0.0]
        for victim in reversed(chosen):
            least_s.append(victim.least_s + least_s[-1])
        if not self._is_promising(least_s[-1] + self._detour_s(len(chosen))):
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
            if not self._is_promising(after_s + least_s[index + 1]):
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

    def _is_promising(self, bound_s: float) -> bool:
        """Tell whether something of at least this cost may be useful; what is just as good is not."""
        return bound_s < self.best_s and bound_s * ROUNDING <= self.limit_s

    def _is_useful(self, cost_s: float) -> bool:
        return cost_s < self.best_s and cost_s <= self.limit_s


def cheapest_moves(
    streams: Streams, home: NodeView, needs: Mapping[str, int], priority: int, limit_s: float
) -> tuple[float, tuple[Move, ...]] | None:
    """Return the cheapest moves for so many bytes on each device, idle replicas evicted, and their seconds.

    None: there are none for at most `limit_s`. Sessions of a higher priority than `priority` stay,
    and those that say so.
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
    search = _Search(streams, home, exact, frozenset(needs), limit_s)
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
    victims = [_victim(r, left, least_s(r)) for r in replicas]
    movable = [victim for victim in victims if victim.least_s < math.inf]
    return sorted(movable, key=lambda v: (v.least_s / v.weight, v.state.replica))


def _victim(replica: ReplicaState, left: Mapping[str, int], least_s: float) -> _Victim:
    sizes = [size for name in left if (size := replica.size_on(name))]
    return _Victim(replica, sum(sizes), least_s, len(sizes))
