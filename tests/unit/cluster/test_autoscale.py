from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_node.cluster.autoscale import (
    Autoscaler,
    Demand,
    ReplicaSeen,
    RetireReplica,
    ScaleOptions,
    Start,
    StartReplica,
    home_of,
)
from sllm_node.cluster.records import Desired
from sllm_node.cluster.state import ReplicaId
from sllm_node.core.types import ModelId, NodeId

ME, X, Y, Z = (NodeId(name) for name in ("me", "x", "y", "z"))
M = ModelId("m")
OPTIONS = ScaleOptions(
    fill=1.0, margin=0.0, settle_s=5.0, pending_s=20.0, retry_s=10.0, starts_at_once=2
)
STARTS = (Start(X, 3.0), Start(Y, 1.0), Start(Z, 2.0))


def replica(name, node=X, **changes):
    return ReplicaSeen(ReplicaId(name), node, **changes)


def drained(name, node=X, **changes):
    return replica(name, node, is_leaving=True, is_draining=True, **changes)


def demand(waiting=0, replicas=(), starts=STARTS, **changes):
    return Demand(M, 2, waiting, tuple(replicas), starts, **changes)


def scaler(minimum=0, maximum=3, keep_alive_s=30.0, options=OPTIONS):
    """A settled home whose peers may never be one."""
    made = Autoscaler(ME, options)
    made.on_alive([], -100.0)
    made.on_desired([Desired(M, minimum, maximum, keep_alive_s)], -100.0)
    made._alive = frozenset((ME, X, Y, Z))  # homes are another test's
    return made


def started(*nodes):
    return tuple(
        StartReplica(M, node, {s.node: s.startup_s for s in STARTS}[node]) for node in nodes
    )


@pytest.mark.parametrize(
    ("minimum", "maximum", "seen", "expected"),
    [
        (0, 3, demand(), ()),
        (1, 3, demand(), started(Y)),
        (0, 3, demand(waiting=1), started(Y)),
        (0, 3, demand(waiting=2), started(Y)),
        (0, 3, demand(waiting=3), started(Y, Z)),
        (0, 3, demand(waiting=99), started(Y, Z)),
        (0, 1, demand(waiting=99), started(Y)),
        (0, 0, demand(waiting=99), ()),
        (0, 3, demand(waiting=1, replicas=[replica("r", sessions=2)]), started(Y)),
        (0, 3, demand(replicas=[replica("r", sessions=2)]), ()),
        (0, 3, demand(waiting=2, replicas=[replica("r", is_ready=False)]), ()),
        (0, 1, demand(waiting=2, replicas=[replica("r", is_leaving=True)]), ()),
        (0, 2, demand(waiting=2, replicas=[replica("r", is_leaving=True)]), started(Y)),
        (1, 1, demand(replicas=[drained("r")]), started(Y)),
        (1, 1, demand(replicas=[drained("r"), replica("s")]), ()),
        (0, 1, demand(replicas=[drained("r", sessions=2)]), started(Y)),
        (1, 3, demand(starts=()), ()),
        (1, 3, demand(starts=(Start(NodeId("dead"), 0.1),)), ()),
    ],
)  # fmt: skip
def test_as_many_are_started_as_demand_fills_where_startup_is_shortest(
    minimum, maximum, seen, expected
):
    assert scaler(minimum, maximum).on_demand(seen, 0.0) == expected


def test_a_start_that_does_not_show_yet_is_not_asked_for_again():
    a = scaler()
    assert a.on_demand(demand(waiting=2), 0.0) == started(Y)
    assert a.on_demand(demand(waiting=2), 1.0) == ()
    assert a.on_demand(demand(waiting=2, replicas=[replica("r", Y, is_ready=False)]), 2.0) == ()
    assert a.on_demand(demand(waiting=3, replicas=[replica("r", Y)]), 3.0) == started(Y)


def test_a_start_that_never_shows_is_given_up():
    a = scaler(maximum=1)
    a.on_demand(demand(waiting=2), 0.0)
    for second in range(1, 20):
        assert a.on_demand(demand(waiting=2), float(second)) == ()
    assert a.on_demand(demand(waiting=2), 20.0) == started(Y)


