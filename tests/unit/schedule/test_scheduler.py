import pytest

from sllm_node.core.errors import (
    CancelledByOperatorError,
    DrainingError,
    LoadFailedError,
    ModelBusyError,
    ModelTooLargeError,
    NodeFullError,
    PinnedMemoryError,
    QueueTimeoutError,
)
from sllm_node.core.types import ModelId, ModelState
from sllm_node.schedule.actions import AbortLoad, Evict, GiveWay, Refuse, Stop, Ticket, TicketId
from sllm_node.schedule.record import TRANSITIONS
from tests.unit.schedule.board import (
    A,
    B,
    Board,
    C,
    ModelConfig,
    grant,
    granted,
    refuse,
    refused,
    shares,
    start,
)

# --- loads ----------------------------------------------------------------------------------------


def test_a_request_for_a_model_that_is_not_on_the_device_starts_its_load():
    assert Board().request(A) == [start(A)]


def test_a_second_request_joins_the_load_under_way():
    board = Board()
    board.request(A)
    assert board.request(A) == []
    assert board.loaded(A) == [grant(1, A), grant(2, A)]


def test_a_request_for_a_ready_model_is_granted_at_once():
    board = Board()
    board.serve(A)
    assert board.request(A) == [grant(2, A)]


def test_two_models_load_at_once_where_both_fit():
    board = Board(capacity=8)
    assert board.request(A) + board.request(B) == [start(A), start(B)]


def test_a_failed_load_refuses_all_who_waited_and_the_next_request_tries_again():
    board = Board()
    board.request(A)
    board.request(A)
    error = LoadFailedError(A, "no reason")
    assert board.load_failed(A, error) == [refuse(1, error), refuse(2, error)]
    assert board.request(A) == [start(A)]


def test_a_failed_load_gives_its_room_to_the_next_model():
    board = Board()
    board.request(A)
    board.request(B)
    assert board.load_failed(A, LoadFailedError(A, "no reason"))[-1] == start(B)


def test_an_event_that_the_state_does_not_know_is_an_assertion():
    board = Board()
    board.request(A)
    with pytest.raises(AssertionError, match="a: evicted in state loading"):
        board.evicted(A)


def test_every_state_is_in_the_table():
    assert set(TRANSITIONS) == set(ModelState)


# --- sessions -------------------------------------------------------------------------------------


def test_sessions_beyond_the_limit_wait_for_one_to_finish():
    board = Board(max_sessions=1)
    board.serve(A)
    assert board.request(A) == []
    assert granted(board.finish(1)) == [2]


def test_of_those_who_wait_for_a_session_the_higher_priority_goes_first():
    board = Board(max_sessions=1)
    board.serve(A)
    board.request(A)
    board.request(A, priority=1)
    assert granted(board.finish(1)) == [3]


def test_a_low_priority_is_not_passed_over_for_longer_than_the_maximum_wait():
    board = Board(max_sessions=1, max_wait_s=10.0)
    board.serve(A)
    board.request(A)
    board.wait(10.0)
    board.request(A, priority=1)
    assert granted(board.finish(1)) == [2]


# --- eviction -------------------------------------------------------------------------------------


def test_an_idle_model_is_evicted_for_a_waiting_one_and_the_load_follows_the_eviction():
    board = Board()
    board.rest(A)
    assert board.request(B) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B)]


def test_a_running_model_is_not_evicted_before_its_last_session_has_ended():
    board = Board()
    board.serve(A)
    board.request(A)
    assert board.request(B) == []
    assert board.finish(1) == []
    assert board.finish(2) == [Evict(A, "room")]


def test_the_least_recently_used_idle_model_is_evicted_first():
    board = Board(capacity=8)
    board.rest(A)
    board.wait(1.0)
    board.rest(B)
    board.wait(1.0)
    board.request(A)
    board.finish(3)
    assert board.request(C) == [Evict(B, "room")]


def test_no_more_is_evicted_than_is_needed():
    board = Board(capacity=10)
    board.rest(A, size=2)
    board.wait(1.0)
    board.rest(B, size=8)
    assert board.request(C, size=7) == [Evict(B, "room")]


def test_a_model_kept_for_ever_is_evicted_for_room_only_after_the_others():
    board = Board(capacity=8)
    board.rest(A, keep_alive_s=-1)
    board.wait(1.0)
    board.rest(B)
    assert board.request(C) == [Evict(B, "room")]


