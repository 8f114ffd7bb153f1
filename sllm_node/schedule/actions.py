"""What the scheduler is told about a request, and what it asks the driver to do.

Nothing here acts. The driver carries the actions out in the order in which they are given, before
it tells the scheduler anything else.
"""

from dataclasses import dataclass
from typing import NewType

from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId, ModelState, Share

TicketId = NewType("TicketId", int)
"""A request's place with the scheduler; later requests have higher numbers."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One wish for a model: a session, or (an operator's, a preload's) that it be on the device."""

    number: TicketId
    model: ModelId
    shares: tuple[Share, ...]
    """What the model takes while it is on its device, or devices."""
    load_s: float
    """Expected seconds of a load from where the model's bytes are now."""
    priority: int = 0
    """Added to the model's own; higher goes first."""
    keep_alive_s: float | None = None
    """For the model, from this session's grant on: 0 evicts when idle, -1 never, None the default."""
    is_session: bool = True
    is_hint: bool = False
    """Nobody waits for it: it gives way to all others."""
    waited_s: float = 0.0
    """How long it has waited elsewhere: its age in the queue counts from its first arrival."""

    @property
    def device_bytes(self) -> int:
        """Weights and KV memory on all devices."""
        return sum(share.size for share in self.shares)


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Bring `model` to `devices`, one a share; answer with on_loaded or on_load_failed."""

    model: ModelId
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AbortLoad:
    """Nobody waits for the load of `model`: stop it; answer with on_evicted when it is gone."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Evict:
    """Take the idle `model` off the device; answer with on_evicted when its memory is free."""

    model: ModelId
    reason: str
    """`room`, `keep_alive`, `operator`, `failed`, `replaced` or `retired`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """`model` is on the device for this ticket; answer with on_finished if it is a session."""

    ticket: TicketId
    model: ModelId


@dataclass(frozen=True, slots=True)
class Refuse:
    """The waiting ticket ends with `error`; nothing is to be answered."""

    ticket: TicketId
    error: SllmError


@dataclass(frozen=True, slots=True)
class GiveWay:
    """The waiting ticket, a hint, ends because others need its room; nothing is to be answered."""

    ticket: TicketId
    model: ModelId


@dataclass(frozen=True, slots=True)
class Stop:
    """The granted ticket ends with `error`; nothing is to be answered."""

    ticket: TicketId
    error: SllmError


Action = StartLoad | AbortLoad | Evict | Grant | Refuse | GiveWay | Stop


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as the scheduler sees it, for status and metrics."""

    state: ModelState
    pinned: bool
    priority: int
    running: int
    waiting: int
    keep_alive_until: float | None
    """On the clock of the events' `now`."""
    devices: tuple[str, ...] = ()
    """Where it is, or is coming."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A model that takes device memory, as the scheduler sees it: for placement over many nodes.

    One that is queued takes it once evictions have ended.
    """

    model: ModelId
    state: ModelState
    devices: tuple[str, ...]
    sizes: tuple[int, ...]
    """What it takes of each of them."""
    running: tuple[TicketId, ...]
    waiting: tuple[TicketId, ...]
    pinned: bool
    is_leaving: bool
    """No new session is granted here: its turn is over, or its checkpoint was replaced."""
    ready_at: float
    """When its load is, or was, expected to be done; of one that is queued, less the evictions."""
    last_used: float
    service_s: float
    """How long its sessions last."""
    load_s: float = 0.0
    """What its load was, or is, expected to take."""
