import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.messages import PROTOCOL
from sllm_node.cluster.migration_messages import (
    FRAME_LIMIT,
    MESSAGES_MAX,
    TOKENS_MAX,
    Accepted,
    Attempt,
    Dropped,
    Grant,
    Move,
    Moved,
    MoveOutcome,
    Piece,
    Prepare,
    Reason,
    Release,
    Round,
    Standing,
    Tokens,
    decode_frame,
    encode_frames,
)
from sllm_node.core.errors import (
    MessageError,
    MessageFormatError,
    MessageTooLargeError,
    ProtocolVersionError,
)
from sllm_node.core.types import TokenLogprob
from tests.unit.cluster.migration_rig import session_request

ATTEMPT = Attempt(1 << 61, 7)
ALL = (
    Prepare("s", 1, session_request(prompt=(), stop=("end",)), 3, "promise"),
    Round("s", 1, ATTEMPT, 0, (1, 2, 151_000)),
    Standing("s", 1, ATTEMPT, is_ready=True, held=3, computed=2),
    Grant("s", 1, ATTEMPT, 3, ()),
    Tokens("s", 1, 3, (Piece((4,), "é", (TokenLogprob(4, "é", -0.5),), "stop", "x", 2),)),
    Accepted("s", 1, ATTEMPT, 4, asks=True),
    Release("s", 1),
    Dropped("s", 1, ATTEMPT, Reason.MEMORY),
    Move("s", 1, "b", "drain"),
    Moved("s", 1, MoveOutcome.STARTED),
)


def test_what_was_encoded_is_decoded():
    (frame,) = encode_frames(ALL, FRAME_LIMIT)
    assert decode_frame(frame, FRAME_LIMIT) == ALL


def test_a_token_costs_at_most_five_bytes_and_the_largest_round_fits():
    (frame,) = encode_frames([Round("s", 1, ATTEMPT, 0, (151_000,) * TOKENS_MAX)], FRAME_LIMIT)
    assert len(frame) <= 5 * TOKENS_MAX + 100


def test_messages_are_spread_over_frames_in_their_order():
    messages = [Release("s", 1 + index) for index in range(2 * MESSAGES_MAX)]
    frames = encode_frames(messages, FRAME_LIMIT)
    assert len(frames) == 2
    assert [m for frame in frames for m in decode_frame(frame, FRAME_LIMIT)] == messages
    assert all(len(frame) <= 200 for frame in encode_frames(messages, 200))


def test_a_message_above_the_limit_is_neither_sent_nor_read():
    with pytest.raises(MessageTooLargeError):
        encode_frames([Round("s", 1, ATTEMPT, 0, (1,) * 500)], 400)
    with pytest.raises(MessageTooLargeError):
        decode_frame(bytes(401), 400)


@given(st.binary(max_size=100), st.integers(0, 400), st.integers(0, 255))
def test_damage_is_a_message_or_a_typed_error(noise, place, value):
    (frame,) = encode_frames(ALL, FRAME_LIMIT)
    damaged = bytearray(frame)
    damaged[place % len(frame)] = value
    for data in (noise, bytes(damaged), frame[: place % len(frame)]):
        with contextlib.suppress(MessageError):
            decode_frame(data, FRAME_LIMIT)


@pytest.mark.parametrize(
    "message",
    [
        Release("", 1), Release("s", 0), Move("s", 1, "n" * 65),
        Round("s", 1, ATTEMPT, 0, (1 << 32,)), Round("s", 1, ATTEMPT, 0, (1,) * (TOKENS_MAX + 1)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(message):
    (frame,) = encode_frames([message], FRAME_LIMIT)
    with pytest.raises(MessageFormatError):
        decode_frame(frame, FRAME_LIMIT)


def test_another_protocol_is_told():
    with pytest.raises(ProtocolVersionError):
        decode_frame(msgspec.msgpack.encode([PROTOCOL + 1, ["new"]]), 100)
