from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.cards import PEERS
from sllm_node.cluster import wire
from sllm_node.cluster.packing import pack
from sllm_node.cluster.reservations import Ask, ReservationId
from sllm_node.cluster.state import BootId, DeviceShare, ReplicaId
from sllm_node.core import errors
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelId,
    SamplingParameters,
    SessionId,
    TokenLogprob,
    Waited,
    Weights,
)
from sllm_node.server.faults import body_of, headers_of, status_of
from tests.unit.server.fake_service import status_of as model_status

REQUEST = GenerationRequest(
    SessionId("r-0"), ModelId("m"), (1, 2, 3), SamplingParameters(logit_bias=((1, 2.0),), seed=2**64 - 1),
    9, stop=("a",), logprobs=2, resumed=(4,), resume="replay", weights=Weights(7, 5, "x"),
)  # fmt: skip
ASK = Ask(
    ReservationId("r-0"), BootId("b"), 3, (DeviceShare("cpu", 5),), (ReplicaId("x"),),
    replica=ReplicaId("m"), places=1,
)  # fmt: skip
CHUNK = GenerationChunk(
    "é", (1, 2), (TokenLogprob(1, "a", -0.5, ((1, "a", -0.5),), 3),), "stop", "a"
)
RECORDS = [
    wire.Waiting(), wire.Waiting(model_status()), wire.Granted(), wire.Granted(Waited(0.5, 2.0), Weights(7, 5, "x")), wire.Tokens(CHUNK, 3), wire.Standing(4),
    wire.Refusal("why", b"doc"), wire.Failed("code", "words", 1.5, "n"),
]  # fmt: skip
READERS = [
    wire.unpack_forward, wire.unpack_describe, wire.unpack_described, wire.unpack_extend,
    wire.unpack_record, wire.unpack_hint, wire.unpack_left,
]  # fmt: skip


def test_what_is_asked_comes_back_as_it_was():
    forward = wire.Forward(REQUEST, ASK, 1, "because", -1.0)
    assert wire.unpack_forward(pack(forward)) == forward
    assert wire.unpack_describe(pack(wire.Describe("m"))).model == "m"
    hint = wire.Hint("m", "r-1")
    assert wire.unpack_hint(pack(hint)) == hint
    head = wire.Described(5, (("config.json", 3),))
    assert wire.unpack_described(pack(head)) == head


def test_a_request_of_an_older_release_names_its_limit():
    known = msgspec.to_builtins(wire.Forward(REQUEST, ASK, 1, "because"))
    assert known[0].pop("open_ended") is False
    assert wire.unpack_forward(msgspec.msgpack.encode(known)).request == REQUEST
    known[0]["of_a_later_one"] = True
    assert wire.unpack_forward(msgspec.msgpack.encode(known)).request == REQUEST


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_as_they_were(record):
    assert wire.unpack_record(pack(record)) == record


@given(st.binary(max_size=100), st.sampled_from(READERS))
def test_noise_is_refused_with_a_typed_error(data, read):
    try:
        read(data)
    except errors.MessageFormatError:
        return


@given(st.data(), st.sampled_from([wire.Forward(REQUEST, ASK, 1, "x"), *RECORDS]))
def test_messages_cut_off_are_refused(data, message):
    whole = pack(message)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    read = wire.unpack_forward if isinstance(message, wire.Forward) else wire.unpack_record
    with pytest.raises(errors.MessageFormatError):
        read(cut)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("wrong", param="n"), errors.PromptTooLongError(9, 4, "the model"),
        errors.NodeFullError(3, 2, 1.5), errors.DrainingError(5.0), errors.EngineError("m", "broke"),
        errors.CancelledByOperatorError("an operator"), errors.ModelNotFoundError("m"),
        errors.QueueTimeoutError("m", 1.0, 2.0), errors.PinnedMemoryError("m", 2, 1, ("x",)),
        errors.RemoteUnreachableError("mirror", "m", "is down"),
    ],
    ids=lambda error: error.code,
)  # fmt: skip
def test_an_error_is_told_to_the_client_as_its_own_node_would(error):
    record = wire.unpack_record(pack(wire.failed(error)))
    assert isinstance(record, wire.Failed)
    told = wire.error_of(record)
    assert type(told) is type(error)
    assert (status_of(told), body_of(told), headers_of(told)) == (
        status_of(error), body_of(error), headers_of(error),
    )  # fmt: skip


def test_a_grant_of_an_older_release_says_nothing_of_what_the_session_waited_for():
    assert wire.unpack_record(msgspec.msgpack.encode(["granted"])) == wire.Granted(None)


def test_which_remote_failed_is_told_and_of_an_older_release_it_is_none():
    error = errors.RemoteUnreachableError(PEERS, "m", "all senders are gone")
    record = wire.unpack_record(pack(wire.failed(error)))
    assert isinstance(record, wire.Failed)
    told = wire.error_of(record)
    assert isinstance(told, errors.RemoteUnreachableError)
    assert told.remote == PEERS
    old = ["failed", error.code, str(error), 10.0, None]
    older = wire.unpack_record(msgspec.msgpack.encode(old))
    assert isinstance(older, wire.Failed)
    assert vars(wire.error_of(older))["remote"] == ""


def test_an_unknown_error_is_an_internal_one_with_its_words():
    told = wire.error_of(wire.Failed("newer_than_this", "its words"))
    assert (type(told), str(told)) == (errors.InternalError, "its words")


@pytest.mark.parametrize("waited_s", [float("nan"), float("inf"), -1.0])
def test_a_request_can_not_have_waited_for_ever_or_less_than_nothing(waited_s):
    request = replace(REQUEST, waited_s=waited_s)
    with pytest.raises(errors.MessageFormatError):
        wire.unpack_forward(pack(wire.Forward(request, ASK, 1, "why")))
