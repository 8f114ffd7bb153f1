"""Graphs of all replicas of a device: captured when `graph_ledger` says so, replayed from then on.

Steps run on the device's step thread; replicas are closed on others. A step whose capture fails is
computed plainly from then on.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Protocol, TypeVar

from sllm_node.engine.graph_ledger import GraphLedger, Key, Turn

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        """Return what to call, one after the other, for a step of `pieces`: these, or replays.

        What a replay returns is the same memory every time. The owner keeps `pieces`, and all that they
        refer to, until it is dropped.
        """
        key = Key(owner, kind)
        with self._lock:
            turn = self._ledger.turn(key, len(pieces))
            if turn is Turn.REPLAY:
                return self._replays[key]
        return pieces if turn is Turn.PLAIN else self._captured(key, pieces)

    def drop(self, owner: object) -> None:
        """Let go of all graphs of `owner`."""
        with self._lock:
            gone = [self._replays.pop(key) for key in self._ledger.forget(owner)]
        del gone  # graphs are destroyed outside of the lock

    def _captured(self, key: Key, pieces: Sequence[Callable[[], T]]) -> Sequence[Callable[[], T]]:
        try:
            replays = [self._graphs.capture(piece) for piece in pieces]
        except Exception as error:  # noqa: BLE001 - computed plainly instead, which says what is wrong
            self._failed(key, error)
            return pieces
        with self._lock:
            self._replays[key] = replays
            gone = [self._replays.pop(one) for one in self._ledger.captured(key, len(replays))]
        del gone
        return replays

    def _failed(self, key: Key, error: Exception) -> None:
        with self._lock:
            self._ledger.failed(key)
        if self._on_failure is not None:
            self._on_failure()
        problem = f"{type(error).__name__}: {error}"[:500]
        fields = {"device": self._device, "step": str(key.kind), "problem": problem}
        log.warning("step not captured, computed without a graph from now on", extra=fields)
