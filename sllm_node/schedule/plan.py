"""Who gets device memory next: which models to load, to evict, and to close. A pure function.

Waiting models are looked at one after another: first those with a ticket overdue (waiting for
`max_wait_s` or longer), oldest first, then by priority, then by age. Each takes what it needs from,
in this order, free memory, memory that becomes free anyway (evictions under way), idle models, and
running models, which it *closes*: their new sessions queue until the running ones have ended, then
they are idle and are evicted. An overdue ticket may close any model that isn't pinned, another one
only models of lower priority. So a stream of requests for a resident model is served as a group,
but for `max_wait_s` at most while another model waits.

What a model was promised is not given to those behind it. A model that finds no way now is passed
over, unless it is overdue: then those behind it wait too, or they would take its room for ever.
Nothing is remembered between two plans but which models are closed, and those are preferred as
victims, so that a plan doesn't waver while it is carried out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sllm_node.core.types import ModelState
from sllm_node.schedule.record import ModelRecord


@dataclass(slots=True)
class Plan:
    """What is to be done now; `closed` is the whole set, not a change."""

    loads: list[ModelRecord] = field(default_factory=list)
    evictions: list[ModelRecord] = field(default_factory=list)
    closed: list[ModelRecord] = field(default_factory=list)


def make_plan(records: Iterable[ModelRecord], capacity: int, now: float, max_wait_s: float) -> Plan:
    """Return the plan for `capacity` bytes of device memory."""
    records = list(records)
    room = _Room(records, capacity)
    queued = [record for record in records if record.state is ModelState.QUEUED]
    for record in sorted(queued, key=lambda record: _rank(record, now, max_wait_s)):
        is_overdue = record.is_overdue(now, max_wait_s)
        if not room.place(record, is_overdue=is_overdue) and is_overdue:
            break
    return room.plan


def _rank(record: ModelRecord, now: float, max_wait_s: float) -> tuple[bool, int, float, int]:
    oldest = record.oldest
    age = (oldest.arrived, oldest.ticket.number)
    if record.is_overdue(now, max_wait_s):
        return (False, 0, *age)
    return (True, -record.waiting_priority, *age)


def _idle_order(record: ModelRecord) -> tuple[bool, float, str]:
    """Order idle models as victims: those kept for ever last, else the least recently used first."""
    return (record.deadline is None, record.last_used, record.model)


def _busy_order(record: ModelRecord) -> tuple[bool, int, float, str]:
    return (not record.is_closed, record.highest_priority, record.last_used, record.model)


class _Room:
    """Device memory while a plan is made."""

    def __init__(self, records: Sequence[ModelRecord], capacity: int) -> None:
        self.plan = Plan()
        self._free = capacity - sum(r.device_bytes for r in records if r.is_on_device)
        assert self._free >= 0
        leaving = sum(r.device_bytes for r in records if r.state is ModelState.EVICTING)
        self._promisable = self._free + leaving
        """Bytes free now or by evictions under way, less those promised."""
        ready = [r for r in records if r.state is ModelState.READY and not r.pinned]
        self._idle = sorted((r for r in ready if r.is_idle), key=_idle_order)
        self._busy = sorted((r for r in ready if not r.is_idle), key=_busy_order)

    def place(self, record: ModelRecord, *, is_overdue: bool) -> bool:
        """Plan for `record` and tell whether there was a way."""
        needed = record.device_bytes
        shortage = needed - self._promisable
        if shortage > 0:
            victims = self._victims(record, shortage, is_overdue=is_overdue)
            if not victims:
                return False
            self._give_up(victims)
        elif needed <= self._free:
            self._free -= needed
            self.plan.loads.append(record)
        self._promisable -= needed
        return True

    def _victims(
        self, record: ModelRecord, shortage: int, *, is_overdue: bool
    ) -> list[ModelRecord]:
        """Return models that together hold `shortage` bytes, no more of them than needed."""
        priority = record.waiting_priority
        closable = [r for r in self._busy if is_overdue or r.highest_priority < priority]
        chosen: list[ModelRecord] = []
        gained = 0
        for victim in [*self._idle, *closable]:
            if gained >= shortage:
                break
            chosen.append(victim)
            gained += victim.device_bytes
        if gained < shortage:
            return []
        for victim in reversed(chosen.copy()):
            if gained - victim.device_bytes >= shortage:
                chosen.remove(victim)
                gained -= victim.device_bytes
        return chosen

    def _give_up(self, victims: list[ModelRecord]) -> None:
        for victim in victims:
            self._promisable += victim.device_bytes
            if victim.is_idle:
                self._idle.remove(victim)
                self.plan.evictions.append(victim)
            else:
                self._busy.remove(victim)
                self.plan.closed.append(victim)
