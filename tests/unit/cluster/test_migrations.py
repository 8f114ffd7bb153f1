import pytest

from sllm_node.cluster.migration import MigrationLimits, MigrationOutcome
from sllm_node.cluster.migration_messages import TOKENS_MAX, Move, MoveOutcome, Reason
from sllm_node.core.errors import MoveRefusedError, SessionLostError
from tests.unit.cluster.migration_rig import Rig, at, expected, session_request

LONG = tuple(range(1, 5001))
"""A prompt for which a round is worth while."""


@pytest.fixture
def rig():
    return Rig("a", "b", "c")


def test_a_session_runs_at_its_owner_and_ends(rig):
    rig.begin("a", "b")
    rig.step(6)
    assert rig.shown["s"] == expected()
    assert rig.ends == {"s": None}
    assert rig.is_clean()


@pytest.mark.parametrize("entry", ["a", "b", "c"])
@pytest.mark.parametrize("before", range(6))
def test_a_moved_session_has_the_tokens_of_an_unmoved_one(rig, entry, before):
    rig.begin(entry, "b")
    rig.step(before)
    rig.move(entry, "c")
    assert rig.owner(entry).node == "c"
    rig.step(6 - before)
    assert rig.shown["s"] == expected()
    assert rig.is_clean()
    (first, report) = rig.reports
    assert (first.source, report.source, report.destination) == (None, "b", "c")
    assert report.outcome is (MigrationOutcome.MOVED)


def test_a_session_can_go_there_and_back(rig):
    rig.begin("a", "a")
    for to in ("b", "c", "a", "b"):
        rig.step()
        rig.move("a", to)
    rig.step(2)
    assert rig.shown["s"] == expected()
    assert rig.is_clean()


def test_the_source_decodes_while_the_destination_computes(rig):
    rig.slow = {"c"}
    rig.begin("a", "b", max_tokens=100, prompt=LONG)
    rig.move("a", "c")
    rig.step(50)
    assert rig.owner("a").node == "b"
    holder = rig.nodes["c"].holders["s", 2]
    rig.slow = set()
    rig.nodes["c"].computed("s", 2, len(holder.tokens), rig.now)
    rig.settle()
    assert rig.owner("a").node == "c"
    rig.step(50)
    assert rig.shown["s"] == expected(100)
    assert rig.reports[-1].rounds[0] == 5000
    assert rig.reports[-1].rounds[1] >= 40
    assert rig.reports[-1].gap_s == pytest.approx(0.02)


def test_a_prompt_longer_than_a_message_travels_in_several(rig):
    prompt = tuple(range(1, 2 * TOKENS_MAX + 100))
    rig.begin("a", "b", prompt=prompt)
    rig.step(2)
    rig.move("a", "c")
    rig.step(4)
    assert rig.shown["s"] == expected()
    assert rig.computed[-1][1].parts[0].request.prompt == prompt


def test_a_second_migration_is_refused_while_one_runs(rig):
    rig.slow = {"c"}
    rig.begin("a", "b", prompt=LONG)
    rig.move("a", "c")
    with pytest.raises(MoveRefusedError) as refused:
        rig.move("a", "b")
    assert refused.value.reason is MoveOutcome.ALREADY_MOVING


@pytest.mark.parametrize(
    ("to", "session", "reason"),
    [("b", "s", MoveOutcome.ALREADY_THERE), ("c", "other", MoveOutcome.UNKNOWN)],
)
def test_a_move_that_makes_no_sense_is_refused(rig, to, session, reason):
    rig.begin("a", "b")
    with pytest.raises(MoveRefusedError) as refused:
        rig.move("a", to, session)
    assert refused.value.reason is reason


def test_a_destination_without_memory_leaves_the_session_where_it_is(rig):
    rig.refusing = {"c": Reason.MEMORY}
    rig.begin("a", "b")
    rig.move("a", "c")
    rig.step(6)
    assert rig.shown["s"] == expected()
    assert (rig.reports[-1].outcome, rig.reports[-1].reason) == (MigrationOutcome.FAILED, "memory")
    assert rig.is_clean()


def test_a_destination_that_is_too_slow_is_given_up(rig):
    rig.slow = {"c"}
    rig.begin("a", "b", prompt=LONG)
    rig.move("a", "c")
    rig.wait(310)
    assert rig.owner("a").node == "b"
    assert rig.reports[-1].reason == Reason.SLOW
    assert rig.places["c"] == 0


def test_a_session_whose_owner_dies_goes_on_elsewhere(rig):
    rig.begin("a", "b")
    rig.step(3)
    del rig.nodes["b"]
    rig.decoding.clear()
    rig.nodes["a"].peer_lost("b", rig.now)
    rig.settle()
    ((_, seek),) = rig.seeks
    assert (seek.request.resumed, seek.excluded, seek.is_orphan) == ((100, 101, 102), {"b"}, True)
    rig.nodes["a"].placed("s", at("c"), rig.now)
    rig.settle()
    rig.step(3)
    assert rig.shown["s"] == expected()


def test_an_owner_cut_off_is_replaced_and_gives_up_by_itself(rig):
    rig.begin("a", "b", max_tokens=50)
    rig.step(3)
    rig.cut = {("a", "b"), ("b", "a")}
    rig.step(3)
    rig.wait(11)
    rig.nodes["a"].placed("s", at("c"), rig.now)
    rig.settle()
    assert rig.places["b"] == 0
    rig.step(47)
    assert rig.shown["s"] == expected(50)
    assert rig.is_clean()


