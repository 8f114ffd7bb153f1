import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.cluster.frames import FRAME_LIMIT, FramePuller, FrameReader, FrameWriter, only
from sllm_node.core.errors import (
    MessageError,
    MessageFormatError,
    MessageTooLargeError,
    WrongKeyError,
)

SECRET = bytes(32)


def framed(payloads, secret=SECRET):
    writer = FrameWriter(secret)
    return [writer.frame(payload) for payload in payloads]


@given(
    st.lists(st.binary(max_size=40), max_size=6),
    st.integers(1, 30),
    st.sampled_from([None, SECRET]),
)
def test_frames_come_back_however_they_are_cut(payloads, step, secret):
    data, reader = b"".join(framed(payloads, secret)), FrameReader(secret, "b")
    found = [one for at in range(0, len(data), step) for one in reader.feed(data[at : at + step])]
    assert found == payloads
    assert reader.is_between


@given(st.integers(min_value=0), st.integers(1, 255))
def test_a_changed_bit_never_comes_through(place, change):
    data = bytearray(b"".join(framed([b"one", b"two"])))
    data[place % len(data)] ^= change
    reader = FrameReader(SECRET, "b")
    try:
        found = reader.feed(bytes(data))
    except MessageError:
        return
    assert found != [b"one", b"two"]
    assert found in ([], [b"one"])
    assert not reader.is_between


@given(st.lists(st.binary(max_size=60), max_size=5), st.sampled_from([None, SECRET]))
def test_noise_is_refused_with_a_typed_error_or_waits_for_more(pieces, secret):
    reader = FrameReader(secret, "b")
    try:
        found = [payload for piece in pieces for payload in reader.feed(piece)]
    except MessageError:
        return
    assert secret is None or not found


@pytest.mark.parametrize("order", [(1, 0), (1,), (0, 0)])
def test_frames_in_another_order_left_out_or_repeated_are_refused(order):
    frames = framed([b"one", b"two"])
    with pytest.raises(WrongKeyError):
        FrameReader(SECRET, "b").feed(b"".join(frames[i] for i in order))


def test_frames_of_another_answer_are_refused():
    with pytest.raises(WrongKeyError):
        FrameReader(SECRET, "b").feed(framed([b"one"], bytes([1]) * 32)[0])


def test_a_frame_above_the_limit_is_neither_made_nor_awaited():
    with pytest.raises(MessageTooLargeError):
        FrameWriter(None).frame(bytes(FRAME_LIMIT + 1))
    with pytest.raises(MessageTooLargeError):
        FrameReader(None, "b").feed((FRAME_LIMIT + 1).to_bytes(4, "big"))


def test_an_answer_of_one_frame_has_one():
    assert only([b"x"]) == b"x"
    with pytest.raises(MessageFormatError):
        only([])


def pulling(data, secret=SECRET):
    """Return what pulls the frames of `data` as from a connection."""
    source = io.BytesIO(data)

    def read(view):
        if source.readinto(view) < len(view):
            raise EOFError

    return FramePuller(secret, "b", read)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.sampled_from([None, SECRET]))
@settings(deadline=None)
def test_frames_that_are_filled_in_place_are_the_same(payloads, secret):
    writer = FrameWriter(secret)
    filled = []
    for payload in payloads:

        def fill(view, payload=payload):
            view[:] = payload

        filled.append(bytes(writer.filled(len(payload), fill)))
        assert len(filled[-1]) == writer.framed_bytes(len(payload))
    assert filled == framed(payloads, secret)
    puller, room = pulling(b"".join(filled), secret), bytearray(40)
    found = [bytes(room[: puller.next_into(memoryview(room))]) for _ in payloads]
    assert found == payloads


@given(st.integers(min_value=0), st.integers(1, 255))
@settings(deadline=None)
def test_no_frame_with_a_changed_bit_is_pulled(place, change):
    data = bytearray(b"".join(framed([b"one", b"two"])))
    data[place % len(data)] ^= change
    puller, found = pulling(bytes(data)), []
    with pytest.raises((MessageError, EOFError)):
        found += [puller.next(8), puller.next(8)]
    assert found == []


@pytest.mark.parametrize("order", [(1, 0), (1, 1), (0, 0)])
def test_frames_in_another_order_are_not_pulled(order):
    frames = framed([b"one", b"two"])
    puller = pulling(b"".join(frames[i] for i in order))
    with pytest.raises(WrongKeyError):
        _ = [puller.next(8), puller.next(8)]


def test_a_frame_that_is_longer_than_its_room_or_empty_is_refused():
    room = memoryview(bytearray(2))
    with pytest.raises(MessageTooLargeError):
        pulling(framed([b"one"])[0]).next_into(room)
    with pytest.raises(MessageFormatError):
        pulling(framed([b""])[0]).next_into(room)
