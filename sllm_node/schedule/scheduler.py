"""Who uses the device: the node's decisions about requests, loads and evictions, as one pure object.

Every `on_x` takes an event and the time, changes the state, and returns actions for the driver.
`next_timer` tells when `on_timer` wants to be called. Theory of operation, on top of the states in
`record` and the division of memory in `plan`:

- A session of a model that is on the device and open is granted at once while slots are free.
- Otherwise it queues. After every event `_dispatch` brings everything up to date: refuse what is
  overdue or hopeless, grant what can run, evict what has been idle for long enough, abort loads that
  nobody wants, then make a plan and carry it out. So no event needs a case for every state.
- A load that ends grants the tickets that waited for it before any other model's turn is
  considered: each load serves somebody, so turns make progress and nobody starves.
- Eviction takes time (sessions' memory is torn down): the bytes count until on_evicted.
- A hint's ticket never stands before another one: it ends once others take the room it counted on, and the
  load that it began is aborted for them, if nobody else waits for it.
- A load that fails refuses all who waited; the next request tries again.
- A pin keeps a replica from being evicted for others or for idleness. It doesn't keep one that is
  broken or whose checkpoint was replaced.
"""

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from sllm_node.core.config import ModelConfig, ScheduleConfig
from sllm_node.core.errors import (
    CancelledByOperatorError,
    DrainingError,
    ModelBusyError,
    ModelTooLargeError,
    NodeFullError,
    PinnedMemoryError,
    QueueTimeoutError,
    SllmError,
)
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import (
    AbortLoad,
    Action,
    Evict,
    GiveWay,
    Grant,
    ModelView,
    Refuse,
    ReplicaView,
    StartLoad,
    Stop,
    Ticket,
    TicketId,
)
from sllm_node.schedule.plan import Plan, make_plan, may_begin, shortage
from sllm_node.schedule.record import ModelEvent, ModelRecord

ELSEWHERE_S: Final = 1.0
"""Whoever a drain turns away may ask another node so soon; this one takes nothing until a restart or `undrain`."""
_LOADS: Final = (ModelState.QUEUED, ModelState.LOADING)


