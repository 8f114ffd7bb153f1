from dataclasses import replace

import pytest

from sllm_node.cluster.candidate import PlacementRequest
from sllm_node.cluster.placement import LoadThere, decide
from sllm_node.cluster.reservations import Ask, Granted, Refused, ReservationId, Reservations
from sllm_node.cluster.state import (
    Bandwidths,
    BootId,
    DeviceShare,
    DeviceState,
    HeldModel,
    NodeId,
    NodeState,
    ReplicaId,
    ReplicaState,
    SessionState,
)  # fmt: skip
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, SessionId

MODEL = ModelId("a")


def replica(name, size, slots=1, running=0, **rest):
    sessions = tuple(SessionState(SessionId(f"{name}{i}"), 8, 8) for i in range(running))
    shares = (DeviceShare("d0", size),)
    return ReplicaState(ReplicaId(name), ModelId(name), shares, slots, sessions, **rest)


def state(free=10, replicas=(), name="n0", nvme=1.0):
    return NodeState(
        NodeId(name), BootId("b"), 7, (DeviceState("d0", 32, free),), Bandwidths(1, 1, 4, nvme),
        (HeldModel(MODEL, 8, 8, 0, 8),), tuple(replicas),
    )  # fmt: skip


def ask(name, size=0, **rest):
    shares = (DeviceShare("d0", size),) if size else ()
    return Ask(ReservationId(name), BootId("b"), 1, shares, **rest)


def test_memory_is_promised_once():
    book = Reservations(5.0)
    assert book.ask(ask("x", 8), state(), 1.0) == Granted(ReservationId("x"), 6.0)
    refused = book.ask(ask("y", 8), state(), 2.0)
    assert isinstance(refused, Refused)
    assert refused.state.devices[0].bytes_free == 2
    assert isinstance(book.ask(ask("z", 2), state(), 2.0), Granted)


def test_asking_again_gets_the_same_promise():
    book = Reservations(5.0)
    first = book.ask(ask("x", 8), state(), 1.0)
    assert book.ask(ask("x", 8), state(), 3.0) == first


def test_a_promise_ends_when_it_is_released_or_old():
    book = Reservations(5.0)
    book.ask(ask("x", 8), state(), 1.0)
    assert book.expire(5.9) == []
    assert isinstance(book.ask(ask("y", 8), state(), 6.0), Granted)
    assert book.release(ReservationId("y"))
    assert not book.release(ReservationId("y"))


def test_a_stale_version_is_served_if_what_it_wants_is_there_and_another_boot_never():
    book = Reservations(5.0)
    assert isinstance(book.ask(ask("x", 8), replace(state(), version=99), 0.0), Granted)
    assert isinstance(book.ask(replace(ask("y", 1), boot=BootId("c")), state(), 0.0), Refused)
    assert isinstance(book.ask(ask("y", 1), replace(state(), is_draining=True), 0.0), Refused)


def test_what_an_eviction_leaves_over_is_not_promised_before_it_is_done():
    book, now = Reservations(5.0), state(0, [replica("r", 12)])
    assert isinstance(book.ask(ask("x", 8, evicts=("r",)), now, 0.0), Granted)
    assert isinstance(book.ask(ask("y", 4), now, 0.0), Refused)
    again = book.ask(ask("z", 4, evicts=("r",)), now, 0.0)
    assert isinstance(again, Refused)
    assert again.state.replicas == ()


@pytest.mark.parametrize(
    ("other", "wants"),
    [
        (replica("r", 12, running=1), {"evicts": ("r",)}),
        (replica("r", 12, is_pinned=True), {"evicts": ("r",)}),
        (replica("r", 12, is_pinned=True), {"frees": ("r",)}),
        (replica("s", 12), {"frees": ("r",)}),
        (replica("r", 12, running=1, is_leaving=True), {"frees": ("r",)}),
        (replica("r", 12, running=1, ready_s=1.0), {"frees": ("r",)}),
        (replica("r", 4), {"evicts": ("r",)}),
        (replica("r", 12), {"evicts": ("s",)}),
        (replica("r", 12, slots=0), {"replica": "r", "places": 1}),
    ],
)
def test_a_replica_that_does_not_make_the_room_refuses(other, wants):
    assert isinstance(Reservations(5.0).ask(ask("x", 8, **wants), state(0, [other]), 0.0), Refused)


def test_a_replica_freed_by_moves_counts_as_room():
    now = state(0, [replica("r", 12, running=1)])
    assert isinstance(Reservations(5.0).ask(ask("x", 8, frees=("r",)), now, 0.0), Granted)


def test_places_are_promised_once_and_their_replica_stays():
    book, now = Reservations(5.0), state(0, [replica("r", 12, slots=2, running=1)])
    assert isinstance(book.ask(ask("x", replica="r", places=1), now, 0.0), Granted)
    assert isinstance(book.ask(ask("y", replica="r", places=1), now, 0.0), Refused)
    assert isinstance(book.ask(ask("y", 8, frees=("r",)), now, 0.0), Refused)
    assert isinstance(book.ask(ask("y", replica="gone", places=1), now, 0.0), Refused)


def test_there_is_a_limit_of_promises():
    book = Reservations(5.0, limit=1)
    book.ask(ask("x", 1), state(), 0.0)
    assert isinstance(book.ask(ask("y", 1), state(), 0.0), Refused)


def test_two_entry_nodes_that_decide_at_once_on_one_stale_state_end_on_two_nodes():
    truth = {"n0": state(10, name="n0", nvme=2.0), "n1": state(10, name="n1", nvme=1.0)}
    books = {name: Reservations(5.0) for name in truth}
    views = [ClusterView(), ClusterView()]
    for view in views:
        for node in truth.values():
            view.update(node, 0.0)
    decisions = [decide(view, PlacementRequest(MODEL, 8), 0.0) for view in views]
    assert [d.best.node for d in decisions if isinstance(d, LoadThere)] == ["n0", "n0"]
    first, second = (books["n0"].ask(ask(f"e{i}", 8), truth["n0"], 0.0) for i in range(2))
    assert isinstance(first, Granted)
    assert isinstance(second, Refused)
    views[1].refresh(second.state, 0.0)
    again = decide(views[1], PlacementRequest(MODEL, 8), 0.0)
    assert isinstance(again, LoadThere)
    assert again.best.node == "n1"
    assert isinstance(books["n1"].ask(ask("e1", 8), truth["n1"], 0.0), Granted)
