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
    SllmError,
)
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import (
    AbortLoad,
    Action,
    Evict,
    GiveWay,
    Grant,
    Refuse,
    StartLoad,
    Stop,
    Ticket,
    TicketId,
)
from sllm_node.schedule.plan import Plan, make_plan, may_begin
from sllm_node.schedule.record import ModelEvent, ModelRecord
from sllm_node.schedule.refusals import Refusals
from sllm_node.schedule.roster import Roster

ELSEWHERE_S: Final = 1.0
"""Whoever a drain turns away may ask another node so soon; this one takes nothing until a restart or `undrain`."""


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
        self.roster: Final = Roster(models, config.keep_alive_s)
        self._config = config
        self._capacities = capacities
        self._max_sessions = max_sessions
        self._drain_s = drain_s
        self._refusals = Refusals(self.roster, config, capacities, max_sessions)
        self._is_draining = False
        self._now = 0.0

    # --- what can be asked (see also the roster) ----------------------------------------------

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the node stops."""
        return self._is_draining

    def can_begin(self, ticket: Ticket, now: float) -> bool:
        """Tell whether the load of an idle model would begin with this ticket, at once or after evictions."""
        record = self.roster.new_record(ticket.model)
        if (known := self.roster.known(ticket.model)) is not None:
            assert known.state is ModelState.IDLE
            record.devices = known.devices
        record.enqueue(ticket, now)
        record.happen(ModelEvent.WANTED)
        others = (r for r in self.roster if r.model != ticket.model)
        return may_begin(self._plan((*others, record), now), record)

    def next_timer(self) -> float | None:
        """Return when `on_timer` is to be called, if ever; later events may change it."""
        times = [time for record in self.roster for time in self._timers(record)]
        return min(times, default=None)

    # --- requests -----------------------------------------------------------------------------

    def on_request(self, ticket: Ticket, now: float) -> list[Action]:
        """Take a new ticket: it is granted or refused at once, or it waits."""
        assert not self.roster.has(ticket.number)
        record = self.roster.record(ticket.model)
        error = self._drained() or self._refusals.of(record, ticket)
        if error is not None:
            return [Refuse(ticket.number, error), *self._dispatch(now)]
        if not ticket.is_session and record.state is ModelState.READY and not record.is_stale:
            return [Grant(ticket.number, ticket.model), *self._dispatch(now)]
        self.roster.enqueue(record, ticket, now)
        return self._dispatch(now)

    def crowding(self, ticket: Ticket, count: int, now: float) -> SllmError | None:
        """Return why `count` new tickets like this one would not all be taken, if that is for the queue."""
        record = self.roster.record(ticket.model)
        begins = record.state is ModelState.IDLE and self.can_begin(ticket, now)
        is_late = self._drained() is not None
        return None if is_late else self._refusals.of_many(record, ticket, count, begins=begins)

    def on_cancel(self, number: TicketId, now: float) -> list[Action]:
        """Forget a waiting ticket."""
        self.roster.remove(number)
        return self._dispatch(now)

    def on_finished(self, number: TicketId, now: float) -> list[Action]:
        """Take note that a granted session ended, however it did."""
        self.roster.finish(number, now)
        return self._dispatch(now)

    # --- loads and evictions ------------------------------------------------------------------

    def on_loaded(self, model: ModelId, now: float) -> list[Action]:
        """Take note that `model` is on the device and can serve."""
        record = self.roster.record(model)
        record.happen(ModelEvent.LOADED)
        record.arrive(now)
        actions: list[Action] = []
        for waiter in record.waiters():
            ticket = waiter.ticket
            if not (ticket.is_session or record.is_stale):
                self.roster.remove(ticket.number)
                actions.append(Grant(ticket.number, model))
        return actions + self._dispatch(now)

    def on_load_failed(self, model: ModelId, error: SllmError, now: float) -> list[Action]:
        """Take note that the load of `model` gave up and holds no device memory any more."""
        record = self.roster.record(model)
        record.happen(ModelEvent.LOAD_FAILED)
        record.leave_device()
        return [*self._refuse_all(record, error), *self._dispatch(now)]

    def on_evicted(self, model: ModelId, now: float) -> list[Action]:
        """Take note that the device memory of `model` is free: after Evict or AbortLoad."""
        record = self.roster.record(model)
        record.happen(ModelEvent.EVICTED)
        record.leave_device()
        return self._dispatch(now)

    def on_unused(self, model: ModelId, now: float) -> list[Action]:
        """Take note that nobody is to come for whom `model` was loaded: its keep-alive counts, also 0."""
        record = self.roster.record(model)
        if record.is_idle and record.deadline is None:
            record.count_down(now)
        return self._dispatch(now)

    def on_failed(self, model: ModelId, now: float) -> list[Action]:
        """Take note that a session of `model` ended because its replica failed.

        Nobody trusts a replica that failed last: when no other session runs on it, it is evicted, so
        that the next request gets a fresh one. Those that still run are not disturbed.
        """
        record = self.roster.record(model)
        if not record.is_idle:
            return []
        return [self._evict(record, "failed"), *self._dispatch(now)]

    def on_replaced(self, model: ModelId, now: float) -> list[Action]:
        """Take note that the checkpoint of `model` on disk is gone or another one.

        Running sessions finish on the old one; new ones wait until it has left the device.
        """
        record = self.roster.record(model)
        record.is_stale = record.state in (ModelState.LOADING, ModelState.READY)
        return self._dispatch(now)

    # --- the cluster ------------------------------------------------------------------------------

    def on_scaled(self, models: AbstractSet[ModelId], now: float) -> list[Action]:
        """Take which models the cluster scales; of those that it does no more, keep-alives begin anew."""
        for record in self.roster.scale(models):
            if record.is_idle:
                record.count_down(now)
        return self._dispatch(now)

    def on_retire(self, model: ModelId, now: float) -> list[Action]:
        """Let `model` leave once its sessions have ended; who asks for it meanwhile loads it anew.

        Raises:
            ModelBusyError: it is pinned.
        """
        record = self.roster.record(model)
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
        record = self.roster.record(model)
        held = [self.roster.record(other) for other in others]
        if held and (record.state is not ModelState.QUEUED or any(
            r.pinned or r.highest_priority > record.waiting_priority for r in held
        )):  # fmt: skip
            return None
        record.promised = frozenset(others)
        return self._dispatch(now)

    # --- the operator -------------------------------------------------------------------------

    def on_pin(self, model: ModelId, now: float) -> list[Action]:
        """Keep `model` on the device once it is there; requests that can't fit then are refused."""
        self.roster.record(model).pinned = True
        return self._dispatch(now)

    def on_unpin(self, model: ModelId, now: float) -> list[Action]:
        """Let `model` be evicted again; its keep-alive time begins anew."""
        record = self.roster.record(model)
        record.pinned = False
        if record.is_idle:
            record.count_down(now)
        return self._dispatch(now)

    def on_unload_request(self, model: ModelId, now: float, *, force: bool) -> list[Action]:
        """Take `model` off the device; `force` ends its sessions and those who wait.

        Raises:
            ModelBusyError: it is pinned, or in use and not forced.
        """
        record = self.roster.record(model)
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
        for record in self.roster:
            actions += self._grants(record)  # first: one that waited elsewhere may come overdue
            actions += self._refuse_overdue(record)
            actions += self._refuse_drained(record)
            actions += [*self._tidy(record), *self._refuse_drained(record)]  # it may leave by now
        actions += self._refuse_hopeless()
        actions += self._follow_plan()
        while refusals := list(self._refuse_hopeless()):  # beside a pinned model that comes now
            actions += refusals
            actions += self._follow_plan()
        for record in self.roster:
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
        records = self.roster
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
            self.roster.remove(number)
            yield GiveWay(number, record.model)

    def _evict(self, record: ModelRecord, reason: str) -> Action:
        assert record.is_idle
        record.happen(ModelEvent.EVICTION_STARTED)
        return Evict(record.model, reason)

    # --- refusing -----------------------------------------------------------------------------

    def _drained(self) -> SllmError | None:
        """Return what a new ticket is told while the node drains."""
        return DrainingError(min(self._drain_s, ELSEWHERE_S)) if self._is_draining else None

    def _refuse_overdue(self, record: ModelRecord) -> Iterator[Action]:
        """Refuse tickets that have waited for as long as anyone may."""
        while (error := self._refusals.overdue(record, self._now)) is not None:
            yield self._refuse(record.oldest.ticket.number, error)

    def _refuse_drained(self, record: ModelRecord) -> list[Action]:
        """Refuse those whose model does not come any more, since the node drains."""
        comes = not self._is_draining or record.state in (ModelState.LOADING, ModelState.READY)
        return [] if comes else self._refuse_all(record, DrainingError(self._drain_s))

    def _refuse_hopeless(self) -> Iterator[Action]:
        """Refuse those whose model can't fit beside the pinned ones."""
        for record, error in self._refusals.hopeless():
            yield from self._refuse_all(record, error)
            record.happen(ModelEvent.UNWANTED)

    def _refuse_all(self, record: ModelRecord, error: SllmError) -> list[Action]:
        return [self._refuse(w.ticket.number, error) for w in record.waiters()]

    def _refuse(self, number: TicketId, error: SllmError) -> Action:
        self.roster.remove(number)
        return Refuse(number, error)

    def _stop_all(self, record: ModelRecord, error: SllmError, now: float) -> list[Action]:
        stopped = list(record.running)
        for number in stopped:
            self.roster.finish(number, now)
        return [Stop(number, error) for number in stopped]

    def _timers(self, record: ModelRecord) -> Iterator[float]:
        if record.waiting:
            arrived = record.oldest.arrived
            yield arrived + self._config.queue_timeout_s
            overdue = arrived + self._config.max_wait_s
            if record.state is ModelState.QUEUED and overdue > self._now:
                yield overdue
        if (leaves_at := record.leaves_at) is not None:
            yield leaves_at