def test_several_idle_models_are_evicted_for_one_that_needs_their_room():
    board = Board(capacity=8)
    board.rest(A)
    board.wait(1.0)
    board.rest(B)
    assert board.request(C, size=8) == [Evict(A, "room"), Evict(B, "room")]
    assert board.evicted(A) == []
    assert board.evicted(B) == [start(C)]


def test_a_request_for_a_model_that_is_being_evicted_loads_it_anew():
    board = Board()
    board.rest(A, keep_alive_s=0)
    assert board.state(A) is ModelState.EVICTING
    assert board.request(A) == []
    assert board.evicted(A) == [start(A)]


def test_a_small_model_starts_in_the_free_room_while_a_large_one_waits():
    board = Board(capacity=10)
    board.serve(A, size=6)
    assert board.request(B, size=8) == []
    assert board.request(C, size=3) == [start(C)]


def test_nothing_starts_in_the_room_of_an_overdue_model():
    board = Board(capacity=10, max_wait_s=5.0)
    board.serve(A, size=6)
    board.request(B, size=8)
    board.wait(5.0)
    assert board.request(C, size=3) == []
    assert board.finish(1) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B)]


def test_an_overdue_model_that_only_loads_keep_out_stops_those_behind_it():
    board = Board(capacity=10, max_wait_s=5.0)
    board.request(A, size=6)
    board.request(B, size=8)
    board.wait(5.0)
    assert board.request(C, size=3) == []


def test_room_that_is_still_being_evicted_is_not_given_away():
    board = Board(capacity=8)
    board.rest(A, keep_alive_s=0)  # leaves, 4 are free
    assert board.request(B) == [start(B)]
    assert board.request(C) == []
    assert board.evicted(A) == [start(C)]


def test_two_that_wait_for_two_evictions_do_not_both_start_after_the_first():
    board = Board(capacity=8)
    for model in (A, B):
        board.rest(model, keep_alive_s=0)
    board.request(C)
    board.request(ModelId("d"))
    assert board.evicted(A) == [start(C)]
    assert board.evicted(B) == [start(ModelId("d"))]


def test_no_second_model_is_evicted_for_room_that_is_coming_already():
    board = Board(capacity=8)
    board.rest(A)
    board.wait(1.0)
    board.rest(B)
    assert board.request(C) == [Evict(A, "room")]
    assert board.scheduler.on_timer(board.now) == []
    assert board.state(B) is ModelState.READY


# --- grouping -------------------------------------------------------------------------------------


def test_requests_of_the_resident_model_go_on_while_the_other_waits_less_than_the_maximum():
    board = Board(max_wait_s=10.0)
    board.serve(A)
    board.request(B)
    board.wait(9.9)
    assert board.request(A) == [grant(3, A)]


def test_after_the_maximum_wait_the_resident_model_is_closed_and_changes_places():
    board = Board(max_wait_s=10.0)
    board.serve(A)
    board.request(B)
    board.wait(10.0)
    assert board.request(A) == []
    assert board.finish(1) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B)]
    assert board.loaded(B) == [grant(2, B)]
    assert board.request(B) == [grant(4, B)]
    board.wait(10.0)
    assert board.request(B) == []


def test_a_plan_does_not_waver_while_it_is_carried_out():
    board = Board(capacity=8, max_wait_s=10.0)
    board.serve(A)
    board.request(A)
    board.serve(B)
    board.request(C)
    board.wait(10.0)  # closes a, the least recently used
    board.wait(1.0)
    board.finish(1)  # a was used last, now
    assert board.request(A) == []
    assert board.finish(2) == [Evict(A, "room")]


def test_a_model_closed_in_vain_opens_again():
    board = Board(max_wait_s=10.0)
    board.serve(A)
    board.request(B)
    board.wait(10.0)
    board.request(A)
    assert board.cancel(2) == [grant(3, A)]


def test_a_higher_priority_closes_a_lower_one_without_waiting():
    board = Board(models={"b": ModelConfig(priority=1)})
    board.serve(A)
    board.request(B)
    assert board.request(A) == []
    assert board.finish(1) == [Evict(A, "room")]


