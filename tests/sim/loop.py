"""An event loop whose time jumps to the next timer; nothing to wait for is an error, not a hang."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")


class SimulationDeadlockError(Exception):
    """Everybody waits and no timer is set."""


class _Jump(selectors.BaseSelector):
    """Selects nothing, at once: there is no world outside."""

    def __init__(self):
        self.loop: SimLoop | None = None
        self._keys: dict[Any, selectors.SelectorKey] = {}

    @override
    def register(self, fileobj, events, data=None):
        key = selectors.SelectorKey(fileobj, 0, events, data)
        self._keys[fileobj] = key
        return key

    @override
    def unregister(self, fileobj):
        return self._keys.pop(fileobj)

    @override
    def select(self, timeout=None):
        if timeout is None:
            raise SimulationDeadlockError
        assert self.loop is not None
        self.loop.virtual_now += max(timeout, 0.0)
        return []

    @override
    def get_map(self):
        return self._keys


class SimLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual seconds from 0."""

    def __init__(self):
        self.virtual_now = 0.0
        selector = _Jump()
        super().__init__(selector)
        selector.loop = self

    @override
    def time(self):
        return self.virtual_now


class LoopClock:
    """A node's clock on virtual time."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.now()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a fresh virtual loop."""
    with asyncio.Runner(loop_factory=SimLoop) as runner:
        return runner.run(main)
