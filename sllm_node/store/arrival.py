"""How far the bytes of a load have come: told by the loop, waited for by threads that use them.

Bytes are delivered in units, mostly in rising order; what relays, siblings or parked units bring
out of order counts when everything before it is there. So one number a part says all: its *front*,
the first byte that is missing. What the device kept from an earlier replica is there from the start.

A thread that waits is woken once: when its bytes are there, when the load has failed, or when the
lease that it waits through is given back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from threading import Event, Lock

from sllm_node.core.errors import LoadFailedError, SllmError
from sllm_node.core.types import ModelId, Part


class Front:
    """The first byte of a part that is missing."""

    def __init__(self, part: Part, wants: Sequence[tuple[int, int]]) -> None:
        self._ahead = list(_gaps(part, wants))
        """Bytes [start, end) that are there, behind some that are not."""
        heapify(self._ahead)
        self.byte = part.start
        self._advance()

    def delivered(self, start: int, end: int) -> bool:
        """Take note that bytes [start, end) are there; tell whether the front has moved."""
        heappush(self._ahead, (start, end))
        before = self.byte
        self._advance()
        return self.byte > before

    def _advance(self) -> None:
        while self._ahead and self._ahead[0][0] <= self.byte:
            self.byte = max(self.byte, heappop(self._ahead)[1])


def _gaps(part: Part, wants: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the bytes of `part` that a load does not bring, because they are there."""
    ends = [part.start, *(end for _, end in wants)]
    starts = [*(start for start, _ in wants), part.end]
    return [(low, high) for low, high in zip(ends, starts, strict=True) if low < high]


@dataclass(eq=False, slots=True)
class _Waiter:
    ends: tuple[int, ...]
    woken: Event = field(default_factory=Event)


class Deliveries:
    """What one load has delivered. Its methods may be called from any thread."""

    def __init__(
        self, model: ModelId, wanted: Sequence[tuple[Part, Sequence[tuple[int, int]]]]
    ) -> None:
        self._model = model
        self._lock = Lock()
        self._fronts = [Front(part, wants) for part, wants in wanted]
        self._waiters: list[_Waiter] = []
        self._error: SllmError | None = None

    def delivered(self, part: int, start: int, end: int) -> None:
        """Take note that bytes [start, end) of the checkpoint lie in their place on `part`."""
        with self._lock:
            if self._fronts[part].delivered(start, end):
                for waiter in self._waiters:
                    if self._has(waiter.ends):
                        waiter.woken.set()

    def fail(self, error: SllmError) -> None:
        """Take note that the load has failed: nobody may use any of it any more."""
        with self._lock:
            self._error = error
            for waiter in self._waiters:
                waiter.woken.set()

    def arrival(self) -> "Arrival":
        """Return what one holder waits through."""
        return Arrival(self)

    def has(self, ends: Sequence[int]) -> bool:
        """Tell whether each part has all its bytes before its one of `ends`."""
        with self._lock:
            return self._error is None and self._has(ends)

    def _has(self, ends: Sequence[int]) -> bool:
        return all(front.byte >= end for front, end in zip(self._fronts, ends, strict=True))

    def wait(self, arrival: "Arrival", ends: Sequence[int]) -> None:
        """Wait for `Arrival.wait`."""
        waiter = _Waiter(tuple(ends))
        with self._lock:
            if self._error is None and not arrival.is_stopped and not self._has(ends):
                self._waiters.append(waiter)
                arrival.waiters.append(waiter)
            else:
                waiter.woken.set()
        waiter.woken.wait()
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                arrival.waiters.remove(waiter)
            if self._error is not None:
                raise self._error
            if arrival.is_stopped:
                raise LoadFailedError(self._model, "its lease was given back before its end")

    def stop(self, arrival: "Arrival") -> None:
        """Wake those who wait through `arrival`."""
        with self._lock:
            arrival.is_stopped = True
            for waiter in arrival.waiters:
                waiter.woken.set()


class Arrival:
    """The bytes behind a lease that was given before they were there."""

    def __init__(self, deliveries: Deliveries) -> None:
        self.is_stopped = False
        self.waiters: list[_Waiter] = []
        """Threads that wait through this one; under the lock of the deliveries, as the flag is."""
        self._deliveries = deliveries

    def has(self, ends: Sequence[int]) -> bool:
        """Tell whether each part of the lease has all its bytes before its one of `ends`."""
        return self._deliveries.has(ends)

    def wait(self, ends: Sequence[int]) -> None:
        """Wait until each part of the lease has all its bytes before its one of `ends`.

        Bytes count from the beginning of the checkpoint. Blocks the thread.

        Raises:
            SllmError: the load has failed, with its error; or the lease was given back.
        """
        self._deliveries.wait(self, ends)

    def stop(self) -> None:
        """End every wait, those to come too; from any thread."""
        self._deliveries.stop(self)
