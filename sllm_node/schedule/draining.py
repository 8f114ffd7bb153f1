"""The drain of a node: no new requests, a limit for those that run, and the way back until the node stops."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import DrainingError, StoppingError
from sllm_node.schedule.actions import Action
from sllm_node.schedule.scheduler import Scheduler
from sllm_node.schedule.sessions import Sessions
from sllm_node.schedule.telemetry import Telemetry

log = logging.getLogger(__name__)


class Drain:
    """Carries it out on the scheduler and the sessions."""

    def __init__(
        self,
        limit_s: float,
        scheduler: Scheduler,
        sessions: Sessions,
        telemetry: Telemetry,
        clock: Clock,
        do: Callable[[list[Action]], None],
    ) -> None:
        """`do` carries the scheduler's actions out."""
        self._limit_s = limit_s
        self._scheduler = scheduler
        self._sessions = sessions
        self._telemetry = telemetry
        self._clock = clock
        self._do = do
        self._alarm = Alarm(clock, self.end_all)
        self._ended = 0
        self._is_stopping = False
        """The process ends after the drain."""

    def error(self, *, was_running: bool = False) -> DrainingError:
        """Return what a request is told while this node drains."""
        return DrainingError(self._limit_s, was_running=was_running)

    def begin(self, figures: dict[str, object]) -> None:
        """Refuse new requests from now on; a second call does nothing. `figures` go into the log."""
        if self._scheduler.is_draining:
            return
        log.info("drain started", extra=figures)
        self._telemetry.draining(is_draining=True)
        self._alarm.set(self._clock.now() + self._limit_s)
        self._do(self._scheduler.on_drain(self._clock.now()))

    def take_back(self) -> None:
        """Take new requests again; what has not ended goes on. Nothing if there is no drain.

        Raises:
            StoppingError: the node stops.
        """
        if self._is_stopping:
            raise StoppingError
        if not self._scheduler.is_draining:
            return
        log.info("drain taken back", extra={"sessions_ended": self._ended})
        self._telemetry.draining(is_draining=False)
        self._alarm.set(None)
        self._ended = 0
        self._do(self._scheduler.on_undrain(self._clock.now()))

    def begin_stop(self) -> None:
        """Let no drain be taken back from now on: the process ends after it."""
        self._is_stopping = True

    async def over(self, limit_s: float) -> int:
        """Wait until no session is left; end those that are left after `limit_s`.

        Returns how many had to be ended since the drain began.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._sessions.quiet()
        self.end_all()
        return self._ended

    def end_all(self) -> None:
        """End what still runs or waits."""
        self._ended += self._sessions.stop_all(self.error(was_running=True))

    def close(self) -> None:
        """Refuse what comes and end everything, with no limit any more."""
        self._do(self._scheduler.on_drain(self._clock.now()))
        self._alarm.set(None)
        self.end_all()
