import pytest

from sllm_node.cluster.refusals import CERTIFICATE, TELL_S, Refusals
from sllm_node.core.clock import ManualClock
from sllm_node.core.errors import (
    MisdirectedError,
    PeerDeniedError,
    PeerUnreachableError,
    ProtocolVersionError,
    StrangerError,
    WrongKeyError,
)
from sllm_node.core.types import NodeId

B, C = NodeId("b"), NodeId("c")
DENIED = PeerDeniedError(B, f"wrong_key: {WrongKeyError('a')}")


def warnings(caplog):
    return [
        (record.getMessage(), record.__dict__["peer"])
        for record in caplog.records
        if record.levelname == "WARNING"
    ]


def test_a_peer_that_refuses_us_is_warned_of_once_a_minute(caplog):
    clock = ManualClock(100.0)
    refusals = Refusals(clock)
    for _ in range(3):
        refusals.failed(B, DENIED)
    assert warnings(caplog) == [("a peer refuses this node", "b")]
    clock.advance(TELL_S)
    refusals.failed(B, DENIED)
    refusals.failed(C, DENIED)
    assert [peer for _, peer in warnings(caplog)] == ["b", "b", "c"]


@pytest.mark.parametrize(
    ("reason", "problem"),
    [
        ("wrong_key: a message in the name of 'a' is not signed", "refuses our key"),
        ("unknown_sender: a message", "its cluster file does not have this node"),
        ("protocol_version: a message of protocol 2", "another release"),
        ("404: Not Found", "refuses our messages"),
        (
            "replayed: message 3 of boot 9",
            "knows a later life of this id: does another node run as it?",
        ),
        (CERTIFICATE + "its certificate has expired; ask", "its certificate has expired"),
    ],
)
def test_status_says_why_a_peer_refuses_us_until_it_does_not(reason, problem):
    refusals = Refusals(ManualClock(0.0))
    refusals.failed(B, PeerDeniedError(B, reason))
    assert refusals.problem(B) == problem
    refusals.taken(B)
    assert refusals.problem(B) is None
    refusals.failed(B, PeerDeniedError(B, reason))
    refusals.failed(B, PeerUnreachableError(B, "connection refused"))
    assert refusals.problem(B) is None


def test_whose_messages_we_refuse_is_shown_until_one_is_taken(caplog):
    refusals = Refusals(ManualClock(0.0))
    refusals.refused(WrongKeyError("b"), ("b", "c"))
    assert refusals.problem(B) == "has another key"
    refusals.heard(B)
    assert refusals.problem(B) is None
    refusals.refused(WrongKeyError("b"), ("b", "c"))
    assert warnings(caplog) == [("messages of a peer refused", "b")]
    refusals.refused(MisdirectedError("c", "x", "a"), ("b", "c"))
    refusals.refused(ProtocolVersionError(2, 1), ("b", "c"))  # nobody is named
    assert [peer for _, peer in warnings(caplog)] == ["b", "c"]


def test_strangers_fill_neither_log_nor_memory(caplog):
    refusals = Refusals(ManualClock(0.0))
    for i in range(100):
        refusals.refused(StrangerError(f"x{i}"), ("b",))
    assert warnings(caplog) == [("messages of a peer refused", None)]
    assert len(refusals._told) == 1


def test_a_peer_that_sends_nothing_any_more_is_not_told_as_refused_for_ever():
    clock = ManualClock(0.0)
    refusals = Refusals(clock)
    refusals.refused(WrongKeyError("b"), {"b"})
    assert refusals.problem(B) == "has another key"
    clock.advance(TELL_S)
    assert refusals.problem(B) is None


def test_why_a_message_did_not_get_there_is_known_until_one_does():
    refusals = Refusals(ManualClock(0.0))
    refusals.failed(B, PeerUnreachableError(B, "connection refused"))
    assert refusals.unreachable(B) == "connection refused"
    refusals.failed(B, DENIED)
    assert refusals.unreachable(B) is None
    refusals.failed(B, PeerUnreachableError(B, "no route to host"))
    refusals.taken(B)
    assert refusals.unreachable(B) is None
