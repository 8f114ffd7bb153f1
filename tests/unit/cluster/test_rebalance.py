from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.rebalance import Waiter, given_back, places
from sllm_node.core.types import ModelId, SessionId, Weights
from tests.unit.cluster.test_choice import A, M, held, node, replica, view_of


def waiters(*waited_s, model=M, **more):
    return [Waiter(SessionId(f"w{i}"), ModelId(model), s, **more) for i, s in enumerate(waited_s)]


def full(name="a"):
    return node(name, free=80, replicas=(replica(4),))


def test_who_waits_longest_goes_first_and_half_of_the_places_are_counted_on():
    view = view_of(full(), node("b", free=80, replicas=(replica(1),)))
    assert given_back(view, A, waiters(1.0, 5.0, 3.0, 2.0, 0.5), 1.0) == ["w1", "w2"]


def test_one_place_is_enough_for_one():
    view = view_of(full(), node("b", free=80, replicas=(replica(3),)))
    assert given_back(view, A, waiters(2.0, 2.0), 1.0) == ["w0"]


def test_places_of_the_own_node_of_draining_ones_and_of_replicas_that_come_or_go_do_not_count():
    view = view_of(
        node("a", free=80, replicas=(replica(),)),
        node("b", free=80, replicas=(replica(),), is_draining=True),
        node("c", free=80, replicas=(replica(ready_s=1.0),)),
        node("d", free=80, replicas=(replica(is_leaving=True),)),
        full("e"),
    )
    assert given_back(view, A, waiters(9.0), 1.0) == []


def test_who_waits_for_room_that_is_made_stays():
    view = view_of(full(), node("b", free=80, replicas=(replica(),)))
    assert given_back(view, A, waiters(9.0), 1.0, {M}) == []


def test_places_where_a_session_does_not_fit_or_its_weights_are_others_do_not_count():
    small, large = (replace(held(), context_tokens=n, created=n) for n in (128, 512))
    view = view_of(
        full(),
        node("b", free=80, replicas=(replica(),), models=(small,)),
        node("c", free=80, replicas=(replica(3),), models=(large,)),
    )
    given = [len(given_back(view, A, waiters(9.0, 8.0, tokens=n), 1.0)) for n in (128, 129, 513)]
    assert given == [2, 1, 0]
    weights = Weights(512, large.bytes_stored, "x")
    assert len(given_back(view, A, waiters(9.0, 8.0, weights=weights), 1.0)) == 2


@given(st.lists(st.floats(0, 10), max_size=12), st.integers(0, 4), st.floats(0, 5))
def test_never_more_go_than_there_are_places_and_none_too_soon(waited, taken, after_s):
    view = view_of(full(), node("b", free=80, replicas=(replica(taken),)))
    found = given_back(view, A, waiters(*waited), after_s)
    assert len(found) == len(set(found)) <= places(view, M, {A})
    assert all(waited[int(name[1:])] >= after_s for name in found)
