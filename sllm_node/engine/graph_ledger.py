"""Which steps of a device are captured as graphs, and which graphs are let go. Pure.

A kind of step is computed plainly when it comes for the first time, which compiles kernels and sizes
libraries' memory, and captured when it comes again. Above the bound, what was used longest ago is let
go; while others would have to go for it, it has to come twice as often as before to be captured again (up to
a bound), so that more kinds of steps than there is room for don't capture each other away. What could
not be captured is not tried again.
"""

from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum, auto
from typing import Final, NamedTuple

_USES: Final = 2
"""The use at which a kind of step is captured first, or again where there is room."""
_USES_MOST: Final = 256
"""The use at which it is captured at the latest: a capture costs little beside so many plain steps."""


class Key(NamedTuple):
    """A kind of step."""

    owner: object
    """Whose: compared by identity."""
    kind: Hashable


class Turn(Enum):
    """What to do about a step."""

    PLAIN = auto()
    CAPTURE = auto()
    REPLAY = auto()


class GraphLedger:
    """Counts uses and graphs of one device."""

    def __init__(self, most: int) -> None:
        """`most`: graphs that are held."""
        self._most = most
        self._held: OrderedDict[Key, int] = OrderedDict()
        """Graphs of each, used longest ago first."""
        self._uses: dict[Key, int] = {}
        """Of those without graphs, since they have none."""
        self._needed: dict[Key, int] = {}
        """Uses at which those are captured, at the cost of others, that had graphs before."""
        self._failed: set[Key] = set()

    @property
    def graphs(self) -> int:
        """How many graphs are held."""
        return sum(self._held.values())

    def graphs_of(self, owner: object) -> int:
        """Return how many of them are `owner`'s."""
        return sum(count for key, count in self._held.items() if key.owner is owner)

    def turn(self, key: Key, count: int) -> Turn:
        """Note that a step of `count` graphs comes; say what to do."""
        if key in self._held:
            self._held.move_to_end(key)
            return Turn.REPLAY
        if key in self._failed or count > self._most:
            return Turn.PLAIN
        self._uses[key] = uses = self._uses.get(key, 0) + 1
        has_room = self.graphs + count <= self._most
        needed = _USES if has_room else self._needed.get(key, _USES)
        return Turn.CAPTURE if uses >= needed else Turn.PLAIN

    def captured(self, key: Key, count: int) -> list[Key]:
        """Note that it is captured, or has begun to be; return whose graphs are to be let go for it."""
        self._held[key] = count
        del self._uses[key]
        victims = []
        over = self.graphs - self._most
        while over > 0:
            victim, freed = self._held.popitem(last=False)
            self._needed[victim] = min(2 * self._needed.get(victim, _USES), _USES_MOST)
            victims.append(victim)
            over -= freed
        return victims

    def failed(self, key: Key) -> None:
        """Note that it can't be captured."""
        self._failed.add(key)
        self._uses.pop(key, None)
        self._held.pop(key, None)

    def forget(self, owner: object) -> list[Key]:
        """Note that an owner is gone; return which of its steps had graphs."""
        gone = [key for key in self._held if key.owner is owner]
        for kept in (self._held, self._uses, self._needed):
            for key in [key for key in kept if key.owner is owner]:
                del kept[key]
        self._failed = {key for key in self._failed if key.owner is not owner}
        return gone
