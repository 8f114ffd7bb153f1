"""Graphs of all replicas of a device: captured when `graph_ledger` says so, replayed from then on.

Steps run on the device's step thread; replicas are closed on others. A step whose capture fails is
computed plainly from then on.

A capture takes the host about a millisecond, and readers wait for the step meanwhile: of a step of many
pieces only some are captured at a time, the rest when it comes again.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Final, Protocol, TypeVar

from sllm_node.engine.graph_ledger import GraphLedger, Key, Turn

log = logging.getLogger(__name__)

T = TypeVar("T")
CAPTURES_A_STEP: Final = 8


class Graphs(Protocol):
    """What captures: `graphs.CudaGraphs`."""

    def capture(self, compute: Callable[[], T]) -> Callable[[], T]:
        """Return a function that does what `compute` does."""


class StepGraphs:
    """Keeps the graphs of one device."""

    def __init__(
        self,
        graphs: Graphs,
        most: int,
        device: str = "",
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """`most`: graphs that are kept; `on_failure` is told of each step that can't be captured."""
        self._graphs = graphs
        self._ledger = GraphLedger(most)
        self._device = device
        self._on_failure = on_failure
        self._replays: dict[Key, Sequence[Callable[[], Any]]] = {}
        self._lock = Lock()

    def count(self, owner: object) -> int:
        """Return how many graphs of `owner` are kept."""
        with self._lock:
            return self._ledger.graphs_of(owner)

    def of(
        self, owner: object, kind: Hashable, pieces: Sequence[Callable[[], T]]
    ) -> Sequence[Callable[[], T]]:
        """Return what to call, one after the other, for a step of `pieces`: these, or replays of the first.

        What a replay returns is the same memory every time. The owner keeps `pieces`, and all that they
        refer to, until it is dropped.
        """
        key = Key(owner, kind)
        with self._lock:
            turn = self._ledger.turn(key, len(pieces))
            made = self._replays.get(key, ())
        if turn is Turn.PLAIN:
            return pieces
        return made if len(made) == len(pieces) else self._more(key, pieces, made)

    def drop(self, owner: object) -> None:
        """Let go of all graphs of `owner`."""
        with self._lock:
            gone = [self._replays.pop(key) for key in self._ledger.forget(owner)]
        del gone  # graphs are destroyed outside of the lock

    def _more(
        self,
        key: Key,
        pieces: Sequence[Callable[[], T]],
        made: Sequence[Callable[[], T]],
    ) -> Sequence[Callable[[], T]]:
        """Capture some of `pieces` that are not; return replays of the first, and the others."""
        count = len(made) + CAPTURES_A_STEP
        try:
            new = [self._graphs.capture(piece) for piece in pieces[len(made) : count]]
        except Exception as error:  # noqa: BLE001 - computed plainly instead, which says what is wrong
            self._failed(key, error)
            return pieces
        gone = []
        with self._lock:
            if not made:
                victims = self._ledger.captured(key, len(pieces))
                gone = [self._replays.pop(one) for one in victims]
            self._replays[key] = replays = [*made, *new]
        del gone
        return [*replays, *pieces[count:]]

    def _failed(self, key: Key, error: Exception) -> None:
        with self._lock:
            self._ledger.failed(key)
            gone = self._replays.pop(key, None)
        del gone
        if self._on_failure is not None:
            self._on_failure()
        problem = f"{type(error).__name__}: {error}"[:500]
        fields = {"device": self._device, "step": str(key.kind), "problem": problem}
        log.warning("step not captured, computed without a graph from now on", extra=fields)
