"""Why a ticket is refused, and about how long it would wait: answers only, nothing is done here."""

from collections.abc import Iterator, Mapping
from typing import Final

from sllm_node.core.config import ScheduleConfig
from sllm_node.core.errors import (
    ModelTooLargeError,
    NodeFullError,
    PinnedMemoryError,
    QueueTimeoutError,
    SllmError,
)
from sllm_node.core.types import ModelState
from sllm_node.schedule.actions import Ticket
from sllm_node.schedule.plan import shortage
from sllm_node.schedule.record import ModelRecord
from sllm_node.schedule.roster import Roster

_LOADS: Final = (ModelState.QUEUED, ModelState.LOADING)


class Refusals:
    """What those on a roster, or about to be, are told."""

    def __init__(
        self,
        roster: Roster,
        config: ScheduleConfig,
        capacities: Mapping[str, int],
        max_sessions: int,
    ) -> None:
        self._roster = roster
        self._config = config
        self._capacities = capacities
        self._max_sessions = max_sessions

    def of(self, record: ModelRecord, ticket: Ticket) -> SllmError | None:
        """Return why a new ticket is refused, or None."""
        if (lack := shortage(ticket.shares, self._capacities)) is not None:
            return ModelTooLargeError(ticket.model, *lack)
        waiting, limit = sum(map(self._queued, self._roster)), self._config.max_queue
        if self._is_open(record) or waiting < limit:
            return None
        wait_s = self._expected_wait_s(record, ticket.device_bytes, ticket.load_s)
        return NodeFullError(waiting, limit, wait_s)

    def of_many(
        self, record: ModelRecord, ticket: Ticket, count: int, *, begins: bool
    ) -> SllmError | None:
        """Return why `count` tickets like this new one would not all be taken, if that is for the queue.

        `begins`: a load of the model begins with the first of them.
        """
        waiting, limit = sum(map(self._queued, self._roster)), self._config.max_queue
        places, slots = max(0, limit - waiting), 0
        if self._is_open(record):
            slots = self._max_sessions - len(record.running)
        elif places and (begins or self._is_coming(record)):
            others = 0 if record.is_hinted else record.waiting
            slots = max(0, self._max_sessions - others)
        if count <= places + slots or shortage(ticket.shares, self._capacities) is not None:
            return None
        wait_s = self._expected_wait_s(record, ticket.device_bytes, ticket.load_s)
        return NodeFullError(waiting, limit, wait_s, count)

    def overdue(self, record: ModelRecord, now: float) -> SllmError | None:
        """Return why the oldest waiting ticket is refused, if it has waited for as long as anyone may."""
        if not record.waiting or now < record.oldest.arrived + self._config.queue_timeout_s:
            return None
        wait_s = self._expected_wait_s(record, record.device_bytes, record.load_s)
        return QueueTimeoutError(record.model, now - record.oldest.arrived, wait_s)

    def hopeless(self) -> Iterator[tuple[ModelRecord, SllmError]]:
        """Yield who waits and can't fit beside the pinned ones, and why."""
        pins = [r for r in self._roster if r.is_held]
        left = {
            name: size - sum(pin.bytes_on(name) for pin in pins)
            for name, size in self._capacities.items()
        }
        for record in self._roster:
            lack = shortage(record.shares, left) if record.state is ModelState.QUEUED else None
            if lack is not None:
                names = tuple(pin.model for pin in pins)
                yield record, PinnedMemoryError(record.model, *lack, names)

    def _queued(self, record: ModelRecord) -> int:
        """Return how many tickets wait for more than a load on its way that has a slot for them.

        So a model takes as many sessions at once before its load as after it.
        """
        is_coming = self._is_coming(record)
        return max(0, record.waiting - self._max_sessions) if is_coming else record.waiting

    def _is_coming(self, record: ModelRecord) -> bool:
        return record.state is ModelState.LOADING or bool(record.planned)

    def _is_open(self, record: ModelRecord) -> bool:
        """Tell whether a session of this model would be granted at once."""
        return (
            record.state is ModelState.READY
            and not (record.is_closed or record.is_stale or record.waiting)
            and len(record.running) < self._max_sessions
        )

    def _expected_wait_s(self, record: ModelRecord, size: int, load_s: float) -> float:
        """Return about how long a request of this model would wait now: q + n / b, and its turns.

        Loads go one after another through the same disk and link; sessions of a full model leave
        one after another.
        """
        turns = record.waiting // self._max_sessions
        wait_s = turns * record.service_s.value
        if record.state is ModelState.READY and not record.is_closed:
            return max(1.0, wait_s + record.service_s.value / self._max_sessions)
        others = [r for r in self._roster if r.state in _LOADS and r is not record]
        queue_s = sum(other.load_s for other in others)
        if self._roster.device_bytes + size > sum(self._capacities.values()):
            busy = (r.service_s.value for r in self._roster if r.running)
            queue_s += min(busy, default=0.0)
        return max(1.0, wait_s + queue_s + load_s)
