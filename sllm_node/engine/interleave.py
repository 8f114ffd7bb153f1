"""Carries out what `turns` decides: the engines of one device, one job of its step thread at a time.

A turn begins within the event that ended the one before it, before the tokens of that are handed out:
the next engine plans then, with all that has come until now, and its job is on the thread at once.
Where it is certain who is next, and what it will compute, its job is put behind the one under way, and
the thread goes from one to the other; its turn begins when that one ends all the same.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    def following(self) -> int | None: ...
    def follow(self, seat: int) -> None: ...
    def ended(self, seat: int, prompt_tokens: int, now: float, draws: int = 0) -> None: ...
    def prompt_tokens(self, seat: int) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine does with its turn."""

    future: asyncio.Future[Any]
    prompt_tokens: int
    """Of prompts, in the step that ends with it."""
    began: float
    """When, by the engine's clock; of one behind another, when its turn began."""
    draws: int = 0
    """Sessions that wait for their next token when it has ended."""


Begin = Callable[[], Job | None]
"""Starts a job; None: there is nothing to do after all."""
IsCertain = Callable[[], bool]
"""Whether a job would do the same if it were started before its turn."""


def _never() -> bool:
    return False


@dataclass(slots=True)
class _Waiting:
    """An engine that waits for its turn."""

    begin: Begin
    is_certain: IsCertain
    granted: asyncio.Future[Job | None]
    job: Job | None = None
    """Its job, if that is behind another one's already."""


class Interleaving:
    """The engines of one device."""

    def __init__(self, order: Order, clock: Clock) -> None:
        self._order = order
        self._clock = clock
        self._waiting: dict[int, _Waiting] = {}
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

    async def turn(
        self, seat: int, need: Need, begin: Begin, is_certain: IsCertain = _never
    ) -> Job | None:
        """Call `begin` for this seat's turn, and return what it returned or raised when that has come.

        The turn lasts until the job ends.
        """
        granted: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        self._waiting[seat] = _Waiting(begin, is_certain, granted)
        self._order.ready(seat, need, self._clock.now())
        self._go()
        try:
            return await granted
        finally:
            if self._waiting.pop(seat, None) is not None:  # cancelled before its turn came
                self._order.rest(seat)

    def _go(self) -> None:
        """Begin turns until one lasts, and start the job behind it if that is certain."""
        while (seat := self._order.begin(now := self._clock.now())) is not None:
            one = self._waiting.pop(seat)
            job = self._start(seat, one) if one.job is None else replace(one.job, began=now)
            if not one.granted.done():
                one.granted.set_result(job)
            if job is not None:
                break
            self._order.rest(seat)
        following = self._order.following()
        if following is None or not self._waiting[following].is_certain():
            return
        ahead = self._waiting[following]
        ahead.job = self._start(following, ahead)
        if ahead.job is not None:
            self._order.follow(following)

    def _start(self, seat: int, one: _Waiting) -> Job | None:
        job = None
        try:
            job = None if one.granted.done() else one.begin()
        except Exception as error:  # noqa: BLE001 - told to the engine
            one.granted.set_exception(error)
        if job is not None:
            # First of all who wait for the job: the next turn begins before its result is used.
            job.future.add_done_callback(partial(self._ended, seat, job))
        return job

    def _ended(self, seat: int, job: Job, future: asyncio.Future[Any]) -> None:
        one = self._waiting.get(seat)
        if one is not None and one.job is job:  # it failed before its turn came, and needs none
            del self._waiting[seat]
            self._order.rest(seat)
            if not one.granted.done():
                one.granted.set_result(job)
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

    async def turn(self, need: Need, begin: Begin, is_certain: IsCertain = _never) -> Job | None:
        """Call `begin` for this engine's turn, and return what it returned or raised when that has come."""
        return await self._device.turn(self._number, need, begin, is_certain)

    def prompt_tokens(self) -> int | None:
        """Return how many tokens of prompts its next step may have; None: any number."""
        return self._order.prompt_tokens(self._number)

    def rest(self) -> None:
        """Take note that this engine has nothing to do; it has no turn and waits for none."""
        self._order.rest(self._number)

    def leave(self) -> None:
        """Give the place up."""
        self._device.leave(self._number)
