"""Carries out what `turns` decides: the engines of one device, one job of its step thread at a time.

A turn begins within the event that ended the one before it, before the tokens of that are handed out:
the next engine plans then, with all that has come until now, and its job is on the thread at once.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sllm_node.core.clock import Clock
from sllm_node.engine.turns import Need


class Order(Protocol):
    """Decides whose turn it is; `turns.Turns`, or what it is compared with."""

    def join(self) -> int: ...
    def leave(self, seat: int) -> None: ...
    def ready(self, seat: int, need: Need, now: float) -> None: ...
    def rest(self, seat: int) -> None: ...
    def begin(self, now: float) -> int | None: ...
    def ended(self, seat: int, prompt_tokens: int, now: float, draws: int = 0) -> None: ...
    def prompt_tokens(self, seat: int) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine does with its turn."""

    future: asyncio.Future[Any]
    prompt_tokens: int
    """Of prompts, in the step that ends with it."""
    began: float
    """When, by the engine's clock."""
    draws: int = 0
    """Sessions that wait for their next token when it has ended."""


Begin = Callable[[], Job | None]
"""Starts a job; None: there is nothing to do after all."""


class Interleaving:
    """The engines of one device."""

    def __init__(self, order: Order, clock: Clock) -> None:
        self._order = order
        self._clock = clock
        self._waiting: dict[int, tuple[Begin, asyncio.Future[Job | None]]] = {}
        self._seats: set[int] = set()

    def join(self) -> "Seat":
        """Return the place of a new engine."""
        seat = self._order.join()
        self._seats.add(seat)
        return Seat(self, self._order, seat)

    def leave(self, seat: int) -> None:
        """Forget an engine that is closed."""
        self._seats.discard(seat)
        self._order.leave(seat)

    @property
    def seats(self) -> int:
        """Engines on the device."""
        return len(self._seats)

    async def turn(self, seat: int, need: Need, begin: Begin) -> Job | None:
        """Call `begin` when it is this seat's turn, and return what it returned or raised.

        The turn lasts until the job ends.
        """
        granted: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        self._waiting[seat] = begin, granted
        self._order.ready(seat, need, self._clock.now())
        self._go()
        try:
            return await granted
        finally:
            if self._waiting.pop(seat, None) is not None:  # cancelled before its turn came
                self._order.rest(seat)

    def _go(self) -> None:
        """Begin turns until one lasts."""
        while (seat := self._order.begin(self._clock.now())) is not None:
            begin, granted = self._waiting.pop(seat)
            job = None
            try:
                job = None if granted.done() else begin()
            except Exception as error:  # noqa: BLE001 - told to the engine
                granted.set_exception(error)
            if job is not None:
                # First of all who wait for the job: the next turn begins before its result is used.
                job.future.add_done_callback(partial(self._ended, seat, job))
            if not granted.done():
                granted.set_result(job)
            if job is not None:
                return
            self._order.rest(seat)

    def _ended(self, seat: int, job: Job, future: asyncio.Future[Any]) -> None:
        has_failed = future.cancelled() or future.exception() is not None
        draws = 0 if has_failed else job.draws
        self._order.ended(seat, job.prompt_tokens, self._clock.now(), draws)
        self._go()


class Seat:
    """One engine's place among those of its device."""

    def __init__(self, device: Interleaving, order: Order, number: int) -> None:
        self._device = device
        self._order = order
        self._number = number

    @property
    def is_alone(self) -> bool:
        """Whether there is no other engine: what a turn is for makes no difference."""
        return self._device.seats == 1

    async def turn(self, need: Need, begin: Begin) -> Job | None:
        """Call `begin` when it is this engine's turn, and return what it returned or raised."""
        return await self._device.turn(self._number, need, begin)

    def prompt_tokens(self) -> int | None:
        """Return how many tokens of prompts its next step may have; None: any number."""
        return self._order.prompt_tokens(self._number)

    def rest(self) -> None:
        """Take note that this engine has nothing to do; it has no turn and waits for none."""
        self._order.rest(self._number)

    def leave(self) -> None:
        """Give the place up."""
        self._device.leave(self._number)
