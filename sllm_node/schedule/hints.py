"""Loads that begin before their session is there: its request has come, and becomes tokens meanwhile.

Reading a tokenizer, or making tokens of a long text, takes longer than placing a session, and only the
session needs them: its load needs the model's name. So who takes a request gives a hint first. A hint
is a ticket with the scheduler that nobody waits for. It begins a load that can begin at once: into
free memory, or in place of models that are idle and suffice; a plan is made to know that before anything is
done, and one that finds no way leaves all as it is. Any other ticket goes before a hint's, and one whose
room is taken ends (it gave way), with the load that it began. It lasts until the session comes or `HINT_S` is over; then
a load under way that nobody else waits for is aborted. So a request that is refused for what it asks
costs one load, and none of that model for `PAUSE_S` from then on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import TicketId
from sllm_node.schedule.scheduler import Scheduler

HINT_S: Final = 5.0
"""For a tokenizer to be fetched and read, and a prompt to become tokens."""
PAUSE_S: Final = 30.0
"""After a hint that no session followed, for its model."""
HINTS_MAX: Final = 4
"""At once."""
LONG_CHARACTERS: Final = 16384
"""A text from which on a hint pays although its tokenizer is here: some 5 ms of work."""


@dataclass(frozen=True, slots=True)
class _Hint:
    ticket: TicketId
    until: float


class Hints:
    """The hints that one node has been given."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        metrics: Metrics,
        ask: Callable[[ModelId], TicketId | None],
        drop: Callable[[ModelId, TicketId], None],
    ) -> None:
        """`ask` gives the scheduler a hint's ticket if its load can begin; `drop` takes it back if it is there."""
        self._scheduler = scheduler
        self._clock = clock
        self._count = metrics.hints
        self._ask = ask
        self._drop = drop
        self._held: dict[ModelId, _Hint] = {}
        self._paused: dict[ModelId, float] = {}
        self._alarm = Alarm(clock, self._on_timer)

    def take(self, model: ModelId) -> bool:
        """Begin the load of `model` if that can be done at once; tell whether it is on its way now."""
        now = self._clock.now()
        if not self._is_welcome(model, now):
            return self._is_coming(model)
        try:
            ticket = self._ask(model)
        except SllmError:
            return False  # the session will be told
        if ticket is None or not self._is_coming(model):
            self._count.labels("no room").inc()
            return False
        self._held[model] = _Hint(ticket, now + HINT_S)
        self._arm()
        return True

    def followed(self, model: ModelId) -> None:
        """Take note that a session of `model` is there."""
        if (hint := self._held.pop(model, None)) is not None:
            self._count.labels("followed").inc()
            self._drop(model, hint.ticket)
            self._arm()

    def gave_way(self, model: ModelId) -> None:
        """Take note that others have the room that the hint for `model` counted on."""
        if self._held.pop(model, None) is not None:
            self._count.labels("gave way").inc()
            self._arm()

    def close(self) -> None:
        """Forget all."""
        self._held.clear()
        self._alarm.set(None)

    def _is_welcome(self, model: ModelId, now: float) -> bool:
        if self._paused.get(model, now) > now or len(self._held) >= HINTS_MAX:
            return False
        is_new = self._scheduler.roster.view(model).state is ModelState.IDLE
        return is_new and not (self._scheduler.roster.is_crowded or self._scheduler.is_draining)

    def _is_coming(self, model: ModelId) -> bool:
        """Tell whether the load has begun, or begins as soon as idle models have left."""
        view = self._scheduler.roster.view(model)
        return bool(view.devices) and view.state is not ModelState.EVICTING

    def _on_timer(self) -> None:
        now = self._clock.now()
        for model in [model for model, hint in self._held.items() if hint.until <= now]:
            self._count.labels("not followed").inc()
            self._paused = {name: until for name, until in self._paused.items() if until > now}
            self._paused[model] = now + PAUSE_S
            self._drop(model, self._held.pop(model).ticket)
        self._arm()

    def _arm(self) -> None:
        self._alarm.set(min((hint.until for hint in self._held.values()), default=None))
