from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_node.cluster.reservations import Ask, Away, ReservationId
from sllm_node.cluster.state import (
    Bandwidths,
    BootId,
    DeviceShare,
    DeviceState,
    NodeId,
    NodeState,
    ReplicaId,
    ReplicaState,
    SessionState,
)
from sllm_node.cluster.vacate import (
    AskToLeave,
    Ended,
    VacateLimits,
    Vacates,
    joined,
    objection,
)
from sllm_node.core.types import ModelId, ModelState, SessionId
from sllm_node.schedule.actions import ModelView

A, B = ModelId("a"), ModelId("b")
LIMITS = VacateLimits(vacate_s=10.0, settle_s=30.0, max_sessions=4)


def replica(model, *sessions, size=60, device="d0", **rest):
    running = tuple(SessionState(SessionId(name), 1, 1) for name in sessions)
    shares = (DeviceShare(device, size),)
    return ReplicaState(ReplicaId(model), ModelId(model), shares, 4, running, **rest)


def state(*replicas, free=40):
    devices = (DeviceState("d0", 100, free), DeviceState("d1", 100, free))
    return NodeState(
        NodeId("n"), BootId("1"), 1, devices, Bandwidths(1, 1, 1, 1), (), replicas
    )  # fmt: skip


def ask(*sessions, model="a", size=80, to="x"):
    away = Away(ReplicaId(model), tuple(map(SessionId, sessions)), NodeId(to))
    return Ask(
        ReservationId("w-0"), BootId("1"), 1, (DeviceShare("d0", size),),
        frees=(ReplicaId(model),), aways=(away,), ready_s=2.0,
    )  # fmt: skip


def view(now=ModelState.QUEUED, waiting=1):
    return ModelView(
        now, pinned=False, priority=0, running=0, waiting=waiting, keep_alive_until=None
    )


NOW = state(replica("a", "s1", "s2"))


def begun(now=NOW, at=100.0, of=None):
    vacates = Vacates(slots=4)
    return vacates, vacates.begin(of or ask("s1", "s2"), B, now, LIMITS, at)


def ended(actions):
    (action,) = actions
    assert isinstance(action, Ended)
    return action.vacate.outcome, action.vacate.seconds


def test_all_sessions_that_are_still_there_are_asked_at_once():
    _, actions = begun(of=ask("s1", "s2", "gone"))
    assert actions == [AskToLeave(SessionId(f"s{i}"), NodeId("x"), "w-0") for i in (1, 2)]


@pytest.mark.parametrize("there", [ModelState.LOADING, ModelState.READY])
def test_it_is_over_when_the_model_loads(there):
    vacates, _ = begun()
    assert vacates.on_news(B, view(), 101.0) == []
    assert ended(vacates.on_news(B, view(there), 102.0)) == ("freed", 2.0)
    assert vacates.active == ()
    assert vacates.next_timer() is None


def test_it_is_over_when_nobody_waits():
    vacates, _ = begun()
    assert ended(vacates.on_news(B, view(ModelState.IDLE, waiting=0), 101.0)) == ("over", 1.0)
    assert vacates.shown(NOW, 101.0) == NOW


def test_a_session_that_stays_ends_it_and_is_left_alone_for_a_while():
    vacates, _ = begun()
    assert vacates.is_leaving(SessionId("s1"), "w-0")
    assert vacates.on_stays(SessionId("other"), "-", 101.0) == []
    assert ended(vacates.on_stays(SessionId("s1"), "no room", 101.0)) == ("refused", 1.0)
    assert not vacates.is_leaving(SessionId("s2"), "w-0")
    assert vacates.on_stays(SessionId("s2"), "no room", 101.0) == []
    for now, expected in ((102.0, [True, False]), (131.0, [False, False])):
        (shown,) = vacates.shown(NOW, now).replicas
        assert [session.stays for session in shown.sessions] == expected


def test_what_takes_too_long_is_given_up_and_its_sessions_are_left_alone():
    vacates, _ = begun()
    assert vacates.next_timer() == 110.0
    assert vacates.on_timer(109.9) == []
    assert ended(vacates.on_timer(110.0)) == ("late", 10.0)
    (shown,) = vacates.shown(NOW, 111.0).replicas
    assert all(session.stays for session in shown.sessions)


def test_what_its_own_node_can_not_make_is_refused():
    vacates, _ = begun()
    assert ended(vacates.refuse(B, "pinned", 100.0)) == ("refused", 0.0)


def test_what_comes_after_its_end_changes_nothing():
    vacates, _ = begun()
    vacates.on_news(B, view(ModelState.LOADING), 101.0)
    assert vacates.refuse(B, "pinned", 101.0) == []
    assert vacates.on_news(B, view(), 101.0) == []