def test_a_lower_priority_that_is_overdue_closes_a_higher_one():
    board = Board(max_wait_s=10.0, models={"a": ModelConfig(priority=1)})
    board.serve(A)
    board.request(B)
    assert board.request(A) == [grant(3, A)]
    board.wait(10.0)
    assert board.request(A) == []


def test_a_priority_that_waits_inside_a_model_protects_it():
    board = Board(max_sessions=1)
    board.serve(A)
    board.request(A, priority=2)
    board.request(B, priority=1)
    assert granted(board.finish(1)) == [2]


def test_the_higher_priority_is_loaded_first():
    board = Board()
    board.serve(A)
    board.request(B)
    board.request(C, priority=1)
    board.finish(1)
    assert board.evicted(A) == [start(C)]


def test_the_one_who_came_first_is_loaded_first_among_equals():
    board = Board()
    board.serve(A)
    board.request(C)
    board.request(B)
    board.finish(1)
    assert board.evicted(A) == [start(C)]


# --- keep-alive -----------------------------------------------------------------------------------


def test_an_idle_model_is_evicted_when_its_keep_alive_has_passed():
    board = Board(keep_alive_s=60.0)
    board.rest(A)
    assert board.wait(59.9) == []
    assert board.wait(0.1) == [Evict(A, "keep_alive")]


def test_the_time_begins_when_the_last_session_ends():
    board = Board(keep_alive_s=60.0)
    board.serve(A)
    board.wait(100.0)
    board.finish(1)
    assert board.scheduler.next_timer() == 160.0
    assert board.scheduler.roster.view(A).keep_alive_until == 160.0


def test_a_keep_alive_of_zero_evicts_as_soon_as_idle():
    board = Board()
    assert board.rest(A, keep_alive_s=0) == [Evict(A, "keep_alive")]


def test_a_keep_alive_of_minus_one_sets_no_timer():
    board = Board(keep_alive_s=-1)
    board.rest(A)
    assert board.scheduler.next_timer() is None


def test_the_latest_request_decides_and_one_without_a_wish_means_the_default():
    board = Board(models={"a": ModelConfig(keep_alive_s=7.0)})
    board.rest(A, keep_alive_s=-1)
    board.request(A)
    board.finish(2)
    assert board.scheduler.next_timer() == 7.0


def test_a_pinned_model_is_not_counted_down_until_it_is_unpinned():
    board = Board(keep_alive_s=60.0, models={"a": ModelConfig(pinned=True)})
    board.rest(A)
    assert board.wait(100.0) == []
    board.scheduler.on_unpin(A, board.now)
    assert board.wait(60.0) == [Evict(A, "keep_alive")]


# --- pins -----------------------------------------------------------------------------------------


def test_a_model_that_cannot_fit_beside_the_pinned_ones_is_refused_at_once():
    board = Board(models={"a": ModelConfig(pinned=True)})
    board.rest(A)
    error = refused(board.request(B))[2]
    assert isinstance(error, PinnedMemoryError)
    assert error.pinned == ("a",)
    assert board.scheduler.next_timer() is None


def test_a_pin_refuses_those_who_wait_for_the_room_it_takes():
    board = Board()
    board.serve(A)
    board.request(B)
    assert refused(board.scheduler.on_pin(A, 0.0)).keys() == {2}


def test_a_pinned_model_is_passed_over_as_a_victim():
    board = Board(capacity=8, models={"a": ModelConfig(pinned=True)})
    board.rest(A)
    board.rest(B)
    assert board.request(C) == [Evict(B, "room")]


def test_a_pin_on_a_model_elsewhere_changes_nothing_for_the_others():
    board = Board()
    board.scheduler.on_pin(A, 0.0)
    assert board.scheduler.on_unpin(A, 0.0) == []
    assert board.request(B) == [start(B)]


# --- limits ---------------------------------------------------------------------------------------


def test_a_model_larger_than_the_device_is_refused_for_good():
    assert isinstance(refused(Board().request(A, size=5))[1], ModelTooLargeError)


def test_a_full_queue_refuses_with_the_expected_wait():
    board = Board(max_queue=1)
    board.serve(A)
    board.request(B, load_s=3.0)
    error = refused(board.request(C, load_s=4.0))[3]
    assert isinstance(error, NodeFullError)
    assert error.retry_after_s == 3.0 + 4.0 + 10.0  # b's load, its own, a session's end


