"""Notices an engine that has had work for longer than `engine.stall_after_s` without a step ending.

The engine says when work comes, when a step begins and ends, and when nothing is left. Whether it is
stalled follows from that and the clock, whenever somebody asks; a timer of the loop is there for the
metric and the log line, which say it once. A load is no stall: while some module is built or bound,
which runs beside no step, or while a step waits for weights, the time does not count.
"""

import logging
from collections.abc import Callable

from prometheus_client import Gauge

from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.types import ModelId

log = logging.getLogger(__name__)


class StallWatch:
    """Watches one engine. Call everything on the event loop."""

    def __init__(
        self,
        model: ModelId,
        limit_s: float,
        clock: Clock,
        gauge: Gauge,
        *,
        sessions: Callable[[], tuple[int, int]],
        free_since: Callable[[], float],
    ) -> None:
        """Watch for `limit_s` seconds without a step ending; 0: never.

        `sessions` tells how many run and wait, `free_since` since when no load has kept steps from
        running: now, if one does.
        """
        self.model = model
        self._limit_s = limit_s
        self._clock = clock
        self._gauge = gauge
        self._sessions = sessions
        self._free_since = free_since
        self._alarm = Alarm(clock, self._look)
        self._since: float | None = None
        """When work came or a step last ended; None: there is no work."""
        self._step = (0, 0)
        """Sessions and tokens of the last step that began."""
        self._is_stepping = False
        self._is_told = False
        gauge.set(0)

    # --- for the engine -----------------------------------------------------------------------

    def work(self) -> None:
        """There is work, or more of it."""
        if self._since is None:
            self._restart()

    def began(self, sessions: int, tokens: int) -> None:
        """A step begins."""
        self._step, self._is_stepping = (sessions, tokens), True

    def ended(self) -> None:
        """A step has ended, however it did."""
        self._is_stepping = False
        if self._is_told:
            log.info("engine moves again", extra=self._fields(self._idle_s()))
        self._settle()
        self._restart()

    def rest(self) -> None:
        """Nothing is left to do."""
        self._settle()
        self._since, self._is_stepping = None, False
        self._alarm.set(None)

    # --- for those who ask --------------------------------------------------------------------

    @property
    def stalled_s(self) -> float | None:
        """For how long no step has ended, if that is too long."""
        idle_s = self._idle_s()
        return idle_s if self._limit_s and idle_s > self._limit_s else None

    def describe(self) -> str:
        """Say what the engine has been doing since a step last ended."""
        running, waiting = self._sessions()
        sessions, tokens = self._step
        which = "the step under way" if self._is_stepping else "its last step"
        return (
            f"model {self.model!r} has had work for {self._idle_s():.0f} s without a step ending: "
            f"{running} sessions run, {waiting} wait, {which} has {sessions} sessions and "
            f"{tokens} tokens (engine.stall_after_s = {self._limit_s:g})"
        )

    # --- inside -------------------------------------------------------------------------------

    def _idle_s(self) -> float:
        if self._since is None:
            return 0.0
        return self._clock.now() - max(self._since, self._free_since())

    def _restart(self) -> None:
        self._since = self._clock.now()
        if self._limit_s and not self._alarm.is_set:
            self._alarm.set(self._since + self._limit_s)

    def _settle(self) -> None:
        if self._is_told:
            self._is_told = False
            self._gauge.set(0)

    def _look(self) -> None:
        if self._since is None:
            return
        stalled_s = self.stalled_s
        if stalled_s is None:
            # A little later than the limit, so that whoever looks then is sure.
            left_s = max(self._limit_s - self._idle_s(), 0.0) + self._limit_s / 1000
            self._alarm.set(self._clock.now() + left_s)
            return
        self._is_told = True
        self._gauge.set(1)
        log.error("engine stalled", extra=self._fields(stalled_s))

    def _fields(self, idle_s: float) -> dict[str, object]:
        running, waiting = self._sessions()
        sessions, tokens = self._step
        return {
            "model": self.model,
            "seconds": round(idle_s, 1),
            "running": running,
            "waiting": waiting,
            "is_stepping": self._is_stepping,
            "step_sessions": sessions,
            "step_tokens": tokens,
        }
