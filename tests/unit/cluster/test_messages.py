import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.messages import (
    ID_CHARACTERS,
    LARGEST_BOOT,
    OVERHEAD_BYTES,
    PROTOCOL,
    Edition,
    Heartbeat,
    Phase,
    decode,
    encode,
    make_boot,
    raise_boot,
)
from sllm_node.core.errors import (
    MessageError,
    MessageFormatError,
    MessageTooLargeError,
    ProtocolVersionError,
)


def heartbeat(**changes):
    fields = {
        "protocol": PROTOCOL, "sender": "a", "receiver": "b", "sequence": 1,
        "edition": Edition(1, 2), "phase": Phase.SERVING, "seen": Edition(), "heard": 0, "document": b"x",
    }  # fmt: skip
    return Heartbeat(**{**fields, **changes})


numbers = st.integers(0, LARGEST_BOOT)
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=ID_CHARACTERS)
editions = st.builds(Edition, numbers, numbers)
heartbeats = st.builds(
    heartbeat, sender=ids, receiver=ids, sequence=numbers, edition=editions,
    phase=st.sampled_from(Phase), seen=editions, heard=numbers, document=st.none() | st.binary(max_size=100),
)  # fmt: skip


@given(heartbeats)
def test_what_was_encoded_is_decoded(message):
    assert decode(encode(message, 100 + OVERHEAD_BYTES), 100 + OVERHEAD_BYTES) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_typed_error(data):
    try:
        message = decode(data, 200)
    except MessageError:
        return
    assert encode(message, 1000)


@given(heartbeats, st.data())
def test_a_damaged_message_is_a_message_or_a_typed_error(message, data):
    sent = bytearray(encode(message, 2000))
    sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(sent[: data.draw(st.integers(0, len(sent)))]), 2000)
    except MessageError:
        return


def test_a_message_above_the_limit_is_neither_sent_nor_read():
    sent = encode(heartbeat(document=bytes(100)), 200)
    with pytest.raises(MessageTooLargeError, match="limit of 50"):
        encode(heartbeat(document=bytes(100)), 50)
    with pytest.raises(MessageTooLargeError):
        decode(sent, len(sent) - 1)


def test_another_protocol_is_told_whatever_else_the_message_has():
    other = msgspec.msgpack.encode([PROTOCOL + 1, {"new": "fields"}])
    with pytest.raises(ProtocolVersionError, match=f"protocol {PROTOCOL + 1}"):
        decode(other, 100)


@pytest.mark.parametrize("change", [{"sender": ""}, {"phase": 9}, {"sequence": -1}])
def test_values_out_of_range_are_refused(change):
    with pytest.raises(MessageFormatError):
        decode(encode(heartbeat(**change), 2000), 2000)


@given(st.integers(1, 1 << 41), st.integers(0, 1 << 41), st.integers(0), st.integers(0))
def test_a_raised_boot_is_above_the_known_one_and_no_other_lifes(clock, known, life, other):
    boot = raise_boot(make_boot(clock, life), make_boot(known, other))
    assert make_boot(known, other) < boot <= LARGEST_BOOT
    if life % (1 << 20) != other % (1 << 20):
        assert boot != raise_boot(make_boot(clock, other), make_boot(known, other))
