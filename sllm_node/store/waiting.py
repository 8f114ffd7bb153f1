"""Loads that wait: for others to end before they start, and for a chunk of the pinned pool."""

from collections import deque

from sllm_node.store.loader import Load
from sllm_node.store.residency import Residency


class Waiting:
    """So many loads at once read; who waits for a chunk gets the next one in the order of asking."""

    def __init__(self, limit: int, ledger: Residency) -> None:
        self._limit = limit
        self._ledger = ledger
        self._active = 0
        self._to_start: deque[Load] = deque()
        self._for_chunk: deque[Load] = deque()

    # --- for others to end --------------------------------------------------------------------

    def begin(self, load: Load, *, is_warm: bool) -> None:
        """Start `load` now, or when its turn comes. A warm one needs neither disk nor chunks: it never waits."""
        if is_warm or self._active < self._limit:
            self._active += 1
            load.start()
        else:
            self._to_start.append(load)

    def is_to_start(self, load: Load) -> bool:
        """Tell whether `load` has not started yet."""
        return load in self._to_start

    def cancel(self, load: Load) -> None:
        """End `load`, wherever it is."""
        if load in self._to_start:
            self._to_start.remove(load)
            self._active += 1
            load.abandon()
        else:
            load.cancel()

    def ended(self, load: Load) -> None:
        """Take note that `load` is over."""
        self._active -= 1
        if load in self._for_chunk:
            self._for_chunk.remove(load)

    def start_next(self) -> None:
        """Start those whose turn has come."""
        while self._to_start and self._active < self._limit:
            self._active += 1
            self._to_start.popleft().start()

    @property
    def is_closed(self) -> bool:
        """Whether none starts any more."""
        return not self._limit

    def close(self) -> None:
        """Start none any more."""
        self._limit = 0

    # --- for a chunk --------------------------------------------------------------------------

    @property
    def wants_chunks(self) -> bool:
        """Whether a load waits for one."""
        return bool(self._for_chunk)

    def wait_for_chunk(self, load: Load) -> bool:
        """Let `load` wait, unless nothing is in flight and every other load waits as well."""
        waiting = [other for other in self._for_chunk if other is not load]
        others = self._active - len(waiting) - 1
        if not self._ledger.in_flight and others <= 0:
            return False
        if load not in self._for_chunk:
            self._for_chunk.append(load)
        return True

    def wake_one(self) -> None:
        """A chunk may be free: the load that has waited longest tries again."""
        if self._for_chunk:
            self._for_chunk.popleft().pump()
