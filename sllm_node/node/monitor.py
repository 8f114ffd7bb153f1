"""Watches the event loop and the engines: loop lag into the metrics, the stall rule, the watchdog.

A node whose loop turns while a step hangs on the device looks alive and serves nobody. So the sign of
life goes out only while no engine has had work and no step ended for longer than `engine.stall_after_s`.
"""

import asyncio
from collections.abc import Callable

from sllm_node.core.clock import Clock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import Stall
from sllm_node.node.systemd import Notifier

PERIOD_S = 0.1
"""Seconds between two measurements of loop lag."""


class Monitor:
    """One task that wakes every `PERIOD_S` and looks."""

    def __init__(
        self,
        clock: Clock,
        metrics: Metrics,
        notifier: Notifier,
        stalled: Callable[[], Stall | None],
        describe: Callable[[], str],
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._notifier = notifier
        self._stalled = stalled
        self._describe = describe
        self._beat_s = (notifier.watchdog_s or 0.0) / 3
        self._last_beat = float("-inf")
        self._last_status = ""

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            due = self._clock.now() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            now = self._clock.now()
            self._metrics.loop_lag_seconds.observe(max(0.0, now - due))
            self.beat(now)

    def beat(self, now: float) -> None:
        """Send the sign of life when it is due and nothing is stalled; the status when it changed."""
        stalled = self._stalled()
        status = self._describe() if stalled is None else stalled.reason
        if status != self._last_status:
            self._last_status = status
            self._notifier.status(status)
        if self._beat_s and stalled is None and now - self._last_beat >= self._beat_s:
            self._last_beat = now
            self._notifier.watchdog()
