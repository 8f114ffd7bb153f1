"""Many nodes under faults: they agree within a bound once the faults stop."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sllm_node.cluster.membership import PeerSuspect
from tests.sim.membership_world import BOUND_S, LIMIT, TIMING, World


def settle(world):
    world.stop_faults()
    world.run(BOUND_S)
    world.check_agreement()
    before = world.events()
    world.run(3 * BOUND_S)
    world.check_agreement()
    assert world.events() == before, "something still changes in peace"


def random_fault(world):
    rng = world.rng
    name = rng.choice(world.ids)
    node = world.nodes[name]
    match rng.randrange(7):
        case 0 if node.membership is None:
            world.start(name)
        case 0 | 1:
            world.crash(name)
        case 2 if node.membership is not None and not node.paused:
            world.pause(name)
        case 3 if node.paused and node.membership is not None:
            world.wake(name)
        case 4:
            world.partition({n for n in world.ids if rng.random() < 0.5})
        case 5:
            world.cut(name, rng.choice(world.ids))
        case 6:
            world.heal()
        case _:
            world.publish(name)


@pytest.mark.parametrize("seed", range(20))
def test_after_faults_stop_all_agree_within_the_bound(seed):
    world = World(seed, is_sealed=seed % 2 == 1)
    world.network.loss, world.network.copies = 0.1, 0.2
    for _ in range(40):
        random_fault(world)
        world.run(world.rng.expovariate(1 / 4.0))
        world.publish(world.rng.choice(world.ids))
    settle(world)


@pytest.mark.parametrize("seed", range(5))
def test_loss_copies_and_reordering_alone_kill_nobody(seed):
    world = World(seed)
    world.network.loss, world.network.copies = 0.1, 0.3
    for _ in range(50):
        world.publish(world.rng.choice(world.ids))
        world.run(2.0)
    assert world.deaths() == []
    settle(world)


def test_a_paused_node_that_wakes_up_declares_nobody_dead():
    world = World(1)
    world.run(BOUND_S)
    world.pause(world.ids[0])
    world.run(1000.0)
    world.wake(world.ids[0])
    world.run(BOUND_S)
    assert {viewer for viewer, _ in world.deaths()} == set(world.ids[1:])
    suspects = [e for e in world.nodes[world.ids[0]].events if isinstance(e, PeerSuspect)]
    assert suspects == []
    settle(world)


def test_a_crashed_node_is_dead_for_all_within_the_bound_and_not_before():
    world = World(2)
    world.run(BOUND_S)
    world.crash(world.ids[0])
    world.run((TIMING.dead_s - TIMING.heartbeat_s) / 1.1 - 1)
    assert world.deaths() == []
    world.run(BOUND_S)
    assert {viewer for viewer, _ in world.deaths()} == set(world.ids[1:])
    settle(world)


def test_a_node_restarted_with_a_lower_boot_is_heard_again():
    world = World(3)
    world.run(BOUND_S)
    world.crash(world.ids[0])
    world.start(world.ids[0], boot=min(world.nodes[world.ids[0]].boots) - 1 or 1)
    settle(world)


def test_a_node_that_leaves_is_gone_for_all_and_never_dead():
    world = World(4)
    world.run(BOUND_S)
    world.network.loss = 0.2
    world.leave(world.ids[0])
    world.run(BOUND_S)
    membership = world.nodes[world.ids[0]].membership
    assert membership is not None
    assert membership.has_left()
    world.crash(world.ids[0])
    settle(world)
    assert world.deaths() == []


def test_64_nodes_agree_and_messages_stay_bounded():
    world = World(5, count=64)
    world.run(6.0)
    world.check_agreement()
    membership = world.nodes[world.ids[0]].membership
    assert membership is not None
    assert LIMIT < world.largest <= membership.message_limit


class Faults(RuleBasedStateMachine):
    """Hypothesis looks for an order of faults after which they do not agree."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.world = World(seed, count=3)

    @rule(seconds=st.floats(0.1, 15.0))
    def time_goes_by(self, seconds):
        self.world.run(seconds)

    @rule(i=st.integers(0, 2))
    def publishes(self, i):
        self.world.publish(self.world.ids[i])

    @rule(i=st.integers(0, 2))
    def crashes(self, i):
        self.world.crash(self.world.ids[i])

    @rule(i=st.integers(0, 2))
    def starts(self, i):
        if self.world.nodes[self.world.ids[i]].membership is None:
            self.world.start(self.world.ids[i])

    @rule(i=st.integers(0, 2))
    def pauses(self, i):
        if self.world.nodes[self.world.ids[i]].membership is not None:
            self.world.pause(self.world.ids[i])

    @rule(i=st.integers(0, 2))
    def wakes(self, i):
        node = self.world.nodes[self.world.ids[i]]
        if node.paused and node.membership is not None:
            self.world.wake(node.id)

    @rule(i=st.integers(0, 2), j=st.integers(0, 2))
    def is_cut(self, i, j):
        self.world.cut(self.world.ids[i], self.world.ids[j])

    @precondition(lambda self: self.world.network.cut)
    @rule()
    def heals(self):
        self.world.heal()

    @rule(loss=st.floats(0, 0.2), copies=st.floats(0, 1))
    def network_worsens(self, loss, copies):
        self.world.network.loss, self.world.network.copies = loss, copies

    def teardown(self):
        if hasattr(self, "world"):
            settle(self.world)


TestFaults = Faults.TestCase
TestFaults.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
)
