"""Loads in their first moments, in which nothing may start that keeps the interpreter busy.

From the decision to load until the first read or copy is issued, a load is a few short turns of the event
loop and of threads, a millisecond in all. Each of them has to wait for as long as a switch of threads takes
(5 ms in Python) while another thread reads a tokenizer or builds a module. So what takes such time and
the load does not need to begin waits for the beginning, also for an eviction in front of it; at most
`LIMIT_S`, since some beginnings are slow: bytes wait for a remote, or for memory to be mapped.
"""

import asyncio
from collections.abc import Hashable
from contextlib import suppress
from typing import Final

LIMIT_S: Final = 0.02


class Beginnings:
    """What is about to begin on this node."""

    def __init__(self) -> None:
        self._under_way: set[Hashable] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    def add(self, what: Hashable) -> None:
        """Take note that it is about to begin."""
        self._under_way.add(what)
        self._quiet.clear()

    def discard(self, what: Hashable) -> None:
        """Take note that it has begun, or never will; a second call does nothing."""
        self._under_way.discard(what)
        if not self._under_way:
            self._quiet.set()

    async def over(self) -> None:
        """Wait until all has begun that is about to, or for `LIMIT_S`."""
        if self._quiet.is_set():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                await self._quiet.wait()