def crowding(board, model, count):
    ticket = Ticket(TicketId(0), model, shares(4), 1.0)
    return board.scheduler.crowding(ticket, count, board.now)


def room(board, model):
    """Return how many tickets of `model` are taken one after another."""
    return next(i for i in range(99) if isinstance(refused_or_none(board, model), NodeFullError))


def refused_or_none(board, model):
    return next(iter(refused(board.request(model)).values()), None)


@pytest.mark.parametrize("waiting", [0, 1, 3, 4])
@pytest.mark.parametrize("state", ["idle", "loading", "ready", "full", "no room", "planned"])
def test_a_crowd_is_refused_if_one_of_it_would_be_and_told_who_waited_before_it(state, waiting):
    board = Board(max_queue=4, max_sessions=2, capacity=4)
    wanted = B if state in ("no room", "planned") else A
    if state != "idle":
        board.request(A)
    if state in ("ready", "full", "no room", "planned"):
        board.loaded(A)
    if state == "full":
        board.request(A)
    if state == "planned":
        board.finish(1)
    for _ in range(waiting):
        board.request(C if state == "ready" else wanted)
    found = {count: crowding(board, wanted, count) for count in range(1, 10)}
    left = room(board, wanted)
    assert [count for count, error in found.items() if error is None] == list(range(1, left + 1))
    told = {str(error).partition(" ")[0] for error in found.values() if error is not None}
    assert len(told) == 1


def test_who_waits_for_a_load_that_has_a_slot_for_them_fills_no_queue():
    board = Board(max_queue=1, max_sessions=2)
    for _ in range(3):
        assert not refused(board.request(A))
    assert isinstance(refused(board.request(A))[4], NodeFullError)
    assert isinstance(refused(board.request(B))[5], NodeFullError)


def test_who_waits_for_evictions_that_make_room_for_a_load_fills_no_queue():
    board = Board(max_queue=1, max_sessions=2)
    board.serve(A)
    board.finish(1)
    for _ in range(3):
        assert not refused(board.request(B))
    assert isinstance(refused(board.request(B))[5], NodeFullError)


def test_the_expected_wait_where_there_is_room_is_that_of_the_loads():
    board = Board(capacity=12, max_queue=1, max_sessions=1)
    board.serve(A)
    board.request(B, load_s=3.0)
    board.request(B)
    error = refused(board.request(C, load_s=4.0))[4]
    assert isinstance(error, NodeFullError)
    assert error.retry_after_s == 3.0 + 4.0


def test_a_full_queue_does_not_keep_out_those_who_need_not_wait():
    board = Board(max_queue=1)
    board.serve(A)
    board.request(B)
    assert board.request(A) == [grant(3, A)]


def test_the_expected_wait_for_a_session_of_a_full_model_comes_from_observed_sessions():
    board = Board(max_queue=1, max_sessions=1)
    board.serve(A)
    board.wait(4.0)
    board.finish(1)
    board.request(A)
    board.request(A)
    error = refused(board.request(A))[4]
    assert isinstance(error, NodeFullError)
    assert error.retry_after_s == 4.0 + 4.0


def test_who_waits_for_longer_than_the_limit_is_refused():
    board = Board(queue_timeout_s=20.0)
    board.serve(A)
    board.request(B)
    assert board.wait(19.9) == []
    error = refused(board.wait(0.1))[2]
    assert isinstance(error, QueueTimeoutError)
    assert board.state(B) is ModelState.IDLE


# --- cancelling -----------------------------------------------------------------------------------


def test_a_load_that_nobody_waits_for_any_more_is_aborted():
    board = Board()
    board.request(A)
    assert board.cancel(1) == [AbortLoad(A)]
    assert board.request(B) == []
    assert board.evicted(A) == [start(B)]


def test_a_load_that_others_wait_for_goes_on():
    board = Board()
    board.request(A)
    board.request(A)
    assert board.cancel(1) == []


def test_the_load_of_a_pinned_model_goes_on():
    board = Board(models={"a": ModelConfig(pinned=True)})
    board.request(A)
    assert board.cancel(1) == []
    assert board.loaded(A) == []