def test_what_a_replaced_owner_sends_is_refused_and_it_lets_go(rig):
    rig.begin("a", "b", max_tokens=50)
    rig.cut = {("a", "b")}
    rig.move("a", "c")
    rig.step(3)
    assert ("b", "s", 1) in rig.decoding
    rig.cut = set()
    rig.step(47)
    assert rig.shown["s"] == expected(50)
    assert rig.is_clean()


def test_a_lost_message_with_tokens_is_made_good_while_the_owner_decodes(rig):
    rig.begin("a", "b", max_tokens=100)
    rig.cut = {("b", "a")}
    rig.step()
    rig.cut = set()
    for _ in range(60):
        rig.step()
        for node in rig.nodes.values():
            node.on_timer(rig.now)
        rig.settle()
    assert rig.shown["s"] == expected(61)


def test_a_session_that_nobody_takes_ends_with_an_error(rig):
    rig.begin("a", "b")
    rig.nodes["a"].peer_lost("b", rig.now)
    rig.nodes["a"].no_place("s")
    rig.settle()
    assert isinstance(rig.ends["s"], SessionLostError)


def test_recoveries_are_bounded():
    rig = Rig("a", "b", limits=MigrationLimits(recoveries_max=2))
    rig.refusing = {"b": Reason.FAILED}
    rig.begin("a", "b")
    for _ in range(2):
        rig.nodes["a"].placed("s", at("b"), rig.now)
        rig.settle()
    assert isinstance(rig.ends["s"], SessionLostError)
    assert rig.is_clean()


def test_a_session_for_which_no_node_is_found_in_time_ends(rig):
    rig.nodes["a"].begin(session_request(), rig.now)
    rig.settle()
    assert rig.seeks[0][1].is_orphan
    rig.wait(61)
    assert isinstance(rig.ends["s"], SessionLostError)


@pytest.mark.parametrize("cut", [False, True])
def test_a_cancelled_session_frees_both_nodes(rig, cut):
    rig.slow = {"c"}
    rig.begin("a", "b", prompt=LONG)
    rig.move("a", "c")
    rig.cut = {("a", "b"), ("a", "c")} if cut else set()
    rig.nodes["a"].cancel("s")
    rig.settle()
    rig.cut = set()
    rig.step()
    rig.wait(1)
    assert rig.is_clean()


def test_sessions_of_a_dead_entry_are_let_go(rig):
    rig.begin("a", "b")
    del rig.nodes["a"]
    rig.nodes["b"].peer_lost("a", rig.now)
    rig.settle()
    assert rig.is_clean()


def test_holders_of_an_entry_that_restarted_are_told_to_let_go(rig):
    rig.begin("a", "b")
    rig.nodes["a"].entries.clear()
    rig.step()
    assert rig.is_clean()


def test_a_drain_moves_what_runs_and_refuses_what_comes(rig):
    for index in range(3):
        rig.begin("a", "b", session=f"s{index}", max_tokens=20)
    rig.step(2)
    rig.nodes["b"].drain(rig.now)
    rig.settle()
    assert [t.outcome for t in rig.told] == [MoveOutcome.SEEKING] * 3
    assert not any(seek.is_orphan for _, seek in rig.seeks)
    for index in range(3):
        rig.nodes["a"].placed(f"s{index}", at("c"), rig.now)
    rig.settle()
    assert rig.places["b"] == 0
    rig.begin("a", "b", session="late")
    assert rig.seeks[-1][1].session == "late"
    rig.step(18)
    assert all(rig.shown[f"s{index}"] == expected(20) for index in range(3))


def test_a_drain_asks_again_if_there_was_no_place(rig):
    rig.begin("a", "b", max_tokens=200)
    rig.nodes["b"].drain(rig.now, ["s", "other"])
    rig.settle()
    rig.nodes["a"].no_place("s")
    for _ in range(60):
        rig.step()
        for node in rig.nodes.values():
            node.on_timer(rig.now)
        rig.settle()
    assert len(rig.seeks) == 2


def test_sessions_moved_together_are_computed_together(rig):
    for index in range(4):
        rig.begin("a", "b", session=f"s{index}", prompt=LONG)
    for index in range(4):
        rig.nodes["a"].move(f"s{index}", at("c"), "test", rig.now)
    rig.settle()
    assert [len(c.parts) for name, c in rig.computed if name == "c" and c.parts[0].start == 0] == [
        4
    ]


def test_a_pause_of_this_node_is_nobodys_silence(rig):
    rig.begin("a", "b")
    rig.now += 1000
    for node in rig.nodes.values():
        node.on_timer(rig.now)
    rig.settle()
    rig.step(6)
    assert rig.shown["s"] == expected()


def test_a_node_holds_no_more_sessions_than_it_may():
    rig = Rig("a", "b", limits=MigrationLimits(sessions_max=1))
    rig.begin("a", "b")
    rig.begin("a", "b", session="more")
    assert rig.seeks[-1][1].session == "more"


def test_an_owner_that_restarted_is_noticed(rig):
    rig.begin("a", "b")
    rig.nodes["b"].holders.clear()
    rig.decoding.clear()
    rig.wait(1)
    assert rig.seeks[-1][1].is_orphan


def test_another_node_can_ask_for_a_move(rig):
    rig.begin("a", "b")
    rig.nodes["a"].receive("c", Move("s", 1, "c", "rebalance"), rig.now)
    rig.nodes["a"].receive("c", Move("s", 9, "c"), rig.now)
    rig.nodes["a"].receive("c", Move("none", 1, "c"), rig.now)
    rig.settle()
    assert [t.outcome for t in rig.told] == [
        MoveOutcome.STARTED, MoveOutcome.NOT_OWNER, MoveOutcome.UNKNOWN,
    ]  # fmt: skip
    assert rig.owner("a").node == "c"
