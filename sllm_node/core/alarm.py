"""A timer on the event loop that is set to a time of ours, and moved when that changes."""

import asyncio
from collections.abc import Callable
from contextvars import Context

from sllm_node.core.clock import Clock


class Alarm:
    """Calls `ring` at a time on `clock`."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._at: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether it will ring."""
        return self._at is not None

    def set(self, at: float | None) -> None:
        """Ring at `at` and at no other time; None: not at all."""
        if at == self._at:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._at = None, at
        if at is not None:
            delay_s = max(0.0, at - self._clock.now())
            # A context of its own: what it does is not part of the request that happened to set it.
            self._handle = asyncio.get_running_loop().call_later(
                delay_s, self._fire, context=Context()
            )

    def _fire(self) -> None:
        # The loop's clock may be a little ahead of ours: whoever rings sets the alarm again.
        self._handle = self._at = None
        self._ring()
