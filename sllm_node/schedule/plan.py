"""Who gets device memory next: which models to load where, to evict, to close. A pure function.

Waiting models are looked at one after another: first those with a ticket overdue (waiting for
`max_wait_s` or longer), oldest first, then by priority, then by age. Each takes what it needs from,
in this order, free memory, memory that becomes free anyway (evictions under way), idle models, and
running models, which it *closes*: their new sessions queue until the running ones have ended, then
they are idle and are evicted. An overdue ticket may close any model that isn't pinned, another one
only models of lower priority, or those whose sessions move to other nodes for it (`promised`; such a
model goes before others of its priority). So a stream of requests for a resident model is served as a group,
but for `max_wait_s` at most while another model waits.

With several devices, a model that fits on one goes where least is disturbed: where it is free of
victims, else where they are idle, else where they were used longest ago; of equal ones to where it
was last (part of it may still lie there), else to one that has the room now and need not be emptied
first, else to the one with most room. One that is split has its devices given.

A model that has its room as soon as evictions end, and waits for no session, is told apart (`coming`).
What a model was promised is not given to those behind it. A model that finds no way now is passed
over, unless it is overdue: then those behind it wait too, or they would take its room for ever.
A model that only hints wait for comes last of all. It takes what is free, or what evictions leave that
wait for no session, and closes nobody; and if others take its place, it finds no way. Its load under way
is aborted for those who find no room beside it with idle models gone.
Nothing is remembered between two plans but which models are closed, and those are preferred as
victims, so that a plan doesn't waver while it is carried out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sllm_node.core.types import ModelState, Share
from sllm_node.schedule.record import ModelRecord


@dataclass(slots=True)
class Plan:
    """What is to be done now; `closed` is the whole set, not a change."""

    loads: list[tuple[ModelRecord, tuple[str, ...]]] = field(default_factory=list)
    """Each with the devices of its shares."""
    coming: list[tuple[ModelRecord, tuple[str, ...]]] = field(default_factory=list)
    """The same, once evictions that are under way or begin now have ended."""
    evictions: list[ModelRecord] = field(default_factory=list)
    aborts: list[ModelRecord] = field(default_factory=list)
    """Loads under way that only hints wait for."""
    closed: list[ModelRecord] = field(default_factory=list)


_Cost = tuple[bool, bool, bool, bool, float, bool, bool, int]


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to place a model."""

    devices: tuple[str, ...]
    victims: list[ModelRecord]
    cost: _Cost


def make_plan(
    records: Iterable[ModelRecord], capacities: Mapping[str, int], now: float, max_wait_s: float
) -> Plan:
    """Return the plan for devices of so many bytes each."""
    records = list(records)
    room = _Room(records, capacities)
    queued = [record for record in records if record.state is ModelState.QUEUED]
    for record in sorted(queued, key=lambda record: _rank(record, now, max_wait_s)):
        is_overdue = record.is_overdue(now, max_wait_s)
        if not room.place(record, is_overdue=is_overdue) and is_overdue:
            break
    return room.plan