def test_a_node_that_refuses_is_left_alone_for_a_while():
    a = scaler()
    a.on_demand(demand(waiting=2), 0.0)
    a.on_refused(M, Y, 1.0)
    assert a.on_demand(demand(waiting=2), 1.0) == started(Z)
    a.on_refused(M, Z, 2.0)
    assert a.on_demand(demand(waiting=2), 2.0) == started(X)
    a.on_refused(M, X, 3.0)
    for second in range(3, 11):
        assert a.on_demand(demand(waiting=2), float(second)) == ()
    assert a.on_demand(demand(waiting=2), 11.0) == started(Y)


def test_replicas_leave_when_the_keep_alive_has_ended_and_not_before():
    a = scaler(minimum=1)
    idle = [replica("r", X, idle_s=5.0), replica("s", Y, idle_s=50.0)]
    for second in range(30):
        assert a.on_demand(demand(replicas=idle), float(second)) == ()
    assert a.on_demand(demand(replicas=idle), 30.0) == (RetireReplica(M, Y, ReplicaId("s")),)
    assert a.on_demand(demand(replicas=idle), 31.0) == ()


def test_demand_in_between_begins_the_keep_alive_anew():
    a = scaler()
    idle = [replica("r")]
    for second in range(29):
        a.on_demand(demand(replicas=idle), float(second))
    a.on_demand(demand(replicas=[replica("r", sessions=1)]), 29.0)
    for second in range(30, 60):
        assert a.on_demand(demand(replicas=idle), float(second)) == ()
    assert len(a.on_demand(demand(replicas=idle), 60.0)) == 1


def test_the_most_that_was_needed_in_the_keep_alive_stays():
    a = scaler()
    three = [replica(name) for name in "abc"]
    for second in range(30):
        a.on_demand(demand(waiting=3 if second == 7 else 0, replicas=three), float(second))
    (one,) = a.on_demand(demand(replicas=three), 30.0)
    assert one == RetireReplica(M, X, ReplicaId("a"))


def test_with_a_margin_demand_at_the_border_moves_nothing():
    a = scaler(options=replace(OPTIONS, margin=0.25))
    two = [replica("a", sessions=1), replica("b", sessions=1)]
    for second in range(100):
        assert a.on_demand(demand(replicas=two), float(second)) == ()


def test_above_the_maximum_they_leave_at_once_the_least_missed_first():
    a = scaler(maximum=1)
    seen = [
        replica("busy", sessions=2),
        replica("idle", sessions=0, idle_s=9.0),
        replica("loading", is_ready=False),
        replica("pinned", is_pinned=True),
    ]
    retired = [action.replica for action in a.on_demand(demand(replicas=seen), 0.0)]
    assert retired == ["loading", "idle", "busy"]


def test_a_start_that_may_fail_lets_none_leave_below_the_minimum():
    a = scaler(minimum=1, maximum=2)
    a.on_demand(demand(waiting=4, replicas=[replica("r")]), 0.0)
    a.on_desired([Desired(M, 1, 1, 30.0)], 1.0)
    assert a.on_demand(demand(replicas=[replica("r")]), 1.0) == ()


def test_a_replica_that_does_not_leave_is_told_again():
    a = scaler(maximum=0)
    assert len(a.on_demand(demand(replicas=[replica("r")]), 0.0)) == 1
    for second in range(1, 20):
        assert a.on_demand(demand(replicas=[replica("r")]), float(second)) == ()
    assert len(a.on_demand(demand(replicas=[replica("r")]), 20.0)) == 1


def test_a_node_that_knows_nobody_yet_acts_for_nobody():
    a = Autoscaler(ME, OPTIONS)
    a.on_desired([Desired(M, 1, 3)], 0.0)
    assert [a.on_demand(demand(), float(second)) for second in range(20)] == [()] * 20


def test_only_the_home_acts():
    nodes = [ME, X, Y, Z]
    all_of_them = [Autoscaler(node, OPTIONS) for node in nodes]
    for a in all_of_them:
        a.on_desired([Desired(M, 1, 3)], 0.0)
        a.on_alive(nodes, 0.0)
        assert a.on_demand(demand(), 0.0) == (), "a new home watches first"
    acted = [a._me for a in all_of_them if a.on_demand(demand(), 5.0)]
    assert acted == [home_of(M, nodes)]


def test_when_the_home_dies_the_next_one_settles_and_acts():
    home = home_of(M, [ME, X, Y, Z])
    left = [node for node in (ME, X, Y, Z) if node != home]
    following = home_of(M, left)
    assert following is not None
    a = Autoscaler(following, OPTIONS)
    a.on_alive([ME, X, Y, Z], 0.0)
    a.on_desired([Desired(M, 1, 3)], 0.0)
    assert a.on_demand(demand(), 9.0) == ()
    a.on_alive(left, 10.0)
    assert a.on_demand(demand(), 14.0) == ()
    assert len(a.on_demand(demand(), 15.0)) == 1