class Scheduler:
    """The models of one node on devices of so many bytes each."""

    def __init__(
        self,
        config: ScheduleConfig,
        models: Mapping[str, ModelConfig],
        *,
        capacities: Mapping[str, int],
        max_sessions: int,
        drain_s: float,
    ) -> None:
        self._config = config
        self._models = models
        self._capacities = capacities
        self._max_sessions = max_sessions
        self._drain_s = drain_s
        self._records: dict[ModelId, ModelRecord] = {}
        self._tickets: dict[TicketId, ModelRecord] = {}
        self._scaled: AbstractSet[ModelId] = frozenset()
        self._is_draining = False
        self._now = 0.0

    # --- what can be asked --------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Device memory of the models that are on it, coming or leaving."""
        return sum(r.device_bytes for r in self._records.values() if r.is_on_device)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the node stops."""
        return self._is_draining

    @property
    def waiting(self) -> int:
        """Tickets of all models that wait."""
        return sum(record.waiting for record in self._records.values())

    @property
    def is_crowded(self) -> bool:
        """Whether somebody, and not only a hint, waits for more than a load under way."""
        waits = (r for r in self._records.values() if r.waiting and not r.is_hinted)
        return any(record.state is not ModelState.LOADING for record in waits)

    @property
    def running(self) -> int:
        """Granted sessions of all models."""
        return len(self._tickets) - self.waiting

    def running_on(self, device: str) -> int:
        """Return how many sessions run on `device`; asked for every copy of a load, so it is quick."""
        busy = (record for record in self._records.values() if record.running)
        return sum(len(record.running) for record in busy if device in record.devices)

    def models(self) -> tuple[ModelId, ...]:
        """Return the models that were asked for so far."""
        return tuple(self._records)

    def replicas(self) -> tuple[ReplicaView, ...]:
        """Return the models that take device memory, and those that do once evictions have ended."""
        found = (r for r in self._records.values() if r.is_on_device or r.planned)
        return tuple(record.replica_view() for record in found)

    def view(self, model: ModelId) -> ModelView:
        """Return how `model` stands."""
        return (self._records.get(model) or self._new_record(model)).view()

    def can_begin(self, ticket: Ticket, now: float) -> bool:
        """Tell whether the load of an idle model would begin with this ticket, at once or after evictions."""
        record = self._new_record(ticket.model)
        if (known := self._records.get(ticket.model)) is not None:
            assert known.state is ModelState.IDLE
            record.devices = known.devices
        record.enqueue(ticket, now)
        record.happen(ModelEvent.WANTED)
        others = (r for r in self._records.values() if r.model != ticket.model)
        return may_begin(self._plan((*others, record), now), record)

    def next_timer(self) -> float | None:
        """Return when `on_timer` is to be called, if ever; later events may change it."""
        times = [time for record in self._records.values() for time in self._timers(record)]
        return min(times, default=None)

    # --- requests -----------------------------------------------------------------------------

    def on_request(self, ticket: Ticket, now: float) -> list[Action]:
        """Take a new ticket: it is granted or refused at once, or it waits."""
        assert ticket.number not in self._tickets
        record = self._record(ticket.model)
        error = self._refusal(record, ticket)
        if error is not None:
            return [Refuse(ticket.number, error), *self._dispatch(now)]
        if not ticket.is_session and record.state is ModelState.READY and not record.is_stale:
            return [Grant(ticket.number, ticket.model), *self._dispatch(now)]
        record.enqueue(ticket, now)
        self._tickets[ticket.number] = record
        return self._dispatch(now)

    def on_cancel(self, number: TicketId, now: float) -> list[Action]:
        """Forget a waiting ticket."""
        self._tickets.pop(number).remove(number)
        return self._dispatch(now)

    def on_finished(self, number: TicketId, now: float) -> list[Action]:
        """Take note that a granted session ended, however it did."""
        self._tickets.pop(number).finish(number, now)
        return self._dispatch(now)

    # --- loads and evictions ------------------------------------------------------------------

    def on_loaded(self, model: ModelId, now: float) -> list[Action]:
        """Take note that `model` is on the device and can serve."""
        record = self._records[model]
        record.happen(ModelEvent.LOADED)
        record.arrive(now)
        actions: list[Action] = []
        for waiter in record.waiters():
            ticket = waiter.ticket
            if not (ticket.is_session or record.is_stale):
                record.remove(ticket.number)
                del self._tickets[ticket.number]
                actions.append(Grant(ticket.number, model))
        return actions + self._dispatch(now)

    def on_load_failed(self, model: ModelId, error: SllmError, now: float) -> list[Action]:
        """Take note that the load of `model` gave up and holds no device memory any more."""
        record = self._records[model]
        record.happen(ModelEvent.LOAD_FAILED)
        record.leave_device()
        return [*self._refuse_all(record, error), *self._dispatch(now)]

    def on_evicted(self, model: ModelId, now: float) -> list[Action]:
        """Take note that the device memory of `model` is free: after Evict or AbortLoad."""
        record = self._records[model]
        record.happen(ModelEvent.EVICTED)
        record.leave_device()
        return self._dispatch(now)

    def on_unused(self, model: ModelId, now: float) -> list[Action]:
        """Take note that nobody is to come for whom `model` was loaded: its keep-alive counts, also 0."""
        record = self._record(model)
        if record.is_idle and record.deadline is None:
            record.count_down(now)
        return self._dispatch(now)

    def on_failed(self, model: ModelId, now: float) -> list[Action]:
        """Take note that a session of `model` ended because its replica failed.

        Nobody trusts a replica that failed last: when no other session runs on it, it is evicted, so
        that the next request gets a fresh one. Those that still run are not disturbed.
        """
        record = self._record(model)
        if not record.is_idle:
            return []
        return [self._evict(record, "failed"), *self._dispatch(now)]

    def on_replaced(self, model: ModelId, now: float) -> list[Action]:
        """Take note that the checkpoint of `model` on disk is gone or another one.

        Running sessions finish on the old one; new ones wait until it has left the device.
        """
        record = self._record(model)
        record.is_stale = record.state in (ModelState.LOADING, ModelState.READY)
        return self._dispatch(now)

    # --- the cluster ------------------------------------------------------------------------------

    def on_scaled(self, models: AbstractSet[ModelId], now: float) -> list[Action]:
        """Take which models the cluster scales; of those that it does no more, keep-alives begin anew."""
        self._scaled = models
        for record in self._records.values():
            was_scaled, record.is_scaled = record.is_scaled, record.model in models
            if was_scaled and not record.is_scaled and record.is_idle:
                record.count_down(now)
        return self._dispatch(now)

    def on_retire(self, model: ModelId, now: float) -> list[Action]:
        """Let `model` leave once its sessions have ended; who asks for it meanwhile loads it anew.

        Raises:
            ModelBusyError: it is pinned.
        """
        record = self._record(model)
        if record.is_held:
            raise ModelBusyError(model, "is pinned; unpin it first")
        record.is_retired = record.state in (ModelState.LOADING, ModelState.READY)
        record.is_stale = record.is_stale or record.is_retired
        return self._dispatch(now)

    def on_promise(
        self, model: ModelId, others: AbstractSet[ModelId], now: float
    ) -> list[Action] | None:
        """Let `others` take no new sessions, as theirs move to other nodes, and `model` have their room.

        It ends when `model` loads, when nobody waits for it, or with no `others`. None: it can't be, as
        it does not wait, or one of them is pinned or of a higher priority.
        """
        record = self._record(model)
        held = [self._record(other) for other in others]
        if held and (record.state is not ModelState.QUEUED or any(
            r.pinned or r.highest_priority > record.waiting_priority for r in held
        )):  # fmt: skip
            return None
        record.promised = frozenset(others)
        return self._dispatch(now)

    # --- the operator -------------------------------------------------------------------------

    def on_pin(self, model: ModelId, now: float) -> list[Action]:
        """Keep `model` on the device once it is there; requests that can't fit then are refused."""
        self._record(model).pinned = True
        return self._dispatch(now)

    def on_unpin(self, model: ModelId, now: float) -> list[Action]:
        """Let `model` be evicted again; its keep-alive time begins anew."""
        record = self._record(model)
        record.pinned = False
        if record.is_idle:
            record.count_down(now)
        return self._dispatch(now)

    def on_unload_request(self, model: ModelId, now: float, *, force: bool) -> list[Action]:
        """Take `model` off the device; `force` ends its sessions and those who wait.

        Raises:
            ModelBusyError: it is pinned, or in use and not forced.
        """
        record = self._record(model)
        if record.is_held:
            raise ModelBusyError(model, "is pinned; unpin it first")
        if (record.running or record.waiting) and not force:
            raise ModelBusyError(
                model,
                f"is in use ({len(record.running)} sessions run, {record.waiting} requests wait); "
                "unload it with force to end them",
            )
        error = CancelledByOperatorError("the model was unloaded")
        actions = [*self._stop_all(record, error, now), *self._refuse_all(record, error)]
        if record.state is ModelState.READY:
            actions.append(self._evict(record, "operator"))
        return actions + self._dispatch(now)

    def on_drain(self, now: float) -> list[Action]:
        """Refuse new requests and those whose model is neither on the device nor coming."""
        self._is_draining = True
        return self._dispatch(now)

    def on_undrain(self, now: float) -> list[Action]:
        """Take new requests again."""
        self._is_draining = False
        return self._dispatch(now)

    def on_timer(self, now: float) -> list[Action]:
        """Do what time alone brings about."""
        return self._dispatch(now)

    # --- deciding -----------------------------------------------------------------------------

    def _dispatch(self, now: float) -> list[Action]:
        """Bring everything up to date after an event."""
        self._now = now
        actions: list[Action] = []
        for record in self._records.values():
            actions += self._grants(record)  # first: one that waited elsewhere may come overdue
            actions += self._refuse_overdue(record)
            actions += self._refuse_drained(record)
            actions += [*self._tidy(record), *self._refuse_drained(record)]  # it may leave by now
        actions += self._refuse_hopeless()
        actions += self._follow_plan()
        while refusals := list(self._refuse_hopeless()):  # beside a pinned model that comes now
            actions += refusals
            actions += self._follow_plan()
        for record in self._records.values():
            actions += self._grants(record)
        return actions

    def _tidy(self, record: ModelRecord) -> Iterator[Action]:
        """Bring the state of one model up to date."""
        if record.state is ModelState.IDLE and record.waiting:
            record.happen(ModelEvent.WANTED)
        elif record.state is ModelState.QUEUED and not record.waiting:
            record.happen(ModelEvent.UNWANTED)
        elif record.state is ModelState.LOADING and not record.waiting and not record.pinned:
            record.happen(ModelEvent.LOAD_ABORTED)
            yield AbortLoad(record.model)
        elif record.is_idle and record.is_stale:
            yield self._evict(record, "retired" if record.is_retired else "replaced")
        elif (leaves_at := record.leaves_at) is not None and leaves_at <= self._now:
            yield self._evict(record, "keep_alive")

    def _grants(self, record: ModelRecord) -> Iterator[Action]:
        """Grant tickets of a model that serves, while slots are free."""
        if record.state is not ModelState.READY or record.is_closed or record.is_stale:
            return
        while record.waiting and len(record.running) < self._max_sessions:
            waiter = record.take_next(self._now, self._config.max_wait_s)
            record.start(waiter.ticket, self._now)
            yield Grant(waiter.ticket.number, record.model)

    def _follow_plan(self) -> Iterator[Action]:
        records = self._records.values()
        plan = self._plan(records, self._now)
        coming = {record.model: devices for record, devices in plan.coming}
        for record in records:
            record.is_closed = record in plan.closed
            record.plan(coming.get(record.model, ()), self._now)
        for record in plan.evictions:
            yield self._evict(record, "room")
        for record in plan.aborts:
            yield from self._give_way(record)
            record.happen(ModelEvent.LOAD_ABORTED)
            yield AbortLoad(record.model)
        for record, devices in plan.loads:
            record.devices = devices
            record.ready_at = self._now + record.load_s
            record.happen(ModelEvent.LOAD_STARTED)
            yield StartLoad(record.model, devices)
        for record in records:
            if record.state is ModelState.QUEUED and record.is_hinted and not record.planned:
                yield from self._give_way(record)
                record.happen(ModelEvent.UNWANTED)

    def _plan(self, records: Iterable[ModelRecord], now: float) -> Plan:
        return make_plan(records, self._capacities, now, self._config.max_wait_s)

    def _give_way(self, record: ModelRecord) -> Iterator[Action]:
        """End the hints of a model whose room others take."""
        for waiter in record.waiters():
            number = waiter.ticket.number
            record.remove(number)
            del self._tickets[number]
            yield GiveWay(number, record.model)

    def _evict(self, record: ModelRecord, reason: str) -> Action:
        assert record.is_idle
        record.happen(ModelEvent.EVICTION_STARTED)
        return Evict(record.model, reason)

    # --- refusing -----------------------------------------------------------------------------

    def _refusal(self, record: ModelRecord, ticket: Ticket) -> SllmError | None:
        """Return why a new ticket is refused, or None."""
        if self._is_draining:
            return DrainingError(min(self._drain_s, ELSEWHERE_S))
        if (lack := shortage(ticket.shares, self._capacities)) is not None:
            return ModelTooLargeError(ticket.model, *lack)
        if self._is_open(record) or self.waiting < self._config.max_queue:
            return None
        wait_s = self._expected_wait_s(record, ticket.device_bytes, ticket.load_s)
        return NodeFullError(self.waiting, self._config.max_queue, wait_s)

    def _is_open(self, record: ModelRecord) -> bool:
        """Tell whether a session of this model would be granted at once."""
        return (
            record.state is ModelState.READY
            and not (record.is_closed or record.is_stale or record.waiting)
            and len(record.running) < self._max_sessions
        )

    def _refuse_overdue(self, record: ModelRecord) -> Iterator[Action]:
        """Refuse tickets that have waited for as long as anyone may."""
        limit_s = self._config.queue_timeout_s
        while record.waiting and self._now >= record.oldest.arrived + limit_s:
            waiter = record.oldest
            wait_s = self._expected_wait_s(record, record.device_bytes, record.load_s)
            error = QueueTimeoutError(record.model, self._now - waiter.arrived, wait_s)
            yield self._refuse(record, waiter.ticket.number, error)

    def _refuse_drained(self, record: ModelRecord) -> list[Action]:
        """Refuse those whose model does not come any more, since the node drains."""
        comes = not self._is_draining or record.state in (ModelState.LOADING, ModelState.READY)
        return [] if comes else self._refuse_all(record, DrainingError(self._drain_s))

    def _refuse_hopeless(self) -> Iterator[Action]:
        """Refuse those whose model can't fit beside the pinned ones."""
        pins = [r for r in self._records.values() if r.is_held]
        left = {
            name: size - sum(pin.bytes_on(name) for pin in pins)
            for name, size in self._capacities.items()
        }
        for record in self._records.values():
            lack = shortage(record.shares, left) if record.state is ModelState.QUEUED else None
            if lack is not None:
                names = tuple(pin.model for pin in pins)
                error = PinnedMemoryError(record.model, *lack, names)
                yield from self._refuse_all(record, error)
                record.happen(ModelEvent.UNWANTED)

    def _refuse_all(self, record: ModelRecord, error: SllmError) -> list[Action]:
        return [self._refuse(record, w.ticket.number, error) for w in record.waiters()]

    def _refuse(self, record: ModelRecord, number: TicketId, error: SllmError) -> Action:
        record.remove(number)
        del self._tickets[number]
        return Refuse(number, error)

    def _stop_all(self, record: ModelRecord, error: SllmError, now: float) -> list[Action]:
        stopped = list(record.running)
        for number in stopped:
            self._tickets.pop(number).finish(number, now)
        return [Stop(number, error) for number in stopped]

    # --- looking things up --------------------------------------------------------------------

    def _record(self, model: ModelId) -> ModelRecord:
        record = self._records.get(model)
        if record is None:
            record = self._records[model] = self._new_record(model)
        return record

    def _new_record(self, model: ModelId) -> ModelRecord:
        config = self._models.get(model, ModelConfig())
        wished = config.keep_alive_s
        keep_alive_s = self._config.keep_alive_s if wished is None else wished
        record = ModelRecord(model, config.priority, keep_alive_s, pinned=config.pinned)
        record.is_scaled = model in self._scaled
        return record

    def _timers(self, record: ModelRecord) -> Iterator[float]:
        if record.waiting:
            arrived = record.oldest.arrived
            yield arrived + self._config.queue_timeout_s
            overdue = arrived + self._config.max_wait_s
            if record.state is ModelState.QUEUED and overdue > self._now:
                yield overdue
        if (leaves_at := record.leaves_at) is not None:
            yield leaves_at

    def _expected_wait_s(self, record: ModelRecord, size: int, load_s: float) -> float:
        """Return about how long a request of this model would wait now: q + n / b, and its turns.

        Loads go one after another through the same disk and link; sessions of a full model leave
        one after another.
        """
        turns = record.waiting // self._max_sessions
        wait_s = turns * record.service_s.value
        if record.state is ModelState.READY and not record.is_closed:
            return max(1.0, wait_s + record.service_s.value / self._max_sessions)
        others = [r for r in self._records.values() if r.state in _LOADS and r is not record]
        queue_s = sum(other.load_s for other in others)
        if self.device_bytes + size > sum(self._capacities.values()):
            busy = (r.service_s.value for r in self._records.values() if r.running)
            queue_s += min(busy, default=0.0)
        return max(1.0, wait_s + queue_s + load_s)
