"""Placement over several devices."""

from sllm_node.core.errors import ModelTooLargeError, PinnedMemoryError
from sllm_node.core.types import ModelState
from sllm_node.schedule.actions import Evict
from tests.unit.schedule.board import A, B, Board, C, granted, refused, start

TWO = {"cuda:0": 8, "cuda:1": 8}


def test_a_model_goes_where_most_room_is():
    board = Board(capacity={"cuda:0": 8, "cuda:1": 9})
    assert board.request(A) == [start(A, "cuda:1")]
    assert board.request(B) == [start(B, "cuda:0")]
    assert board.request(C) == [start(C, "cuda:1")]


def test_loads_to_two_devices_run_at_once():
    board = Board(capacity=TWO)
    assert board.request(A, size=8) + board.request(B, size=8) == [
        start(A, "cuda:0"),
        start(B, "cuda:1"),
    ]
    assert granted(board.loaded(B)) == [2]
    assert granted(board.loaded(A)) == [1]


def test_a_free_device_is_preferred_to_an_idle_victim():
    board = Board(capacity=TWO)
    board.rest(A, size=8)
    assert board.request(B, size=8) == [start(B, "cuda:1")]


def test_a_device_with_room_is_preferred_to_one_that_is_still_being_emptied():
    board = Board(capacity=TWO, keep_alive_s=5.0)
    board.rest(A, size=8)
    board.serve(B)
    assert board.wait(5) == [Evict(A, "keep_alive")]
    assert board.request(C) == [start(C, "cuda:1")]


def test_who_waits_for_a_victim_on_several_devices_leaves_free_room_to_others():
    board = Board(capacity={"x": 8, "y": 8})
    board.serve(A, size={"x": 8, "y": 2}, priority=-1)
    assert board.request(B, size=8) == []  # on either device, when A is gone
    assert board.request(C, size=3) == [start(C, "y")]


def test_the_victim_is_the_one_used_longest_ago_on_any_device():
    board = Board(capacity=TWO)
    for model in (A, B):
        board.wait(1)
        board.rest(model, size=8)
    board.wait(1)
    board.finish(board.serve_again(A))
    assert board.request(C, size=8) == [Evict(B, "room")]
    assert board.evicted(B) == [start(C, "cuda:1")]


def test_a_model_goes_back_to_where_part_of_it_may_still_lie():
    board = Board(capacity=TWO)
    board.rest(A)
    board.rest(B, size=8)
    assert board.request(C, size=8) == [Evict(A, "room")]
    board.evicted(A)
    board.loaded(C)
    board.finish(board.tickets)
    board.wait(1)
    board.finish(board.serve_again(B, size=8))
    assert board.request(A) == [Evict(C, "room")]
    assert board.evicted(C) == [start(A, "cuda:0")]


def test_a_split_model_takes_its_share_of_each_device():
    board = Board(capacity=TWO)
    board.rest(A)
    whole = {"cuda:0": 6, "cuda:1": 6}
    assert board.request(B, size=whole) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B, "cuda:0", "cuda:1")]
    assert board.scheduler.roster.device_bytes == 12
    assert board.scheduler.roster.view(B).devices == ("cuda:0", "cuda:1")
    board.loaded(B)
    assert board.request(C, size=2) == [start(C, "cuda:0")]


def test_evicting_a_split_model_frees_every_device():
    board = Board(capacity=TWO)
    board.rest(A, size={"cuda:0": 6, "cuda:1": 6})
    assert board.request(B, size=8) == [Evict(A, "room")]
    assert board.request(C, size=8) == []
    assert board.evicted(A) == [start(B, "cuda:0"), start(C, "cuda:1")]


def test_what_fits_on_no_device_is_too_large():
    board = Board(capacity=TWO)
    (error,) = refused(board.request(A, size=10)).values()
    assert isinstance(error, ModelTooLargeError)
    assert "needs 10 bytes" in str(error)
    assert "the device has 8 " in str(error)
    (error,) = refused(board.request(B, size={"cuda:0": 4, "cuda:1": 9})).values()
    assert isinstance(error, ModelTooLargeError)
    assert "needs 9 bytes" in str(error)


def test_a_split_model_beside_a_pinned_one_is_told_which_share_lacks_how_much():
    board = Board(capacity=TWO)
    board.rest(A, size=3)
    board.scheduler.on_pin(A, board.now)
    (error,) = refused(board.request(B, size={"cuda:1": 5, "cuda:0": 7})).values()
    assert isinstance(error, PinnedMemoryError)
    assert (error.needed, error.left) == (7, 5)


def test_pins_on_one_device_leave_the_other():
    board = Board(capacity=TWO)
    board.rest(A, size=8)
    board.scheduler.on_pin(A, board.now)
    assert board.request(B, size=8) == [start(B, "cuda:1")]
    board.loaded(B)
    board.scheduler.on_pin(B, board.now)
    board.finish(board.tickets)
    (error,) = refused(board.request(C)).values()
    assert isinstance(error, PinnedMemoryError)
    assert board.state(C) is ModelState.IDLE


def test_a_plan_that_closed_a_busy_model_stays_with_it():
    board = Board(capacity=TWO, max_wait_s=5.0)
    first, second = board.serve(A, size=8), board.serve(B, size=8)
    board.request(C, size=8)
    board.wait(5)
    closed = [m for m in (A, B) if board.scheduler.roster.record(m).is_closed]
    assert len(closed) == 1
    other = B if closed == [A] else A
    board.request(other, size=8)
    assert board.scheduler.roster.record(closed[0]).is_closed
    assert not board.scheduler.roster.record(other).is_closed
    assert {first, second} == {1, 2}