def test_a_home_that_slept_settles_again():
    a = scaler(minimum=1)
    a.on_demand(demand(replicas=[replica("r")]), 0.0)
    assert a.on_demand(demand(), 100.0) == ()
    assert len(a.on_demand(demand(), 105.0)) == 1


def test_homes_are_spread_and_a_death_moves_only_the_dead_nodes_models():
    nodes = [NodeId(f"n{i}") for i in range(8)]
    models = [ModelId(f"m{i}") for i in range(400)]
    before = {model: home_of(model, nodes) for model in models}
    after = {model: home_of(model, nodes[1:]) for model in models}
    assert all(before[m] == after[m] for m in models if before[m] != nodes[0])
    counts = [list(before.values()).count(node) for node in nodes]
    assert min(counts) > 20
    assert home_of(M, []) is None


def test_models_that_are_not_desired_are_left_alone():
    a = scaler()
    a.on_desired([], 0.0)
    assert a.on_demand(demand(waiting=5), 1.0) == ()
    a.on_refused(M, X, 1.0)
    assert a.status() == ()


def test_a_replica_whose_node_drains_is_not_told_to_leave_and_counts_again_after_it():
    a = scaler(maximum=1)
    assert a.on_demand(demand(waiting=1, replicas=[drained("r"), replica("s", Y)]), 0.0) == ()
    both = [replica("r", sessions=1), replica("s", Y)]
    assert a.on_demand(demand(replicas=both), 1.0) == (RetireReplica(M, Y, ReplicaId("s")),)


def test_a_node_that_drains_is_no_home_and_its_status_follows_what_it_sees():
    a = scaler(minimum=1, maximum=1)
    a.on_alive([X], 0.0, is_draining=True)
    assert a.on_demand(demand(), 100.0) == ()
    assert a.status()[0].home == X
    a.on_alive([], 101.0, is_draining=True)
    assert a.on_demand(demand(replicas=[drained("r", ME)]), 200.0) == ()
    (status,) = a.status()
    assert (status.home, status.wanted, status.ready, status.leaving) == (None, 1, 0, 1)
    assert "no node" in status.reason


def test_the_status_tells_desired_and_actual_and_why():
    a = scaler(minimum=1)
    seen = [replica("a", sessions=2), replica("b", is_ready=False), replica("c", is_leaving=True)]
    a.on_demand(demand(waiting=3, replicas=seen), 0.0)
    (status,) = a.status()
    assert (status.minimum, status.maximum, status.wanted) == (1, 3, 3)
    assert (status.ready, status.starting, status.leaving) == (1, 1, 1)
    assert "5.0 sessions" in status.reason
    a.on_demand(demand(starts=()), 1.0)
    assert "no node can start" in a.status()[0].reason


@dataclass
class Made:
    name: str
    node: NodeId
    model: ModelId
    ready_at: float
    sessions: int = 0
    leaves_at: float | None = None
    idle_since: float = 0.0


NODES = tuple(NodeId(name) for name in "abcd")
MODELS = (ModelId("m"), ModelId("n"))
PLACES = 3
SLOTS = 2
LOAD_S = 4.0
MACHINE = ScaleOptions(settle_s=5.0, pending_s=30.0, retry_s=5.0, starts_at_once=2)


