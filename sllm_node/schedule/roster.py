"""All models that the scheduler was asked for, and all tickets that wait or run, with what can be asked of them."""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

from sllm_node.core.config import ModelConfig
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import ModelView, ReplicaView, Ticket, TicketId
from sllm_node.schedule.record import ModelRecord


class Roster:
    """The records of one node's models, in the order in which they were asked for first."""

    def __init__(self, models: Mapping[str, ModelConfig], keep_alive_s: float) -> None:
        self._models = models
        self._keep_alive_s = keep_alive_s
        self._records: dict[ModelId, ModelRecord] = {}
        self._tickets: dict[TicketId, ModelRecord] = {}
        self._scaled: AbstractSet[ModelId] = frozenset()

    def __iter__(self) -> Iterator[ModelRecord]:
        return iter(self._records.values())

    def known(self, model: ModelId) -> ModelRecord | None:
        """Return what is known of `model`, if it was asked for."""
        return self._records.get(model)

    def record(self, model: ModelId) -> ModelRecord:
        """Return what is known of `model` from now on."""
        record = self._records.get(model)
        if record is None:
            record = self._records[model] = self.new_record(model)
        return record

    def new_record(self, model: ModelId) -> ModelRecord:
        """Return what would be known of `model` if it were asked for now for the first time."""
        config = self._models.get(model, ModelConfig())
        wished = config.keep_alive_s
        keep_alive_s = self._keep_alive_s if wished is None else wished
        record = ModelRecord(model, config.priority, keep_alive_s, pinned=config.pinned)
        record.is_scaled = model in self._scaled
        return record

    # --- tickets ------------------------------------------------------------------------------

    def has(self, number: TicketId) -> bool:
        """Tell whether a ticket waits or runs."""
        return number in self._tickets

    def enqueue(self, record: ModelRecord, ticket: Ticket, now: float) -> None:
        """Let `ticket` wait."""
        record.enqueue(ticket, now)
        self._tickets[ticket.number] = record

    def remove(self, number: TicketId) -> None:
        """Forget a ticket that waits."""
        self._tickets.pop(number).remove(number)

    def finish(self, number: TicketId, now: float) -> None:
        """Take note that a granted session ended."""
        self._tickets.pop(number).finish(number, now)

    # --- the cluster --------------------------------------------------------------------------

    def scale(self, models: AbstractSet[ModelId]) -> list[ModelRecord]:
        """Take which models the cluster scales; return those that it does no more."""
        self._scaled = models
        left = []
        for record in self:
            was_scaled, record.is_scaled = record.is_scaled, record.model in models
            if was_scaled and not record.is_scaled:
                left.append(record)
        return left

    # --- what can be asked --------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Device memory of the models that are on it, coming or leaving."""
        return sum(r.device_bytes for r in self if r.is_on_device)

    @property
    def waiting(self) -> int:
        """Tickets of all models that wait."""
        return sum(record.waiting for record in self)

    @property
    def is_crowded(self) -> bool:
        """Whether somebody, and not only a hint, waits for more than a load under way."""
        waits = (r for r in self if r.waiting and not r.is_hinted)
        return any(record.state is not ModelState.LOADING for record in waits)

    @property
    def running(self) -> int:
        """Granted sessions of all models."""
        return len(self._tickets) - self.waiting

    def running_on(self, device: str) -> int:
        """Return how many sessions run on `device`; asked for every copy of a load, so it is quick."""
        busy = (record for record in self if record.running)
        return sum(len(record.running) for record in busy if device in record.devices)

    def replicas(self) -> tuple[ReplicaView, ...]:
        """Return the models that take device memory, and those that do once evictions have ended."""
        found = (r for r in self if r.is_on_device or r.planned)
        return tuple(record.replica_view() for record in found)

    def view(self, model: ModelId) -> ModelView:
        """Return how `model` stands."""
        return (self._records.get(model) or self.new_record(model)).view()
