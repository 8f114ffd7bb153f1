"""What the scheduler knows of one model: its state, who waits for it, who uses it.

States change through `TRANSITIONS` only; an event that a state doesn't know is a programmer's error.

    IDLE -> QUEUED -> LOADING -> READY -> EVICTING -> IDLE

A model takes its device memory in LOADING, READY and EVICTING. Tickets may wait in every state but
IDLE: in QUEUED for room, in LOADING for the load, in READY for a free session or because the model
is closed in favour of another one, in EVICTING for the next turn.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sllm_node.core.types import ModelId, ModelState, Share
from sllm_node.schedule.actions import ModelView, ReplicaView, Ticket, TicketId
from sllm_node.schedule.estimate import MovingAverage

SERVICE_GUESS_S: Final = 10.0
"""How long a session lasts, before one was seen."""


class ModelEvent(Enum):
    """What moves a model from state to state."""

    WANTED = "wanted"
    UNWANTED = "unwanted"
    LOAD_STARTED = "load started"
    LOADED = "loaded"
    LOAD_FAILED = "load failed"
    LOAD_ABORTED = "load aborted"
    EVICTION_STARTED = "eviction started"
    EVICTED = "evicted"


TRANSITIONS: Final[dict[ModelState, dict[ModelEvent, ModelState]]] = {
    ModelState.IDLE: {ModelEvent.WANTED: ModelState.QUEUED},
    ModelState.QUEUED: {
        ModelEvent.UNWANTED: ModelState.IDLE,
        ModelEvent.LOAD_STARTED: ModelState.LOADING,
    },
    ModelState.LOADING: {
        ModelEvent.LOADED: ModelState.READY,
        ModelEvent.LOAD_FAILED: ModelState.IDLE,
        ModelEvent.LOAD_ABORTED: ModelState.EVICTING,
    },
    ModelState.READY: {ModelEvent.EVICTION_STARTED: ModelState.EVICTING},
    ModelState.EVICTING: {ModelEvent.EVICTED: ModelState.IDLE},
}

_ON_DEVICE: Final = (ModelState.LOADING, ModelState.READY, ModelState.EVICTING)


@dataclass(frozen=True, slots=True)
class Waiter:
    """A ticket in the queue."""

    ticket: Ticket
    arrived: float
    """First of all: where it has waited elsewhere before, that counts."""


@dataclass(frozen=True, slots=True)
class Running:
    """A granted session."""

    ticket: Ticket
    granted: float


class ModelRecord:
    """One model, as mutable state with its rules."""

    def __init__(self, model: ModelId, priority: int, keep_alive_s: float, *, pinned: bool) -> None:
        self.model = model
        self.priority = priority
        self.pinned = pinned
        self.state = ModelState.IDLE
        self.shares: tuple[Share, ...] = ()
        self.devices: tuple[str, ...] = ()
        """Where its shares are, or were when it was on devices last."""
        self.load_s = self.beside_s = 0.0
        self.ready_at = 0.0
        """When the load under way, planned, or the last one, was expected to be done."""
        self.running: dict[TicketId, Running] = {}
        self.is_closed = False
        """New sessions queue, because another model's turn has come."""
        self.is_stale = False
        """Its checkpoint was replaced or removed: no new sessions, evicted when idle."""
        self.is_retired = False
        """So it is because the cluster needs it no more."""
        self.is_scaled = False
        """The cluster says when it leaves for idleness; its keep-alive does not count."""
        self.promised: frozenset[ModelId] = frozenset()
        """While it is queued: models whose sessions move to other nodes so that it has room."""
        self.planned: tuple[str, ...] = ()
        """While it is queued: the devices on which evictions make the last of its room."""
        self.last_used = 0.0
        self.deadline: float | None = None
        """When it is evicted for idleness; None while it runs or is kept for ever."""
        self.service_s = MovingAverage(SERVICE_GUESS_S)
        self._default_keep_alive_s = keep_alive_s
        self._keep_alive_s = keep_alive_s
        self._arrivals: OrderedDict[TicketId, Waiter] = OrderedDict()
        """In the order in which they came here."""
        self._ages: list[tuple[float, TicketId]] = []
        self._order: list[tuple[int, float, TicketId]] = []

    def happen(self, event: ModelEvent) -> None:
        """Change the state by the table."""
        following = TRANSITIONS[self.state].get(event)
        assert following is not None, f"{self.model}: {event.value} in state {self.state.value}"
        self.state = following
        if following is not ModelState.QUEUED:
            self.promised, self.planned = frozenset(), ()

    @property
    def device_bytes(self) -> int:
        """Memory that it takes, or would take, on all devices."""
        return sum(share.size for share in self.shares)

    def bytes_on(self, device: str) -> int:
        """Return the memory that it takes of `device` now."""
        if not self.is_on_device:
            return 0
        taken = zip(self.devices, self.shares, strict=True)
        return sum(share.size for name, share in taken if name == device)

    @property
    def is_on_device(self) -> bool:
        """Whether it takes device memory."""
        return self.state in _ON_DEVICE

    @property
    def is_held(self) -> bool:
        """Whether a pin keeps its device memory from all others."""
        return self.pinned and self.state in (ModelState.LOADING, ModelState.READY)

    @property
    def is_idle(self) -> bool:
        """Whether it is on the device for nobody; a pinned one counts too."""
        return self.state is ModelState.READY and not self.running

    @property
    def leaves_at(self) -> float | None:
        """When it is evicted for idleness; None: not as things are."""
        return self.deadline if self.is_idle and not (self.pinned or self.is_scaled) else None

    # --- the queue ----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._arrivals)

    @property
    def oldest(self) -> Waiter:
        """The waiter that came first; there must be one."""
        return self._arrivals[self._ages[0][1]]

    @property
    def foremost(self) -> Waiter:
        """The waiter that came first and is no hint, if there is one."""
        by_age = (self._arrivals[number] for _, number in self._ages)
        return next((w for w in by_age if not w.ticket.is_hint), self.oldest)

    @property
    def is_hinted(self) -> bool:
        """Whether only hints wait for it: nobody is there yet."""
        return self.waiting > 0 and self.foremost.ticket.is_hint

    @property
    def highest_priority(self) -> int:
        """Of the waiting and running tickets and the model's own."""
        tickets = [running.ticket.priority for running in self.running.values()]
        if self._order:
            tickets.append(-self._order[0][0])
        return self.priority + max(tickets, default=0)

    @property
    def waiting_priority(self) -> int:
        """Of the best waiting ticket; there must be one."""
        return self.priority - self._order[0][0]

    def is_overdue(self, now: float, max_wait_s: float) -> bool:
        """Tell whether a ticket has waited so long that grouping must not hold it up any more."""
        if not self.waiting or self.is_hinted:
            return False
        return now >= self.foremost.arrived + max_wait_s

    def enqueue(self, ticket: Ticket, now: float) -> None:
        """Put `ticket` in the queue."""
        assert ticket.number not in self._arrivals
        arrived = now - ticket.waited_s
        self._arrivals[ticket.number] = Waiter(ticket, arrived)
        insort(self._ages, (arrived, ticket.number))
        insort(self._order, (-ticket.priority, arrived, ticket.number))
        if not self.is_on_device:
            self._take_size(ticket)

    def remove(self, number: TicketId) -> Waiter:
        """Take a waiting ticket out of the queue."""
        waiter = self._arrivals.pop(number)
        age = (waiter.arrived, number)
        del self._ages[bisect_left(self._ages, age)]
        del self._order[bisect_left(self._order, (-waiter.ticket.priority, *age))]
        return waiter

    def take_next(self, now: float, max_wait_s: float) -> Waiter:
        """Take the ticket whose turn it is: an overdue one, else the highest priority."""
        overdue = self.is_overdue(now, max_wait_s)
        return self.remove(self.foremost.ticket.number if overdue else self._order[0][2])

    def plan(self, devices: tuple[str, ...], now: float) -> None:
        """Take where it comes once evictions have ended; no devices: it waits for more than that."""
        if devices and not self.planned:
            self.ready_at = now + self.load_s
        self.planned = devices

    def waiters(self) -> list[Waiter]:
        """Return who waits, in order of arrival."""
        return [self._arrivals[number] for _, number in self._ages]

    def leave_device(self) -> None:
        """Forget what held for the replica; those who wait know the checkpoint as it is now."""
        self.is_closed = False
        self.is_stale = False
        self.is_retired = False
        self.deadline = None
        self._keep_alive_s = self._default_keep_alive_s
        if self._arrivals:
            self._take_size(next(reversed(self._arrivals.values())).ticket)

    def _take_size(self, ticket: Ticket) -> None:
        self.shares = ticket.shares
        self.load_s, self.beside_s = ticket.load_s, ticket.beside_s

    # --- use ----------------------------------------------------------------------------------

    def start(self, ticket: Ticket, now: float) -> None:
        """Count a granted session; its keep-alive, or the default, holds from now on."""
        self.running[ticket.number] = Running(ticket, now)
        wished = ticket.keep_alive_s
        self._keep_alive_s = self._default_keep_alive_s if wished is None else wished
        self.last_used = now
        self.deadline = None

    def finish(self, number: TicketId, now: float) -> None:
        """Stop counting a session."""
        running = self.running.pop(number)
        self.service_s.observe(now - running.granted)
        self.last_used = now
        if not self.running:
            self.count_down(now)

    def arrive(self, now: float) -> None:
        """Begin life on the device. A keep-alive of 0 counts from the first session on."""
        self.last_used = now
        if self._keep_alive_s > 0:
            self.count_down(now)

    def count_down(self, now: float) -> None:
        """Let the keep-alive time begin."""
        assert self.is_idle
        self.deadline = now + self._keep_alive_s if self._keep_alive_s >= 0 else None

    def view(self) -> ModelView:
        """Return what status and metrics show."""
        return ModelView(
            self.state, self.pinned, self.priority, len(self.running), self.waiting,
            self.leaves_at,
            self.devices if self.is_on_device else self.planned,
        )  # fmt: skip

    def replica_view(self) -> ReplicaView:
        """Return what other nodes may know of it while it takes device memory, or is about to."""
        return ReplicaView(
            self.model, self.state, self.devices if self.is_on_device else self.planned,
            tuple(share.size for share in self.shares),
            tuple(self.running), tuple(self._arrivals), self.pinned,
            self.is_closed or self.is_stale or self.state is ModelState.EVICTING,
            self.ready_at, self.last_used, self.service_s.value, self.load_s, self.beside_s,
        )  # fmt: skip