class Cluster(RuleBasedStateMachine):
    """Autoscalers of four nodes that die and come back; what they say arrives a second later."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.alive = set(NODES)
        self.desired = {m: Desired(m, 0, 2, 10.0) for m in MODELS}
        self.sessions = dict.fromkeys(MODELS, 0)
        self.replicas = []
        self.said = []
        self.count = 0
        self.scalers = {}
        for node in NODES:
            self.join(node)
        self.tell_alive()

    def join(self, node):
        self.scalers[node] = Autoscaler(node, MACHINE)
        self.scalers[node].on_desired(self.desired.values(), self.now)

    def tell_alive(self):
        for node in self.alive:
            self.scalers[node].on_alive(self.alive, self.now)

    def of(self, model):
        return [r for r in self.replicas if r.model == model]

    def room(self, node):
        return PLACES - sum(r.node == node for r in self.replicas)

    def demand(self, model):
        left = self.sessions[model]
        for r in self.of(model):
            r.sessions = min(SLOTS, left) if r.ready_at <= self.now and r.leaves_at is None else 0
            left -= r.sessions
            r.idle_since = self.now if r.sessions else r.idle_since
        starts = [
            Start(n, LOAD_S + i) for i, n in enumerate(sorted(self.alive)) if self.room(n) > 0
        ]
        seen = [
            ReplicaSeen(
                ReplicaId(r.name), r.node, r.sessions, r.ready_at <= self.now,
                r.leaves_at is not None, idle_s=self.now - r.idle_since,
            )
            for r in self.of(model)
        ]  # fmt: skip
        return Demand(model, SLOTS, left, tuple(seen), tuple(starts))

    def step(self):
        """One second: what was said arrives, replicas leave, and everybody decides on what it sees."""
        self.now += 1.0
        said, self.said = self.said, []
        for sender, action in said:
            self.arrive(sender, action)
        self.replicas = [r for r in self.replicas if r.leaves_at is None or r.leaves_at > self.now]
        demands = [self.demand(model) for model in MODELS]
        for node in sorted(self.alive):
            for seen in demands:
                for action in self.scalers[node].on_demand(seen, self.now):
                    self.check(action, seen)
                    self.said.append((node, action))

    def arrive(self, sender, action):
        if action.node not in self.alive:
            return
        if isinstance(action, RetireReplica):
            for r in self.replicas:
                if r.name == action.replica:
                    r.leaves_at = self.now + 2.0
        elif self.room(action.node) > 0:
            self.count += 1
            name = f"r{self.count}"
            self.replicas.append(Made(name, action.node, action.model, self.now + LOAD_S))
            assert len(self.of(action.model)) <= self.desired[action.model].maximum
        elif sender in self.alive:
            self.scalers[sender].on_refused(action.model, action.node, self.now)

    def check(self, action, seen):
        assert action.node in self.alive
        wish = self.desired[action.model]
        staying = [r for r in seen.replicas if not r.is_leaving]
        said = [a for _, a in self.said if a.model == action.model]
        retired = sum(isinstance(a, RetireReplica) for a in said)
        coming = sum(isinstance(a, StartReplica) for a in said)
        if isinstance(action, RetireReplica):
            assert len(staying) - retired - 1 >= wish.minimum, "never below the minimum"
        else:
            assert len(seen.replicas) + coming + 1 <= wish.maximum, "never above the maximum"

    @rule(model=st.sampled_from(MODELS), count=st.integers(0, 9))
    def demand_changes(self, model, count):
        self.sessions[model] = count

    @rule(seconds=st.integers(1, 15))
    def time_passes(self, seconds):
        for _ in range(seconds):
            self.step()

    @rule(model=st.sampled_from(MODELS), least=st.integers(0, 2), more=st.integers(0, 2))
    def wish_changes(self, model, least, more):
        self.step()  # what was said under the old wish has arrived
        self.said = []
        self.desired[model] = Desired(model, least, least + more, 10.0)
        for node in self.alive:
            self.scalers[node].on_desired(self.desired.values(), self.now)

    @precondition(lambda self: len(self.alive) > 1)
    @rule(which=st.integers(0, 3))
    def node_dies(self, which):
        node = sorted(self.alive)[which % len(self.alive)]
        self.alive.remove(node)
        self.replicas = [r for r in self.replicas if r.node != node]
        self.tell_alive()

    @precondition(lambda self: len(self.alive) < len(NODES))
    @rule(which=st.integers(0, 3))
    def node_returns(self, which):
        gone = sorted(set(NODES) - self.alive)
        node = gone[which % len(gone)]
        self.alive.add(node)
        self.join(node)
        self.tell_alive()

    @rule()
    def constant_demand_converges(self):
        for _ in range(90):
            self.step()
        before = sorted(r.name for r in self.replicas)
        for _ in range(30):
            self.step()
            assert self.said == []
        assert sorted(r.name for r in self.replicas) == before
        if sum(wish.maximum for wish in self.desired.values()) > PLACES * len(self.alive):
            return
        for model, wish in self.desired.items():
            filled = self.sessions[model] / SLOTS / MACHINE.fill
            least = min(wish.maximum, max(wish.minimum, filled))
            most = min(wish.maximum, max(wish.minimum, (1 + MACHINE.margin) * filled + 1))
            assert least <= len(self.of(model)) <= most

    @invariant()
    def there_is_one_home(self):
        for model in MODELS:
            homes = {self.scalers[node]._models[model].home for node in self.alive}
            assert len(homes) == 1


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
