"""Whatever the order of events: memory is never exceeded, nothing busy is evicted, no ticket is lost."""

from collections.abc import Mapping

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from sllm_node.core.config import ModelConfig, ScheduleConfig
from sllm_node.core.errors import LoadFailedError, ModelBusyError
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import (
    AbortLoad,
    Evict,
    GiveWay,
    Grant,
    Refuse,
    StartLoad,
    Stop,
    Ticket,
    TicketId,
)
from sllm_node.schedule.scheduler import Scheduler
from tests.unit.schedule.board import shares

SIZES = {ModelId("a"): 3, ModelId("b"): 5, ModelId("c"): 8, ModelId("d"): 2, ModelId("huge"): 11}
SPLIT = {**SIZES, ModelId("c"): {"x": 7, "y": 4}, ModelId("huge"): {"y": 6, "x": 3}}
MAX_SESSIONS = 2
MAX_QUEUE = 6
QUEUE_TIMEOUT_S = 100.0
models = st.sampled_from(sorted(SIZES))


class SchedulerMachine(RuleBasedStateMachine):
    capacities: Mapping[str, int] = {"cpu": 10}
    sizes: Mapping[ModelId, object] = SIZES

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(
            ScheduleConfig(max_queue=MAX_QUEUE, max_wait_s=10.0, queue_timeout_s=QUEUE_TIMEOUT_S),
            {"a": ModelConfig(pinned=True), "d": ModelConfig(priority=1, keep_alive_s=0)},
            capacities=self.capacities,
            max_sessions=MAX_SESSIONS,
            drain_s=1.0,
        )
        self.now = 0.0
        self.count = 0
        self.waiting: dict[TicketId, tuple[ModelId, float]] = {}
        self.loads_only: set[TicketId] = set()
        self.hints: set[TicketId] = set()
        self.running: dict[TicketId, ModelId] = {}
        self.places: dict[ModelId, dict[str, int]] = {}
        self.loading: set[ModelId] = set()
        self.ready: set[ModelId] = set()
        self.evicting: set[ModelId] = set()
        self.pinned = {ModelId("a")}

    def carry_out(self, actions):
        for action in actions:
            match action:
                case StartLoad(model, devices):
                    assert model not in self.loading | self.ready | self.evicting
                    self.loading.add(model)
                    parts = shares(self.sizes[model])
                    assert all(p.device in (None, d) for p, d in zip(parts, devices, strict=True))
                    self.places[model] = {d: p.size for p, d in zip(parts, devices, strict=True)}
                case AbortLoad(model):
                    assert model not in self.pinned
                    assert model not in {model for model, _ in self.waiting.values()}
                    self.loading.remove(model)
                    self.evicting.add(model)
                case Evict(model, reason):
                    assert model not in self.running.values()
                    assert model not in self.pinned or reason in {"failed", "replaced"}
                    self.ready.remove(model)
                    self.evicting.add(model)
                case Grant(ticket, model):
                    assert self.waiting.pop(ticket)[0] == model
                    assert model in self.ready
                    if ticket not in self.loads_only:
                        self.running[ticket] = model
                case Refuse(ticket, _):
                    del self.waiting[ticket]
                case GiveWay(ticket, model):
                    assert ticket in self.hints
                    assert self.waiting.pop(ticket)[0] == model
                case Stop(ticket, _):
                    del self.running[ticket]
                case _:
                    raise AssertionError(action)

    @rule(
        model=models,
        priority=st.integers(-1, 1),
        keep_alive_s=st.sampled_from([None, 0, -1, 5.0]),
        session=st.booleans(),
    )
    def request(self, model, priority, keep_alive_s, session):
        self.count += 1
        number = TicketId(self.count)
        self.waiting[number] = (model, self.now)
        if not session:
            self.loads_only.add(number)
        ticket = Ticket(
            number, model, shares(self.sizes[model]), 1.0, priority, keep_alive_s, session
        )
        self.carry_out(self.scheduler.on_request(ticket, self.now))

    @precondition(lambda self: not self.scheduler.is_draining)
    @rule(model=models)
    def hint(self, model):
        """A load that can begin begins, and closes nobody; of one that can't, nobody notices."""
        number = TicketId(self.count + 1)
        parts = shares(self.sizes[model])
        ticket = Ticket(number, model, parts, 1.0, is_session=False, is_hint=True)
        is_idle = self.scheduler.roster.view(model).state is ModelState.IDLE
        if not is_idle or not self.scheduler.can_begin(ticket, self.now):
            return
        if self.scheduler.roster.waiting >= MAX_QUEUE:
            return
        self.count += 1
        closed = {m for m in SIZES if self.scheduler.roster.record(m).is_closed}
        self.waiting[number] = (model, self.now)
        self.loads_only.add(number)
        self.hints.add(number)
        self.carry_out(self.scheduler.on_request(ticket, self.now))
        assert closed == {m for m in SIZES if self.scheduler.roster.record(m).is_closed}
        assert self.scheduler.roster.view(model).devices

    @invariant()
    def a_model_that_only_hints_wait_for_comes(self):
        for model in SIZES:
            if self.scheduler.roster.record(model).is_hinted:
                view = self.scheduler.roster.view(model)
                assert view.state is not ModelState.QUEUED or view.devices

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        self.carry_out(self.scheduler.on_cancel(ticket, self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[ticket]
        self.carry_out(self.scheduler.on_finished(ticket, self.now))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def load_ends(self, data, fails):
        model = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(model)
        if fails:
            error = LoadFailedError(model, "no reason")
            self.carry_out(self.scheduler.on_load_failed(model, error, self.now))
            return
        self.ready.add(model)
        self.carry_out(self.scheduler.on_loaded(model, self.now))

    @precondition(lambda self: self.evicting)
    @rule(data=st.data())
    def eviction_ends(self, data):
        model = data.draw(st.sampled_from(sorted(self.evicting)))
        self.evicting.remove(model)
        self.carry_out(self.scheduler.on_evicted(model, self.now))

    @rule(model=models)
    def replica_fails(self, model):
        self.carry_out(self.scheduler.on_failed(model, self.now))

    @rule(model=models)
    def checkpoint_replaced(self, model):
        self.carry_out(self.scheduler.on_replaced(model, self.now))

    @rule(model=models, force=st.booleans())
    def unload(self, model, force):
        try:
            actions = self.scheduler.on_unload_request(model, self.now, force=force)
        except ModelBusyError:
            return
        self.carry_out(actions)

    @rule(model=models)
    def pin(self, model):
        self.pinned.add(model)
        self.carry_out(self.scheduler.on_pin(model, self.now))

    @rule(model=models)
    def unpin(self, model):
        self.pinned.discard(model)
        self.carry_out(self.scheduler.on_unpin(model, self.now))

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 50.0]))
    def time_passes(self, seconds):
        end = self.now + seconds
        while (timer := self.scheduler.next_timer()) is not None and timer <= end:
            self.now = max(self.now, timer)
            self.carry_out(self.scheduler.on_timer(self.now))
        self.now = end

    @precondition(lambda self: not self.scheduler.is_draining)
    @rule(really=st.integers(0, 9))
    def drain(self, really):
        if really == 0:
            self.carry_out(self.scheduler.on_drain(self.now))

    @precondition(lambda self: self.scheduler.is_draining)
    @rule()
    def undrain(self):
        self.carry_out(self.scheduler.on_undrain(self.now))

    @invariant()
    def device_memory_is_never_exceeded(self):
        here = [self.places[model] for model in self.loading | self.ready | self.evicting]
        for device, capacity in self.capacities.items():
            assert sum(place.get(device, 0) for place in here) <= capacity
        used = sum(sum(place.values()) for place in here)
        assert used == self.scheduler.roster.device_bytes

    @invariant()
    def no_model_runs_more_sessions_than_allowed(self):
        for model in SIZES:
            assert list(self.running.values()).count(model) <= MAX_SESSIONS

    @invariant()
    def nobody_is_lost_and_nobody_waits_too_long(self):
        # Those whose load was aborted for others are taken: they had a slot.
        limit = MAX_QUEUE + len(self.loads_only) + len(SIZES) * MAX_SESSIONS
        assert self.scheduler.roster.waiting == len(self.waiting) <= limit
        assert self.scheduler.roster.running == len(self.running)
        for _, since in self.waiting.values():
            assert self.now - since <= QUEUE_TIMEOUT_S

    @invariant()
    def the_view_agrees(self):
        for model in SIZES:
            view = self.scheduler.roster.view(model)
            assert view.running == list(self.running.values()).count(model)
            assert view.waiting == [m for m, _ in self.waiting.values()].count(model)
            assert view.pinned == (model in self.pinned)
            is_here = model in self.loading | self.ready | self.evicting
            if is_here:
                assert view.devices == tuple(self.places[model])
            elif view.devices:  # it comes once evictions have ended
                assert view.waiting
                assert self.evicting

    @invariant()
    def what_comes_fits_once_evictions_have_ended(self):
        used = dict.fromkeys(self.capacities, 0)
        for replica in self.scheduler.roster.replicas():
            if replica.state is not ModelState.EVICTING:
                for device, size in zip(replica.devices, replica.sizes, strict=True):
                    used[device] += size
        assert all(used[device] <= size for device, size in self.capacities.items())

    @invariant()
    def nobody_waits_while_there_is_room(self):
        here = [self.places[model] for model in self.loading | self.ready | self.evicting]
        used = {d: sum(place.get(d, 0) for place in here) for d in self.capacities}
        free = {d: self.capacities[d] - used[d] for d in self.capacities}
        queued = {m for m, _ in self.waiting.values() if not self.scheduler.roster.view(m).devices}
        if len(queued) == 1 and not self.evicting:
            (model,) = queued
            parts = shares(self.sizes[model])
            if parts[0].device is None:
                assert max(free.values()) < parts[0].size
            else:
                assert any(free[str(part.device)] < part.size for part in parts)

    @precondition(lambda self: not self.scheduler.is_draining)
    @invariant()
    def a_plan_does_not_waver(self):
        """What time alone did not change needs no other plan."""
        closed = {m for m in SIZES if self.scheduler.roster.record(m).is_closed}
        assert self.scheduler.on_timer(self.now) == []
        assert closed == {m for m in SIZES if self.scheduler.roster.record(m).is_closed}

    @override
    def teardown(self):
        """Everything that was begun comes to an end: sessions end, loads end, nobody is left."""
        for _ in range(1000):
            if not (self.waiting or self.running or self.loading or self.evicting):
                return
            self._end_one()
        raise AssertionError(f"still waiting: {self.waiting}")

    def _end_one(self):
        for ticket in sorted(self.running):
            del self.running[ticket]
            self.carry_out(self.scheduler.on_finished(ticket, self.now))
        for model in sorted(self.evicting):
            self.evicting.remove(model)
            self.carry_out(self.scheduler.on_evicted(model, self.now))
        for model in sorted(self.loading):
            self.loading.remove(model)
            self.ready.add(model)
            self.carry_out(self.scheduler.on_loaded(model, self.now))


class TwoDevices(SchedulerMachine):
    capacities: Mapping[str, int] = {"x": 10, "y": 7}
    sizes: Mapping[ModelId, object] = SPLIT


TestScheduler = SchedulerMachine.TestCase
TestTwoDevices = TwoDevices.TestCase
TestScheduler.settings = TestTwoDevices.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
