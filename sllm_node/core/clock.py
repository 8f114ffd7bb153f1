"""The only place where time is read."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward, and the date for people."""

    def now(self) -> float:
        """Return monotonic seconds; only differences mean anything."""

    def wall(self) -> float:
        """Return seconds since the Unix epoch, for timestamps shown to people."""


class MonotonicClock:
    """The clock of a running node."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves when told to: tests and the simulator."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`, which is not negative."""
        assert seconds >= 0
        self._now += seconds
