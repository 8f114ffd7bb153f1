"""What nodes say to each other, as bytes: versioned, bounded, checked on arrival.

A message is one MessagePack array. It begins with the number of the protocol, so that a node of
another release is told apart from noise before anything else of it is read.
"""

from enum import IntEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from sllm_node.core.errors import MessageFormatError, MessageTooLargeError, ProtocolVersionError
from sllm_node.core.types import NodeId

PROTOCOL: Final = 1
OVERHEAD_BYTES: Final = 1024
"""What a heartbeat needs beside its document at most: ids of `ID_CHARACTERS`, numbers, a frame."""
ID_CHARACTERS: Final = 64
LARGEST_BOOT: Final = 1 << 62
_LIFE_BITS: Final = 20
"""Of a boot: its lowest bits tell two lives apart that began at one time by their clocks."""

_Id = Annotated[str, Meta(min_length=1, max_length=ID_CHARACTERS)]
_Number = Annotated[int, Meta(ge=0, le=LARGEST_BOOT)]


def make_boot(clock_ms: int, life: int) -> int:
    """Return the boot of a life that began at `clock_ms`; `life` is a random number of its own.

    The clock need not be right: it only spares most restarts the round trip to `raise_boot`.
    """
    boot = clock_ms << _LIFE_BITS | life & ((1 << _LIFE_BITS) - 1)
    return max(1, min(boot, LARGEST_BOOT))


def raise_boot(boot: int, known: int) -> int:
    """Return a boot above `known`, of the same life as `boot`: no other life raises to the same."""
    return make_boot((known >> _LIFE_BITS) + 1, boot)


class Phase(IntEnum):
    """What a node says of itself."""

    SERVING = 0
    DRAINING = 1
    """It finishes what it has and takes nothing new."""
    GONE = 2
    """It has left; this incarnation says nothing more."""


class Edition(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Which state of a node: the newest is the one with the greatest (boot, version)."""

    boot: _Number = 0
    version: _Number = 0


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """I am here; this is my edition; this is the edition of yours that I have."""

    protocol: _Number
    sender: _Id
    receiver: _Id
    sequence: _Number
    """Counts the sender's rounds of heartbeats; within a boot, only a greater one is news."""
    edition: Edition
    phase: Phase
    seen: Edition
    """The receiver's edition whose document the sender has; its boot is the one that is heard."""
    heard: _Number
    """The sequence of the last message that came from the receiver, in that boot."""
    document: bytes | None = None
    """The sender's state of `edition`; absent where the receiver has it."""

    @property
    def sender_id(self) -> NodeId:
        return NodeId(self.sender)


def encode(message: Heartbeat, limit: int) -> bytes:
    """Return the bytes of `message`.

    Raises:
        MessageTooLargeError: they are more than `limit`.
    """
    data = msgspec.msgpack.encode(message)
    if len(data) > limit:
        raise MessageTooLargeError(len(data), limit)
    return data


def decode(data: bytes, limit: int) -> Heartbeat:
    """Return the message that `data` is.

    Raises:
        MessageTooLargeError: more than `limit` bytes.
        ProtocolVersionError: a node of another release sent it.
        MessageFormatError: it is no message.
    """
    if len(data) > limit:
        raise MessageTooLargeError(len(data), limit)
    check_protocol(data)
    try:
        return msgspec.msgpack.decode(data, type=Heartbeat)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(str(error)) from error


def check_protocol(data: bytes) -> None:
    """Look at the first item alone: what follows it may differ in other releases.

    Raises:
        ProtocolVersionError: a node of another release sent it.
        MessageFormatError: it is no array that begins with a number.
    """
    try:
        items = msgspec.msgpack.decode(data, type=list[msgspec.Raw])
        protocol = msgspec.msgpack.decode(items[0], type=int) if items else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(str(error)) from error
    if protocol != PROTOCOL:
        raise ProtocolVersionError(protocol, PROTOCOL)
