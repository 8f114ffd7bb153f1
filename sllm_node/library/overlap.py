"""Whether strided tensors share memory: told for certain where it is cheap, as for slices of one.

Addresses that differ modulo some number differ. Modulo the step from one row of a matrix to the next,
a slice of its columns is one run of bytes, whatever its rows: two slices have no byte in common if
these runs, on a circle of that length, have none. Each step of the tensors is tried as the length of
the circle. What no step tells apart may still be apart, in ways that nobody cuts tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import inf


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the elements of a tensor that is not empty lie, in bytes."""

    name: str
    device: str
    start: int
    item: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    """Of each dimension, none below 0."""

    @property
    def end(self) -> int:
        """The byte behind the last element."""
        return self.start + self.length()

    @property
    def is_solid(self) -> bool:
        """Whether the tensor has every byte between its first and its last."""
        count = self.item
        for size, step in zip(self.sizes, self.steps, strict=True):
            count *= size if step else 1
        return count == self.length()

    def length(self, circle: float = inf) -> int:
        """Return how long the run is that covers all elements on a circle of so many bytes."""
        dimensions = zip(self.sizes, self.steps, strict=True)
        return self.item + sum((n - 1) * step for n, step in dimensions if step % circle)


def overlapping(extents: Sequence[Extent]) -> tuple[Extent, Extent] | None:
    """Return two of `extents` that share memory or can't be told apart; None: all are apart."""
    for group in _touching(extents):
        if not _are_apart(group):
            for pair in combinations(group, 2):
                if pair[1].start < pair[0].end and not _are_apart(pair):
                    return pair
    return None


def _touching(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Yield those whose extents overlap, directly or by way of others; those alone are left out."""
    group: list[Extent] = []
    end = 0
    for one in sorted(extents, key=lambda one: (one.device, one.start, one.end)):
        if group and (one.device != group[0].device or one.start >= end):
            if len(group) > 1:
                yield group
            group = []
        end = max(end, one.end) if group else one.end
        group.append(one)
    if len(group) > 1:
        yield group


def _are_apart(extents: Sequence[Extent]) -> bool:
    """Tell whether some step shows that no two of `extents` have a byte in common."""
    circles = {
        step
        for one in extents
        for size, step in zip(one.sizes, one.steps, strict=True)
        if size > 1 and step
    }
    return any(_are_apart_on(circle, extents) for circle in circles)


def _are_apart_on(circle: int, extents: Sequence[Extent]) -> bool:
    runs = sorted((one.start % circle, one.length(circle)) for one in extents)
    runs.append((runs[0][0] + circle, 0))  # the first once more, behind the last
    return all(start + length <= after for (start, length), (after, _) in pairwise(runs))