def test_a_cancelled_request_in_the_queue_is_forgotten():
    board = Board()
    board.serve(A)
    board.request(B)
    board.cancel(2)
    assert (board.state(B), board.scheduler.roster.waiting, board.scheduler.roster.running) == (
        ModelState.IDLE, 0, 1)  # fmt: skip


# --- operators ------------------------------------------------------------------------------------


def test_a_load_request_ends_when_the_model_is_on_the_device():
    board = Board(max_sessions=1)
    board.request(A)
    board.request(A)
    board.request(A, session=False)
    assert board.loaded(A) == [grant(3, A), grant(1, A)]


def test_a_load_request_for_a_ready_model_ends_at_once():
    board = Board()
    board.serve(A)
    assert board.request(A, session=False) == [grant(2, A)]
    assert board.scheduler.roster.running == 1


def test_a_preloaded_model_is_counted_down():
    board = Board(keep_alive_s=60.0)
    board.request(A, session=False)
    board.loaded(A)
    assert board.wait(60.0) == [Evict(A, "keep_alive")]


def test_a_preloaded_model_without_keep_alive_stays_for_its_first_session():
    board = Board(keep_alive_s=0)
    board.request(A, session=False)
    assert board.loaded(A) == [grant(1, A)]
    assert board.request(A) == [grant(2, A)]
    assert board.finish(2) == [Evict(A, "keep_alive")]


def test_a_keep_alive_that_has_run_out_does_not_count_for_the_next_load():
    board = Board(keep_alive_s=0)
    board.rest(A)
    board.evicted(A)
    board.request(A, session=False)
    assert board.loaded(A) == [grant(2, A)]


@pytest.mark.parametrize("wished_s", [0.0, 1.0, -1.0])
def test_a_keep_alive_of_a_request_ends_with_the_residency_that_it_was_for(wished_s):
    board = Board(keep_alive_s=300)
    board.rest(A, keep_alive_s=wished_s)
    board.scheduler.on_unload_request(A, board.now, force=True)
    board.evicted(A)
    board.request(A, session=False)
    board.loaded(A)
    assert board.scheduler.roster.view(A).keep_alive_until == board.now + 300


def test_unloading_an_idle_model_evicts_it():
    board = Board()
    board.rest(A)
    assert board.scheduler.on_unload_request(A, 0.0, force=False) == [Evict(A, "operator")]


def test_unloading_a_model_that_is_not_there_does_nothing():
    assert Board().scheduler.on_unload_request(A, 0.0, force=False) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_pinned_model_is_not_unloaded(force):
    board = Board(models={"a": ModelConfig(pinned=True)})
    board.rest(A)
    with pytest.raises(ModelBusyError, match="pinned"):
        board.scheduler.on_unload_request(A, 0.0, force=force)


def test_a_model_in_use_is_unloaded_by_force_only():
    board = Board(max_sessions=1)
    board.serve(A)
    board.request(A)
    with pytest.raises(ModelBusyError, match="1 sessions run, 1 requests wait"):
        board.scheduler.on_unload_request(A, 0.0, force=False)
    stopped, turned_away, evict = board.scheduler.on_unload_request(A, 0.0, force=True)
    assert isinstance(stopped, Stop)
    assert isinstance(turned_away, Refuse)
    assert isinstance(stopped.error, CancelledByOperatorError)
    assert (stopped.ticket, turned_away.ticket, evict) == (1, 2, Evict(A, "operator"))


def test_unloading_by_force_aborts_a_load():
    board = Board()
    board.request(A)
    assert board.scheduler.on_unload_request(A, 0.0, force=True)[-1] == AbortLoad(A)


# --- failures and replaced checkpoints ------------------------------------------------------------


def test_a_replica_that_failed_last_is_evicted_and_the_next_request_gets_a_new_one():
    board = Board()
    board.rest(A)
    assert board.scheduler.on_failed(A, 0.0) == [Evict(A, "failed")]
    assert board.scheduler.on_failed(A, 0.0) == []
    board.request(A)
    assert board.evicted(A) == [start(A)]


def test_a_replica_that_failed_one_session_is_left_to_the_others():
    board = Board()
    board.serve(A)
    board.request(A)
    board.finish(1)
    assert board.scheduler.on_failed(A, 0.0) == []
    assert board.request(A) == [grant(3, A)]


