"""What a node answers to a peer, as bytes on a connection: frames, each with its length.

    length (4 bytes) | payload | tag (16 bytes, or none)

Under a shared key each frame has a tag: a MAC over its number and payload, under a secret that follows
from the key and the request. So frames of another answer, in another order or left out in the middle are
refused; that an answer goes on to its end is for its last record to say. TLS needs no tags.
"""

import hmac
import struct
from collections.abc import Callable
from typing import Final

from sllm_node.core.errors import MessageFormatError, MessageTooLargeError, WrongKeyError

FRAME_LIMIT: Final = 8 << 20
TAG_BYTES: Final = 16
_LENGTH: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">Q")


class FrameWriter:
    """Makes the frames of one answer."""

    def __init__(self, secret: bytes | None) -> None:
        self._secret = secret
        self._count = 0

    def frame(self, payload: bytes) -> bytes:
        """Return the next frame.

        Raises:
            MessageTooLargeError: the payload is above the limit.
        """
        if len(payload) > FRAME_LIMIT:
            raise MessageTooLargeError(len(payload), FRAME_LIMIT)
        tag = _tag(self._secret, self._count, payload)
        self._count += 1
        return _LENGTH.pack(len(payload)) + payload + tag

    def filled(
        self, size: int, fill: Callable[[memoryview], None], room: bytearray | None = None
    ) -> memoryview:
        """Return the next frame, its payload written in place by `fill`: nothing is copied.

        `room`: for the frame, if it is to be no new one. For large payloads, in a thread: neither
        reading nor the tag keeps the interpreter's lock.
        """
        assert size <= FRAME_LIMIT
        length = self.framed_bytes(size)
        frame = memoryview(bytearray(length) if room is None else room)[:length]
        _LENGTH.pack_into(frame, 0, size)
        payload = frame[_LENGTH.size : _LENGTH.size + size]
        fill(payload)
        frame[_LENGTH.size + size :] = _tag_of_view(self._secret, self._count, payload)
        self._count += 1
        return frame

    def framed_bytes(self, size: int) -> int:
        """Return the bytes of the frame of a payload of `size`."""
        return _LENGTH.size + size + (0 if self._secret is None else TAG_BYTES)


class FrameReader:
    """Takes the bytes of one answer as they come."""

    def __init__(self, secret: bytes | None, sender: str) -> None:
        self._secret = secret
        self._sender = sender
        self._count = 0
        self._bytes = bytearray()

    @property
    def is_between(self) -> bool:
        """Whether no frame is cut in the middle."""
        return not self._bytes

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads of the frames that `data` completes.

        Raises:
            MessageTooLargeError: a frame says that it is above the limit.
            WrongKeyError: a frame is not of this answer, or not the next one.
        """
        self._bytes += data
        found = []
        while (payload := self._next()) is not None:
            found.append(payload)
        return found

    def _next(self) -> bytes | None:
        if len(self._bytes) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._bytes)
        if size > FRAME_LIMIT:
            raise MessageTooLargeError(size, FRAME_LIMIT)
        end = _LENGTH.size + size
        tag_end = end + (0 if self._secret is None else TAG_BYTES)
        if len(self._bytes) < tag_end:
            return None
        payload = bytes(self._bytes[_LENGTH.size : end])
        tag = bytes(self._bytes[end:tag_end])
        del self._bytes[:tag_end]
        if not hmac.compare_digest(tag, _tag(self._secret, self._count, payload)):
            raise WrongKeyError(self._sender)
        self._count += 1
        return payload


class FramePuller:
    """Takes the frames of one answer one by one, into memory that is given: for threads that wait."""

    def __init__(
        self, secret: bytes | None, sender: str, read: Callable[[memoryview], None]
    ) -> None:
        """`read` fills what it is given with the next bytes of the answer, or raises."""
        self._secret = secret
        self._sender = sender
        self._read = read
        self._count = 0

    def next(self, limit: int) -> bytes:
        """Return the payload of the next frame.

        Raises: as `next_into`.
        """
        payload = bytearray(self._size(limit))
        self._fill(memoryview(payload))
        return bytes(payload)

    def next_into(self, view: memoryview) -> int:
        """Put the payload of the next frame at the begin of `view`; return its size, never 0.

        Raises:
            MessageFormatError: it is empty.
            MessageTooLargeError: it says that it is longer than `view`.
            WrongKeyError: it is not of this answer, or not the next one.
        """
        size = self._size(len(view))
        if not size:
            raise MessageFormatError("an empty frame of a file")
        self._fill(view[:size])
        return size

    def _size(self, limit: int) -> int:
        length = bytearray(_LENGTH.size)
        self._read(memoryview(length))
        (size,) = _LENGTH.unpack(length)
        if size > limit:
            raise MessageTooLargeError(size, limit)
        return int(size)

    def _fill(self, payload: memoryview) -> None:
        self._read(payload)
        tag = bytearray(0 if self._secret is None else TAG_BYTES)
        self._read(memoryview(tag))
        if not hmac.compare_digest(tag, _tag_of_view(self._secret, self._count, payload)):
            raise WrongKeyError(self._sender)
        self._count += 1


def only(payloads: list[bytes]) -> bytes:
    """Return the payload of an answer of one frame.

    Raises:
        MessageFormatError: there are none or several.
    """
    if len(payloads) != 1:
        raise MessageFormatError(f"an answer of {len(payloads)} frames instead of one")
    return payloads[0]


def _tag(secret: bytes | None, number: int, payload: bytes) -> bytes:
    if secret is None:
        return b""
    return hmac.digest(secret, _NUMBER.pack(number) + payload, "sha256")[:TAG_BYTES]


def _tag_of_view(secret: bytes | None, number: int, payload: memoryview) -> bytes:
    """Return the same tag of a payload that is not to be copied."""
    if secret is None:
        return b""
    mac = hmac.new(secret, _NUMBER.pack(number), "sha256")
    mac.update(payload)
    return mac.digest()[:TAG_BYTES]