def test_others_see_the_model_coming_and_its_memory_taken():
    vacates, _ = begun()
    shown = vacates.shown(NOW, 100.5)
    _, coming = shown.replicas
    assert (coming.model, coming.free_slots, coming.ready_s) == (B, 4, 1.5)
    assert [device.bytes_free for device in shown.devices] == [20, 40]  # a brings 60 of the 80
    loads = state(replica("b", size=80, ready_s=1.0), free=20)
    assert vacates.shown(loads, 103.0) == loads
    gone = vacates.shown(state(free=100), 103.0)
    assert [device.bytes_free for device in gone.devices] == [20, 100]


def test_nobody_waits_for_a_turn_of_a_replica_that_makes_room():
    now = state(replica("a", "s1", "s2", is_leaving=True, next_free_s=3.0))
    vacates, _ = begun()
    assert vacates.shown(now, 100.5).replicas[0].next_free_s is None
    assert vacates.shown(now, 100.5).replicas[0].is_leaving
    vacates.on_timer(110.0)
    assert vacates.shown(now, 110.0).replicas[0].next_free_s == 3.0


def test_others_see_that_nothing_else_may_move_from_its_device_nor_above_the_limit():
    vacates, _ = begun()
    other = replica("c", "s3", size=30)
    elsewhere = replica("d", "s4", "s5", device="d1", size=30)
    many = replica("e", "s6", "s7", "s8", device="d1", size=30)
    shown = vacates.shown(state(replica("a", "s1", "s2"), other, elsewhere, many), 100.5)
    stays = {r.model: {one.stays for one in r.sessions} for r in shown.replicas if r.sessions}
    assert stays == {"a": {True}, "c": {True}, "d": {False}, "e": {True}}


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (NOW, None), (state(replica("a")), None), (state(), "gone"),
        (state(replica("a", "s1", "s2", is_leaving=True)), "leaving"),
        (state(replica("a", "s1", is_pinned=True)), "stay"),
        (state(replica("a", "s1", ready_s=1.0)), "stay"),
        (state(replica("a", "s1", "s2", "s3")), "1 sessions more"),
        (state(replace(replica("a", "s1"), sessions=(
            SessionState(SessionId("s1"), 1, 1, stays=True),
        ))), "not to be moved"),
    ],
)  # fmt: skip
def test_an_ask_is_held_against_what_is_there_now(now, problem):
    found = objection(ask("s1", "s2"), now)
    assert (found is None) == (problem is None)
    assert problem is None or problem in (found or "")


def test_sessions_can_not_move_to_their_own_node():
    assert objection(ask("s1", "s2", to="n"), NOW) is not None


def test_who_asks_for_a_model_that_is_there_or_coming_since_joins_it():
    vacates, _ = begun()
    found = joined(ask("s1", "s2"), B, vacates.shown(NOW, 100.0))
    assert (found.shares, found.frees, found.aways) == ((), (), ())
    assert joined(ask("s1"), B, NOW) == ask("s1")
    leaving = state(replica("b", is_leaving=True))
    assert joined(ask("s1"), B, leaving) == ask("s1")


class Machine(RuleBasedStateMachine):
    """Any events in any order: a vacate ends once, by its time at the latest, and promises end with it."""

    def __init__(self):
        super().__init__()
        self.vacates, self.now, self.count = Vacates(slots=4), 0.0, 0
        self.open: dict[ModelId, float] = {}

    def do(self, actions):
        for action in actions:
            assert isinstance(action, Ended)
            del self.open[action.vacate.model]
            assert action.vacate.outcome in ("freed", "refused", "late", "over")

    @precondition(lambda self: len(self.open) < 3)
    @rule(sessions=st.integers(0, 3))
    def begin(self, sessions):
        self.count += 1
        model = ModelId(f"m{self.count}")
        names = [f"{model}-{i}" for i in range(sessions)]
        asked = replace(ask(*names), id=ReservationId(str(model)))
        asks = self.vacates.begin(asked, model, state(replica("a", *names)), LIMITS, self.now)
        assert len(asks) == sessions
        self.open[model] = self.now + LIMITS.vacate_s

    @precondition(lambda self: self.open)
    @rule(data=st.data(), now=st.sampled_from(ModelState), waiting=st.integers(0, 1))
    def news(self, data, now, waiting):
        model = data.draw(st.sampled_from(sorted(self.open)))
        self.do(self.vacates.on_news(model, view(now, waiting), self.now))

    @rule(model=st.integers(1, 9), session=st.integers(0, 3))
    def stays(self, model, session):
        self.do(self.vacates.on_stays(SessionId(f"m{model}-{session}"), "-", self.now))

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds):
        self.now += seconds
        while (timer := self.vacates.next_timer()) is not None and timer <= self.now:
            self.do(self.vacates.on_timer(timer))

    @invariant()
    def nothing_is_kept_beyond_its_time(self):
        assert set(self.vacates.active) == set(self.open)
        assert all(until > self.now for until in self.open.values())
        if not self.open:
            assert self.vacates.shown(state(), self.now) == state()


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestMachine = Machine.TestCase