def test_a_replaced_checkpoint_serves_only_the_sessions_that_run():
    board = Board()
    board.serve(A)
    assert board.scheduler.on_replaced(A, 0.0) == []
    assert board.request(A) == []
    assert board.request(A, session=False) == []
    assert board.finish(1) == [Evict(A, "replaced")]
    assert board.evicted(A) == [start(A)]


def test_a_checkpoint_replaced_by_a_larger_one_is_loaded_by_its_new_size():
    board = Board(capacity=8)
    board.rest(A)
    board.rest(B)
    assert board.scheduler.on_replaced(A, 0.0) == [Evict(A, "replaced")]
    board.request(A, size=6)
    assert board.evicted(A) == [Evict(B, "room")]
    assert board.evicted(B) == [start(A)]
    assert board.scheduler.roster.device_bytes == 6


def test_a_checkpoint_replaced_while_it_loads_serves_nobody():
    board = Board()
    board.request(A)
    board.request(A, session=False)
    board.scheduler.on_replaced(A, 0.0)
    assert board.loaded(A) == [Evict(A, "replaced")]


# --- drain ----------------------------------------------------------------------------------------


def test_a_draining_node_refuses_new_requests():
    board = Board()
    board.serve(A)
    assert board.scheduler.on_drain(0.0) == []
    error = refused(board.request(A))[2]
    assert isinstance(error, DrainingError)
    assert error.retry_after_s == 1.0
    assert board.scheduler.is_draining


def test_a_drain_serves_those_whose_model_is_there_or_coming_and_refuses_the_others():
    board = Board(capacity=8, max_sessions=1)
    board.serve(A)
    board.request(A)
    board.request(B)
    board.request(C)
    assert refused(board.scheduler.on_drain(0.0)).keys() == {4}
    assert granted(board.loaded(B)) == [3]
    assert granted(board.finish(1)) == [2]


def test_a_drain_refuses_those_whose_model_is_being_evicted():
    board = Board()
    board.rest(A, keep_alive_s=0)
    board.request(A)
    assert board.state(A) is ModelState.EVICTING
    assert len(refused(board.scheduler.on_drain(0.0))) == 1
    assert board.evicted(A) == []


def test_those_whose_model_begins_to_leave_during_a_drain_are_refused_in_the_same_event():
    board = Board()
    board.serve(A)
    board.scheduler.on_replaced(A, 0.0)
    board.request(A)
    board.scheduler.on_drain(0.0)
    actions = board.finish(1)
    assert Evict(A, "replaced") in actions
    assert refused(actions).keys() == {2}


def test_a_drain_opens_a_model_that_was_closed_for_another():
    board = Board(max_wait_s=10.0)
    board.serve(A)
    board.request(B)
    board.wait(10.0)
    board.request(A)
    assert granted(board.scheduler.on_drain(10.0)) == [3]


# --- what comes -----------------------------------------------------------------------------------


def coming(board):
    return [
        (r.model, r.devices)
        for r in board.scheduler.roster.replicas()
        if r.state is ModelState.QUEUED
    ]


def test_a_model_that_waits_for_evictions_only_is_told_to_come():
    board = Board()
    board.rest(A)
    board.request(B, load_s=2.0)
    assert coming(board) == [(B, ("cpu",))]
    assert board.scheduler.roster.view(B).devices == ("cpu",)
    board.evicted(A)
    assert coming(board) == []


def test_a_model_that_waits_for_sessions_is_not_told_to_come():
    board = Board()
    board.serve(A)
    board.request(B, priority=1)
    assert board.scheduler.roster.replicas()[0].is_leaving
    assert coming(board) == []
    board.finish(1)
    assert coming(board) == [(B, ("cpu",))]


def test_what_a_closed_model_leaves_over_is_no_room_that_comes():
    board = Board(capacity=12)
    board.serve(A, size=8)
    board.request(B, size=6, priority=2)  # with the 4 that are free it has 6 to spare
    board.request(C, size=6, priority=1)
    assert coming(board) == []


def test_a_model_that_nobody_waits_for_any_more_does_not_come():
    board = Board()
    board.rest(A)
    board.request(B)
    board.cancel(2)
    assert coming(board) == []


# --- hints ----------------------------------------------------------------------------------------