def choices(record: ModelRecord, capacities: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Return every set of devices that the record's shares could ever lie on."""
    fixed = tuple(share.device for share in record.shares if share.device is not None)
    if fixed:
        sizes = dict(zip(fixed, (share.size for share in record.shares), strict=True))
        return [fixed] if all(sizes[name] <= capacities.get(name, 0) for name in fixed) else []
    return [(name,) for name, size in capacities.items() if record.device_bytes <= size]


def may_begin(plan: Plan, record: ModelRecord) -> bool:
    """Tell whether the plan loads it now, or as soon as evictions have ended."""
    return any(found is record for found, _ in (*plan.loads, *plan.coming))


def shortage(shares: Sequence[Share], rooms: Mapping[str, int]) -> tuple[int, int] | None:
    """Return size and room of the first share that has no place in `rooms`; None: all have one."""
    largest = max(rooms.values())
    for share in shares:
        room = largest if share.device is None else rooms.get(share.device, 0)
        if share.size > room:
            return share.size, room
    return None


def _rank(record: ModelRecord, now: float, max_wait_s: float) -> tuple[int, int, bool, float, int]:
    foremost = record.foremost
    age = (foremost.arrived, foremost.ticket.number)
    if record.is_hinted:
        return (2, 0, False, *age)
    if record.is_overdue(now, max_wait_s):
        return (0, 0, False, *age)
    return (1, -record.waiting_priority, not record.promised, *age)


def _idle_order(record: ModelRecord) -> tuple[bool, float, str]:
    """Order idle models as victims: those kept for ever last, else the least recently used first."""
    return (record.deadline is None, record.last_used, record.model)


def _busy_order(record: ModelRecord) -> tuple[bool, int, float, str]:
    return (not record.is_closed, record.highest_priority, record.last_used, record.model)


def _youngest_first(record: ModelRecord) -> float:
    return -record.oldest.arrived


def _leaves_at_once(victim: ModelRecord) -> bool:
    """Tell whether it waits for no session: it is idle, or its load is aborted."""
    return victim.is_idle or victim.state is ModelState.LOADING


class _Room:
    """Device memory while a plan is made."""

    def __init__(self, records: Sequence[ModelRecord], capacities: Mapping[str, int]) -> None:
        self.plan = Plan()
        self._capacities = capacities
        self._free = {
            name: size - sum(r.bytes_on(name) for r in records) for name, size in capacities.items()
        }
        assert all(size >= 0 for size in self._free.values())
        leaving = [r for r in records if r.state is ModelState.EVICTING]
        self._promisable = {
            name: size + sum(r.bytes_on(name) for r in leaving) for name, size in self._free.items()
        }
        """Bytes free now or by evictions under way, less those promised."""
        self._soon = dict(self._promisable)
        """The same, without what closed models will leave."""
        ready = [r for r in records if r.state is ModelState.READY and not r.pinned]
        self._idle = sorted((r for r in ready if r.is_idle), key=_idle_order)
        self._busy = sorted((r for r in ready if not r.is_idle), key=_busy_order)
        loading = (r for r in records if r.state is ModelState.LOADING and not r.pinned)
        self._hinted = sorted((r for r in loading if r.is_hinted), key=_youngest_first)

    def place(self, record: ModelRecord, *, is_overdue: bool) -> bool:
        """Plan for `record` and tell whether there was a way."""
        ways = self._ways(record, is_overdue=is_overdue)
        best = min(ways, key=lambda way: way.cost, default=None)
        if best is None:
            return False
        needs = self._needs(record, best.devices)
        self._give_up(best.victims)
        if not best.victims and all(size <= self._free[name] for name, size in needs.items()):
            for name, size in needs.items():
                self._free[name] -= size
            self.plan.loads.append((record, best.devices))
        elif all(_leaves_at_once(v) for v in best.victims) and all(
            size <= self._soon[name] for name, size in needs.items()
        ):
            self.plan.coming.append((record, best.devices))
        for name, size in needs.items():
            self._promisable[name] -= size
            self._soon[name] -= size
        return True

    def _needs(self, record: ModelRecord, devices: tuple[str, ...]) -> dict[str, int]:
        return dict(zip(devices, (share.size for share in record.shares), strict=True))

    def _ways(self, record: ModelRecord, *, is_overdue: bool) -> Iterator[_Way]:
        room = self._soon if record.is_hinted else self._promisable
        for devices in choices(record, self._capacities):
            needs = self._needs(record, devices)
            short = {name: size - room[name] for name, size in needs.items() if size > room[name]}
            victims = self._victims(record, short, is_overdue=is_overdue)
            if victims is not None:
                yield _Way(devices, victims, self._cost(record, needs, victims))

    def _cost(
        self, record: ModelRecord, needs: Mapping[str, int], victims: list[ModelRecord]
    ) -> _Cost:
        busy = [victim for victim in victims if not _leaves_at_once(victim)]
        aborts = any(victim.state is ModelState.LOADING for victim in victims)
        is_new = any(not victim.is_closed for victim in busy)  # else the plan goes on as it was
        newest = max((victim.last_used for victim in victims), default=0.0)
        waits = any(size > self._free[name] for name, size in needs.items())
        leaving = sum(victim.bytes_on(name) for victim in victims for name in needs)
        room = leaving + sum(self._promisable[name] for name in needs)
        elsewhere = tuple(needs) != record.devices
        return (is_new, bool(busy), aborts, bool(victims), newest, elsewhere, waits, -room)

    def _victims(
        self, record: ModelRecord, short: Mapping[str, int], *, is_overdue: bool
    ) -> list[ModelRecord] | None:
        """Return models that together hold what is short, no more of them than needed."""
        if not short:
            return []
        priority = record.waiting_priority
        closable = [
            busy for busy in self._busy
            if is_overdue or busy.highest_priority < priority or busy.model in record.promised
        ]  # fmt: skip
        left = dict(short)
        chosen: list[ModelRecord] = []
        for victim in [*self._idle, *([] if record.is_hinted else self._hinted + closable)]:
            if any(size > 0 and victim.bytes_on(name) for name, size in left.items()):
                chosen.append(victim)
                left = {name: size - victim.bytes_on(name) for name, size in left.items()}
        if any(size > 0 for size in left.values()):
            return None
        for victim in reversed(chosen.copy()):
            if all(left[name] + victim.bytes_on(name) <= 0 for name in left):
                chosen.remove(victim)
                left = {name: size + victim.bytes_on(name) for name, size in left.items()}
        return chosen

    def _give_up(self, victims: list[ModelRecord]) -> None:
        for victim in victims:
            for name in self._promisable:
                self._promisable[name] += victim.bytes_on(name)
                self._soon[name] += victim.bytes_on(name) if _leaves_at_once(victim) else 0
            if victim.is_idle:
                self._idle.remove(victim)
                self.plan.evictions.append(victim)
            elif victim.state is ModelState.LOADING:
                self._hinted.remove(victim)
                self.plan.aborts.append(victim)
            else:
                self._busy.remove(victim)
                self.plan.closed.append(victim)
