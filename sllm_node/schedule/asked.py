"""Loads that are asked for by themselves: by operators, by the config, or ahead of a session."""

import asyncio
from collections.abc import Callable

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId
from sllm_node.schedule.actions import Action, Ticket, TicketId
from sllm_node.schedule.scheduler import Scheduler
from sllm_node.schedule.tickets import Tickets


class AskedLoads:
    """Who waits for a load and has no session."""

    def __init__(
        self,
        scheduler: Scheduler,
        tickets: Tickets,
        clock: Clock,
        do: Callable[[list[Action]], None],
    ) -> None:
        """`do` carries the scheduler's actions out."""
        self._scheduler = scheduler
        self._tickets = tickets
        self._clock = clock
        self._do = do
        self._waiters: dict[TicketId, asyncio.Future[None]] = {}

    def has(self, ticket: TicketId) -> bool:
        """Tell whether a ticket is one of these."""
        return ticket in self._waiters

    def want(self, checkpoint: Checkpoint) -> asyncio.Future[None]:
        """Ask for a model to be on the device; the future ends when it is, or can't be."""
        return self._ask_with(self._tickets.make(checkpoint, is_session=False))

    def _ask_with(self, ticket: Ticket) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Looked at even when the caller is gone.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiters[ticket.number] = waiter
        self._do(self._scheduler.on_request(ticket, self._clock.now()))
        return waiter

    def ask_ahead(self, checkpoint: Checkpoint) -> TicketId | None:
        """Ask for a model that nobody waits for yet; None: its load could not begin."""
        ticket = self._tickets.make(checkpoint, is_session=False, is_hint=True)
        if not self._scheduler.can_begin(ticket, self._clock.now()):
            return None
        _ = self._ask_with(ticket)  # its end is nobody's news
        return ticket.number

    def drop_ahead(self, model: ModelId, ticket: TicketId) -> None:
        """Take a ticket back that nobody waits for; one that was granted leaves its model idle."""
        now = self._clock.now()
        if self._waiters.pop(ticket, None) is not None:
            self._do(self._scheduler.on_cancel(ticket, now))
        else:
            self._do(self._scheduler.on_unused(model, now))

    # --- how they end -------------------------------------------------------------------------

    def granted(self, ticket: TicketId) -> None:
        """The model is there."""
        self._waiters.pop(ticket).set_result(None)

    def refused(self, ticket: TicketId, error: SllmError) -> None:
        """It can't be."""
        self._waiters.pop(ticket).set_exception(error)

    def gave_way(self, ticket: TicketId) -> None:
        """Others have its room."""
        self._waiters.pop(ticket).cancel()

    def close(self, error: SllmError) -> None:
        """Tell all who still wait."""
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error)