def test_a_hint_begins_what_has_room_or_idle_models_that_suffice():
    board = Board()
    assert board.hint(A) == [start(A)]
    board.loaded(A)
    assert board.hint(B) == [Evict(A, "room")]
    assert coming(board) == [(B, ("cpu",))]


def test_a_hint_evicts_nobody_where_idle_models_do_not_suffice():
    board = Board(capacity=8)
    board.serve(A)
    board.rest(B)
    assert board.hint(C, size=8) is None
    assert (board.state(B), board.state(C)) == (ModelState.READY, ModelState.IDLE)


def test_a_hint_for_a_model_of_higher_priority_closes_nobody():
    board = Board(capacity=8, models={"c": ModelConfig(priority=1)})
    board.serve(A)
    board.rest(B)
    assert board.hint(C, size=8) is None
    assert not any(replica.is_leaving for replica in board.scheduler.roster.replicas())


def test_a_hint_does_not_wait_for_what_a_closed_model_will_leave():
    board = Board(capacity=12)
    board.serve(A, size=8)
    board.request(B, size=6, priority=2)
    assert board.hint(C, size=6) is None
    assert board.hint(C) is None  # the 4 that are free are B's


def test_a_hint_gives_way_to_a_session_that_needs_its_room():
    board = Board()
    board.rest(A)
    board.hint(B)
    hint = board.tickets
    assert board.request(C) == [GiveWay(TicketId(hint), B)]
    assert board.state(B) is ModelState.IDLE
    assert board.evicted(A) == [start(C)]


def test_a_hint_gives_way_to_sessions_of_the_model_that_was_evicted_for_it():
    board = Board()
    board.rest(A)
    board.hint(B)
    hint = board.tickets
    assert board.request(A) == []
    assert board.evicted(A) == [start(A), GiveWay(TicketId(hint), B)]


def test_a_load_that_only_a_hint_began_is_aborted_for_a_session_that_needs_its_room():
    board = Board()
    assert board.hint(A) == [start(A)]
    hint = board.tickets
    assert board.request(B) == [GiveWay(TicketId(hint), A), AbortLoad(A)]
    assert coming(board) == [(B, ("cpu",))]
    assert board.evicted(A) == [start(B)]
    assert granted(board.loaded(B)) == [board.tickets]
    assert board.state(A) is ModelState.IDLE


def test_a_load_that_somebody_else_waits_for_is_not_aborted_for_a_session():
    for joins in (True, False):
        board = Board()
        board.hint(A)
        assert board.request(A, session=joins) == []
        assert board.request(B) == []
        assert board.state(A) is ModelState.LOADING


def test_a_pinned_load_is_not_aborted_for_a_session():
    board = Board()
    board.hint(A)
    board.scheduler.on_pin(A, board.now)
    board.request(B)
    assert board.state(A) is ModelState.LOADING


def test_no_load_is_aborted_where_idle_models_or_another_device_make_the_room():
    board = Board(capacity=8)
    board.rest(A)
    board.hint(B)
    assert board.request(C) == [Evict(A, "room")]
    board = Board(capacity={"x": 4, "y": 4})
    board.hint(A)
    assert [type(action).__name__ for action in board.request(B)] == ["StartLoad"]
    assert board.state(A) is ModelState.LOADING


def test_a_hint_aborts_no_load_of_another_hint():
    board = Board()
    board.hint(A)
    assert board.hint(B) is None
    assert board.state(A) is ModelState.LOADING


def test_a_load_of_a_hint_is_aborted_before_a_running_model_is_closed():
    board = Board(capacity=8, max_wait_s=1.0)
    board.serve(A)
    board.hint(B)
    hint = board.tickets
    assert board.request(C, priority=1) == [GiveWay(TicketId(hint), B), AbortLoad(B)]
    assert granted(board.request(A)) == [board.tickets]


def test_of_two_loads_of_hints_the_one_that_began_last_is_aborted():
    board = Board(capacity=8)
    board.hint(A)
    board.wait(1.0)
    board.hint(B)
    assert AbortLoad(B) in board.request(C)
    assert board.state(A) is ModelState.LOADING


def test_a_hint_stands_while_there_is_room_for_all():
    board = Board(capacity=8)
    board.rest(A, size=8)
    board.hint(B)
    assert board.request(C) == []
    assert [model for model, _ in coming(board)] == [B, C]
    assert board.evicted(A) == [start(C), start(B)]


