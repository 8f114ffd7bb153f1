import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.auth import ENVELOPE_BYTES, Opener, Sealed, Sealer, parse_key
from sllm_node.cluster.messages import PROTOCOL
from sllm_node.core.errors import (
    ClusterKeyError,
    MessageError,
    MessageFormatError,
    MessageTooLargeError,
    MisdirectedError,
    ProtocolVersionError,
    ReplayError,
    StrangerError,
    WrongKeyError,
)
from sllm_node.core.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
KEY, OTHER = bytes(range(32)), bytes(32)
LIMIT = 100


def sealer(key=KEY, me=A, limit=LIMIT):
    return Sealer(key, me, limit)


def opener(key=KEY, me=B, peers=(A, C), window=8):
    return Opener(key, me, peers, LIMIT, window)


@given(st.binary(max_size=LIMIT))
def test_what_was_sealed_is_opened(payload):
    assert opener().open(sealer().seal(payload, B, 7)) == Sealed(A, 7, 1, payload)


@given(st.binary(max_size=LIMIT + ENVELOPE_BYTES + 10))
def test_any_bytes_are_refused_with_a_typed_error(data):
    with pytest.raises(MessageError):
        opener().open(data)


@given(st.binary(max_size=LIMIT), st.data())
def test_a_changed_message_is_refused_with_a_typed_error(payload, draw):
    sent = sealer().seal(payload, B, 7)
    at = draw.draw(st.integers(0, len(sent) - 1))
    bit = 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(MessageError):
        opener().open(sent[:at] + bytes([sent[at] ^ bit]) + sent[at + 1 :])


@given(st.binary(max_size=LIMIT), st.data())
def test_a_message_cut_off_or_continued_is_refused(payload, draw):
    sent = sealer().seal(payload, B, 7)
    with pytest.raises(MessageFormatError):
        opener().open(sent[: draw.draw(st.integers(0, len(sent) - 1))])
    with pytest.raises(MessageFormatError):
        opener().open(sent + b"x")


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=60), st.integers(1, 16))
def test_no_message_is_opened_twice_and_none_within_the_window_is_lost(order, window):
    messages = {}
    for boot in range(1, 4):
        source = sealer()
        messages |= {(boot, i): source.seal(b"x", B, boot) for i in range(1, 41)}
    destination, taken, newest = opener(window=window), set(), (0, 0)
    for item in order:
        newest = max(newest, item)
        is_due = item[0] == newest[0] and newest[1] - item[1] < window and item not in taken
        try:
            destination.open(messages[item])
        except ReplayError:
            assert not is_due
            continue
        assert is_due
        taken.add(item)


def test_another_key_is_told():
    with pytest.raises(WrongKeyError, match="not signed with this"):
        opener().open(sealer(key=OTHER).seal(b"x", B, 1))


def test_a_refused_message_does_not_use_up_its_number():
    destination, sent = opener(), sealer().seal(b"x", B, 1)
    with pytest.raises(WrongKeyError):
        destination.open(sent[:-1] + bytes([sent[-1] ^ 1]))
    assert destination.open(sent).payload == b"x"


def test_strangers_and_messages_for_others_are_refused():
    with pytest.raises(StrangerError):
        opener(peers=(C,)).open(sealer().seal(b"x", B, 1))
    with pytest.raises(MisdirectedError):
        opener(me=C).open(sealer().seal(b"x", B, 1))


def test_messages_above_the_limit_are_neither_sent_nor_opened():
    with pytest.raises(MessageTooLargeError):
        sealer().seal(bytes(LIMIT + 1), B, 1)
    with pytest.raises(MessageTooLargeError):
        opener().open(sealer(limit=200).seal(bytes(LIMIT + 1), B, 1))
    with pytest.raises(MessageTooLargeError):
        opener().open(bytes(LIMIT + ENVELOPE_BYTES + 1))


def test_another_release_is_told():
    sent = bytearray(sealer().seal(b"x", B, 1))
    sent[4] = PROTOCOL + 1
    with pytest.raises(ProtocolVersionError):
        opener().open(bytes(sent))


def test_an_id_that_is_no_text_is_refused():
    sent = bytearray(sealer().seal(b"x", B, 1))
    sent[6] = 0xFF
    with pytest.raises(MessageFormatError, match="UTF-8"):
        opener().open(bytes(sent))


def test_a_counter_of_any_size_costs_a_window_only():
    destination, source = opener(), sealer()
    source._counter = (1 << 64) - 2
    assert destination.open(source.seal(b"x", B, 1)).counter == (1 << 64) - 1


def test_a_changed_cluster_file_keeps_what_was_seen_of_who_stays():
    destination, sent = opener(), sealer().seal(b"x", B, 1)
    destination.open(sent)
    destination.set_peers((A,))
    with pytest.raises(ReplayError):
        destination.open(sent)
    destination.set_peers((C,))
    with pytest.raises(StrangerError):
        destination.open(sealer().seal(b"x", B, 2))


def test_a_key_is_64_hexadecimal_digits_and_never_shown():
    assert parse_key(KEY.hex() + "\n", "cluster.key") == KEY
    for text in ("secret!", "ab" * 31, "ab" * 33, ""):
        with pytest.raises(ClusterKeyError, match=r"cluster\.key") as caught:
            parse_key(text, "cluster.key")
        assert not text or text not in str(caught.value)
