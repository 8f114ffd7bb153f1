"""Messages that only holders of the cluster's key can have written, each of them taken once.

A sealed message is

    "SLMC" | protocol | length, sender | length, receiver | boot | counter | length, payload | MAC

with the MAC (HMAC-SHA256) over all that stands before it. No clock takes part: a sender counts its
messages in each boot (one life of its process), and a receiver keeps the greatest boot of each sender
and, of its counters, the last `window` in one bit each. So messages may overtake each other by that
many, and a second copy is refused.

Limits, by intent: the content is signed and not hidden, and a receiver that restarts forgets what it
has seen, so that a recording of an earlier life of a sender can be played to it until that sender is
heard itself. Where the network is not yours, use mutual TLS (`trust.mode = "tls"`).
"""

import hashlib
import hmac
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sllm_node.cluster.messages import LARGEST_BOOT, PROTOCOL
from sllm_node.core.errors import (
    ClusterKeyError,
    MessageFormatError,
    MessageTooLargeError,
    MisdirectedError,
    ProtocolVersionError,
    ReplayError,
    StrangerError,
    WrongKeyError,
)
from sllm_node.core.types import NodeId

KEY_BYTES: Final = 32
MAC_BYTES: Final = hashlib.sha256().digest_size
_MAGIC: Final = b"SLMC"
_NUMBERS: Final = struct.Struct(">QQI")
ENVELOPE_BYTES: Final = len(_MAGIC) + 1 + 2 * (1 + 255) + _NUMBERS.size + MAC_BYTES
"""What sealing adds at most."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A message as it was signed."""

    sender: NodeId
    boot: int
    counter: int
    payload: bytes


def parse_key(text: str, origin: str) -> bytes:
    """Return the key that the text of a key file is: 64 hexadecimal digits.

    Raises:
        ClusterKeyError: it is not; `origin` is named, the key is not.
    """
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        raise ClusterKeyError(origin, "is not written in hexadecimal digits") from None
    if len(key) != KEY_BYTES:
        raise ClusterKeyError(origin, f"has {len(key)} bytes and must have {KEY_BYTES}")
    return key


class Sealer:
    """Signs what this node sends."""

    def __init__(self, key: bytes, me: NodeId, limit: int) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self._me = _name(me)
        self._limit = limit
        self._counter = 0

    def seal(self, payload: bytes, receiver: NodeId, boot: int) -> bytes:
        """Return `payload` signed for `receiver`; `boot` never goes down.

        Raises:
            MessageTooLargeError: the payload is above the limit.
        """
        if len(payload) > self._limit:
            raise MessageTooLargeError(len(payload), self._limit)
        assert 0 < boot <= LARGEST_BOOT
        self._counter += 1
        numbers = _NUMBERS.pack(boot, self._counter, len(payload))
        names = self._me + _name(receiver)
        signed = _MAGIC + bytes([PROTOCOL]) + names + numbers + payload
        return signed + hmac.digest(self._key, signed, "sha256")


class Opener:
    """Checks what this node is sent."""

    def __init__(
        self, key: bytes, me: NodeId, peers: Iterable[NodeId], limit: int, window: int
    ) -> None:
        assert len(key) == KEY_BYTES
        assert window > 0
        self._key = key
        self._me = me
        self._limit = limit
        self._window = window
        self._seen = {peer: _Seen() for peer in peers}

    def set_peers(self, peers: Iterable[NodeId]) -> None:
        """Follow a changed cluster file; who stays can't replay anything either."""
        self._seen = {peer: self._seen.get(peer) or _Seen() for peer in peers}

    def open(self, data: bytes) -> Sealed:
        """Return the message in `data`, once.

        Raises:
            MessageTooLargeError: more than any message may have.
            MessageFormatError: no sealed message, or cut off.
            ProtocolVersionError: a node of another release sealed it.
            WrongKeyError: not sealed with this key, or changed since.
            StrangerError: the sender is not in the cluster file.
            MisdirectedError: it is for another node.
            ReplayError: it came before, or too late to tell.
        """
        if len(data) > self._limit + ENVELOPE_BYTES:
            raise MessageTooLargeError(len(data), self._limit + ENVELOPE_BYTES)
        sealed, receiver = _parse(data)
        if not hmac.compare_digest(
            hmac.digest(self._key, data[:-MAC_BYTES], "sha256"), data[-MAC_BYTES:]
        ):
            raise WrongKeyError(sealed.sender)
        if sealed.sender not in self._seen:
            raise StrangerError(sealed.sender)
        if receiver != self._me:
            raise MisdirectedError(sealed.sender, receiver, self._me)
        if len(sealed.payload) > self._limit:
            raise MessageTooLargeError(len(sealed.payload), self._limit)
        if not self._seen[sealed.sender].take(sealed.boot, sealed.counter, self._window):
            raise ReplayError(sealed.sender, sealed.boot, sealed.counter)
        return sealed


@dataclass(slots=True)
class _Seen:
    """Which messages of one sender have come: bit i of `bits` is counter `last - i` of `boot`."""

    boot: int = 0
    last: int = 0
    bits: int = 0

    def take(self, boot: int, counter: int, window: int) -> bool:
        """Note a message; return whether it is new."""
        if boot < self.boot:
            return False
        if boot > self.boot:
            self.boot, self.last, self.bits = boot, 0, 0
        ahead = counter - self.last
        if ahead > 0:
            # A jump of any width is cut to the window first: no huge number is ever made.
            self.bits = ((self.bits << min(ahead, window)) | 1) & ((1 << window) - 1)
            self.last = counter
            return True
        if -ahead >= window or self.bits >> -ahead & 1:
            return False
        self.bits |= 1 << -ahead
        return True


def _name(name: NodeId) -> bytes:
    data = name.encode()
    assert 0 < len(data) <= 255, "checked by the cluster file"
    return bytes([len(data)]) + data


def _parse(data: bytes) -> tuple[Sealed, str]:
    """Return what `data` says it is, and for whom; nothing of it is to be believed yet."""
    head = len(_MAGIC) + 1
    if not data.startswith(_MAGIC) or len(data) < head:
        raise MessageFormatError("it does not begin as a sealed message does")
    if data[head - 1] != PROTOCOL:
        raise ProtocolVersionError(data[head - 1], PROTOCOL)
    sender, at = _parse_name(data, head)
    receiver, at = _parse_name(data, at)
    if len(data) < at + _NUMBERS.size:
        raise MessageFormatError("it is cut off before its payload")
    boot, counter, size = _NUMBERS.unpack_from(data, at)
    at += _NUMBERS.size
    if len(data) != at + size + MAC_BYTES:
        raise MessageFormatError(f"it has {len(data)} bytes and says {at + size + MAC_BYTES}")
    return Sealed(NodeId(sender), boot, counter, data[at : at + size]), receiver


def _parse_name(data: bytes, at: int) -> tuple[str, int]:
    if at >= len(data) or len(data) < (end := at + 1 + data[at]):
        raise MessageFormatError("it is cut off in a node's id")
    try:
        return data[at + 1 : end].decode(), end
    except UnicodeDecodeError as error:
        raise MessageFormatError("a node's id is not UTF-8") from error