def test_a_hint_is_never_overdue():
    board = Board(capacity=8, max_wait_s=1.0)
    board.rest(A, size=8)
    board.hint(B)
    board.wait(2.0)
    assert board.request(C) == []
    assert board.evicted(A) == [start(C), start(B)]


def test_a_session_that_joins_a_hint_has_its_own_age():
    board = Board(max_wait_s=2.0)
    board.rest(A)
    board.hint(B)
    board.wait(1.5)
    board.request(B)
    board.request(C, priority=1)
    board.wait(1.0)  # the hint would be overdue
    assert board.evicted(A) == [start(C)]


# --- room by moves --------------------------------------------------------------------------------


def promise(board, model, *others):
    return board.scheduler.on_promise(model, frozenset(others), board.now)


def test_a_model_that_is_promised_room_closes_the_other_and_loads_when_its_sessions_have_left():
    board = Board()
    board.serve(A)
    board.request(B)
    assert promise(board, B, A) == []
    assert board.scheduler.roster.replicas()[0].is_leaving
    assert board.request(A) == []  # it waits
    assert board.finish(1) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B)]  # though a session of A waits
    assert not any(replica.is_leaving for replica in board.scheduler.roster.replicas())


def test_promised_room_is_not_taken_by_those_who_come_later():
    board = Board(capacity=8)
    board.serve(A)
    board.request(B, size=8)
    promise(board, B, A)
    assert board.request(C) == []  # it would fit beside A
    assert board.finish(1) == [Evict(A, "room")]
    assert board.evicted(A) == [start(B)]


def test_a_promise_that_is_taken_back_opens_the_other_again():
    board = Board()
    board.serve(A)
    board.request(B)
    promise(board, B, A)
    board.request(A)
    assert promise(board, B) == [grant(3, A)]


def test_a_promise_ends_with_the_last_who_waits():
    board = Board()
    board.serve(A)
    board.request(B)
    promise(board, B, A)
    board.cancel(2)
    assert not board.scheduler.roster.replicas()[0].is_leaving
    board.request(B)
    assert not board.scheduler.roster.replicas()[0].is_leaving


def test_no_room_is_promised_of_pinned_models_nor_of_those_of_a_higher_priority_nor_to_who_does_not_wait():
    board = Board(models={"c": ModelConfig(priority=1)})
    board.serve(A)
    assert promise(board, B, A) is None
    board.request(B)
    board.scheduler.on_pin(A, board.now)
    assert promise(board, B, A) is None
    board = Board(models={"c": ModelConfig(priority=1)})
    board.serve(C)
    board.request(B)
    assert promise(board, B, C) is None


# --- who waited elsewhere before ------------------------------------------------------------------


def test_who_was_given_back_elsewhere_goes_before_those_who_came_later_than_it():
    board = Board(max_sessions=1)
    first = board.serve(A)
    board.request(A)
    board.wait(3.0)
    board.request(A, waited_s=5.0)
    board.request(A, waited_s=1.0)
    order = []
    for _ in range(3):
        (first,) = granted(board.finish(first))
        order.append(first)
    assert order == [3, 2, 4]


def test_the_longest_wait_before_another_model_is_displaced_counts_from_the_first_arrival():
    board = Board(max_wait_s=10.0)
    board.serve(A)
    board.request(B, waited_s=9.0)
    board.request(A)  # granted: nobody is overdue
    assert board.scheduler.roster.view(A).running == 2
    board.wait(1.0)
    board.finish(1)
    board.request(A)
    assert board.scheduler.roster.view(A).waiting == 1


def test_the_limit_of_the_queue_counts_from_the_first_arrival():
    board = Board(max_sessions=1, queue_timeout_s=10.0)
    board.serve(A)
    board.request(A, waited_s=8.0)
    assert refused(board.wait(1.9)) == {}
    assert refused(board.wait(0.2)).keys() == {2}


def test_who_comes_overdue_is_granted_where_there_is_a_place():
    board = Board(max_sessions=2, queue_timeout_s=10.0)
    board.serve(A)
    assert granted(board.request(A, waited_s=60.0)) == [2]
    assert refused(board.request(A, waited_s=60.0)).keys() == {3}
