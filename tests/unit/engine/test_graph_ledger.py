"""Which steps are captured, which graphs are let go, and what is remembered of failures."""

import random

from sllm_node.engine.graph_ledger import GraphLedger, Key, Turn

A, B = object(), object()


def used(ledger, kind, count=1, owner=A):
    """Use a step; return what was done about it."""
    key = Key(owner, kind)
    turn = ledger.turn(key, count)
    if turn is Turn.CAPTURE:
        ledger.captured(key, count)
    return turn


def test_a_step_is_captured_when_it_comes_again_and_replayed_from_then_on():
    ledger = GraphLedger(4)
    turns = [used(ledger, 1) for _ in range(4)]
    assert turns == [Turn.PLAIN, Turn.CAPTURE, Turn.REPLAY, Turn.REPLAY]
    assert used(ledger, 1, owner=B) is Turn.PLAIN
    assert ledger.graphs == ledger.graphs_of(A) == 1


def test_what_was_used_longest_ago_is_let_go():
    ledger = GraphLedger(3)
    for kind in (1, 2, 3):
        used(ledger, kind)
        used(ledger, kind)
    used(ledger, 1)
    ledger.turn(Key(A, 4), 1)
    ledger.turn(Key(A, 4), 1)
    assert ledger.captured(Key(A, 4), 1) == [Key(A, 2)]
    assert [used(ledger, kind) for kind in (1, 3, 4)] == [Turn.REPLAY] * 3


def test_steps_of_several_graphs_make_room_for_each_other_as_a_whole():
    ledger = GraphLedger(10)
    for kind in (1, 2, 3):
        used(ledger, kind, 3)
        used(ledger, kind, 3)
    ledger.turn(Key(B, 4), 5)
    ledger.turn(Key(B, 4), 5)
    assert ledger.captured(Key(B, 4), 5) == [Key(A, 1), Key(A, 2)]
    assert ledger.graphs == 8
    assert ledger.graphs_of(B) == 5


def test_a_step_of_more_graphs_than_there_may_be_is_never_captured():
    ledger = GraphLedger(3)
    assert {used(ledger, 1, 4) for _ in range(5)} == {Turn.PLAIN}


def test_what_could_not_be_captured_is_not_tried_again_until_its_owner_is_gone():
    ledger, key = GraphLedger(3), Key(A, 1)
    assert [ledger.turn(key, 1), ledger.turn(key, 1)] == [Turn.PLAIN, Turn.CAPTURE]
    ledger.failed(key)
    assert {ledger.turn(key, 1) for _ in range(5)} == {Turn.PLAIN}
    assert ledger.forget(A) == []
    assert [used(ledger, 1), used(ledger, 1)] == [Turn.PLAIN, Turn.CAPTURE]


def test_steps_that_there_is_no_room_for_do_not_capture_each_other_away():
    ledger = GraphLedger(2)
    turns = [used(ledger, kind) for _ in range(256) for kind in (1, 2, 3)]
    assert turns.count(Turn.CAPTURE) <= 24


def taking_turns(ledger, rounds, uses):
    """Let the steps of two models, for one of which there is room, take turns of so many uses."""
    for _ in range(rounds):
        for owner in (B, A):
            for _ in range(uses):
                used(ledger, 1, 3, owner)


def test_where_there_is_room_again_a_step_is_captured_as_if_for_the_first_time():
    ledger = GraphLedger(4)
    taking_turns(ledger, 6, 1000)
    used(ledger, 1, 3, B)
    assert [ledger.graphs_of(owner) for owner in (A, B)] == [3, 0]
    ledger.forget(A)
    assert used(ledger, 1, 3, B) is Turn.CAPTURE


def test_a_step_that_others_replace_again_and_again_is_captured_after_a_bounded_number_of_uses():
    ledger = GraphLedger(4)
    taking_turns(ledger, 40, 1000)
    turns = [used(ledger, 1, 3, B) for _ in range(257)]
    assert Turn.CAPTURE in turns


def test_an_owner_that_goes_takes_its_graphs_along():
    ledger = GraphLedger(8)
    for owner in (A, B):
        used(ledger, 1, owner=owner)
        used(ledger, 1, owner=owner)
    assert ledger.forget(A) == [Key(A, 1)]
    assert (ledger.graphs, ledger.graphs_of(A)) == (1, 0)
    assert used(ledger, 1, owner=B) is Turn.REPLAY


def test_there_are_never_more_graphs_than_the_bound():
    draw, ledger = random.Random(5), GraphLedger(20)
    for _ in range(5000):
        kind = draw.randrange(12)
        used(ledger, kind, 1 + kind % 5, draw.choice((A, B)))
        assert ledger.graphs <= 20
        assert ledger.graphs == ledger.graphs_of(A) + ledger.graphs_of(B)
        if draw.random() < 0.01:
            ledger.forget(draw.choice((A, B)))
