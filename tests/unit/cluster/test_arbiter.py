"""Who may give tokens of a session. All orders of events: `tests/sim/test_migration_model.py`."""

import pytest

from sllm_node.cluster.arbiter import (
    ROUNDS_MAX,
    TRANSITIONS,
    Accept,
    Arbiter,
    Close,
    EntryEvent,
    EntryState,
    Extend,
    Open,
)
from sllm_node.core.errors import MessageFormatError


def serving(position=0):
    arbiter = Arbiter(position)
    assert arbiter.placed() == Open(1)
    return arbiter


def moving(position=3):
    arbiter = serving(position)
    assert arbiter.move() == Open(2, is_held=True)
    return arbiter


def handed_over():
    arbiter = moving()
    arbiter.stands(2, 3)
    arbiter.go_on(is_near=True)
    return arbiter


def test_a_state_table_names_every_state_and_leaves_the_last_one_by_no_event():
    assert set(TRANSITIONS) == set(EntryState)
    assert TRANSITIONS[EntryState.ENDED] == {}
    assert {event for row in TRANSITIONS.values() for event in row} == set(EntryEvent)


def test_only_the_owners_tokens_count_and_each_position_once():
    arbiter = moving()
    assert arbiter.take(1, 3, 2, is_last=False) == (Accept(),)
    assert arbiter.take(2, 5, 1, is_last=False) == ()
    assert arbiter.position == 5
    for wrong in (3, 4, 6):
        with pytest.raises(MessageFormatError, match=f"tokens at {wrong} .* at 5"):
            arbiter.take(1, wrong, 1, is_last=False)


def test_a_destination_that_lacks_much_gets_a_round_and_one_that_lacks_little_the_session():
    arbiter = moving()
    arbiter.take(1, 3, 2, is_last=False)
    assert not arbiter.is_reached
    assert arbiter.stands(2, 3)
    assert arbiter.lacking == 2
    assert arbiter.go_on(is_near=False) == (Extend(2, 3),)
    arbiter.take(1, 5, 1, is_last=False)
    assert not arbiter.stands(2, 3)
    assert not arbiter.is_reached
    arbiter.stands(2, 5)
    assert arbiter.go_on(is_near=True) == (Close(1, is_left=True), Extend(2, 5, lets_go=True))
    assert arbiter.take(1, 6, 1, is_last=False) == ()
    assert arbiter.take(2, 6, 1, is_last=False) == (Accept(),)
    assert arbiter.state is EntryState.SERVING


def test_tokens_that_came_since_a_move_began_are_not_taken_for_sent():
    arbiter = moving()
    arbiter.take(1, 3, 5, is_last=False)
    arbiter.stands(2, 3)
    assert arbiter.is_reached


def test_rounds_have_an_end():
    arbiter = moving()
    for _ in range(ROUNDS_MAX):
        arbiter.take(1, arbiter.position, 9, is_last=False)
        arbiter.stands(2, arbiter.position)
        assert len(arbiter.go_on(is_near=False)) == 1
    assert arbiter.go_on(is_near=False)[-1] == Extend(2, arbiter.position, lets_go=True)


def test_a_lost_source_is_not_waited_for_and_its_destination_gets_the_session_as_soon_as_it_is_there():
    arbiter = moving()
    assert arbiter.lost(1) == (Close(1),)
    assert arbiter.state is EntryState.ORPHANED
    assert arbiter.take(1, 3, 1, is_last=False) == ()
    arbiter.stands(2, 3)
    assert arbiter.go_on(is_near=False) == (Extend(2, 3, lets_go=True),)
    assert arbiter.owner == 2


def test_a_lost_destination_changes_nothing_unless_the_source_is_lost_too():
    arbiter = moving()
    assert arbiter.lost(2) == (Close(2),)
    assert (arbiter.state, arbiter.owner) == (EntryState.SERVING, 1)
    assert arbiter.move() == Open(3, is_held=True)
    assert arbiter.lost(2) == ()  # late news of a destination that was given up
    arbiter.lost(1)
    assert arbiter.lost(3) == (Close(3),)
    assert arbiter.state is EntryState.SEEKING
    assert arbiter.placed() == Open(4)


def test_a_new_owner_that_is_lost_is_replaced():
    arbiter = handed_over()
    assert arbiter.lost(1) == ()
    assert arbiter.lost(2) == (Close(2),)
    assert arbiter.state is EntryState.SEEKING


def test_a_session_that_finishes_while_it_moves_gives_up_the_destination():
    arbiter = moving()
    assert arbiter.take(1, 3, 1, is_last=True) == (Accept(), Close(2))
    assert arbiter.is_over


@pytest.mark.parametrize(
    ("made", "closes"),
    [
        (lambda: Arbiter(0), ()), (serving, (Close(1),)), (moving, (Close(1), Close(2))),
        (handed_over, (Close(2),)),
    ],
    ids=["seeking", "serving", "moving", "handed over"],
)  # fmt: skip
def test_a_session_that_is_stopped_closes_all_that_is_open(made, closes):
    arbiter = made()
    assert arbiter.stop() == closes
    assert (arbiter.owner, arbiter.destination, arbiter.is_over) == (None, None, True)


def test_an_event_without_an_entry_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="move of a session that is moving"):
        moving().move()
    arbiter = serving()
    arbiter.stop()
    with pytest.raises(AssertionError, match="stopped of a session that is ended"):
        arbiter.stop()
