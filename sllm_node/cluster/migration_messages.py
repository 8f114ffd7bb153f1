"""What entry nodes and holders say to each other about sessions, as bytes: versioned, bounded, idempotent.

Every message names its session and an epoch, and says how things are, not what to add: a second copy,
or one that comes late, changes nothing. Positions count tokens of a session from its first prompt
token. A frame is one MessagePack array: the number of the protocol, then messages to one node.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from sllm_node.cluster.messages import LARGEST_BOOT, PROTOCOL, check_protocol
from sllm_node.core.errors import MessageFormatError, MessageTooLargeError
from sllm_node.core.types import FinishReason, GenerationRequest, TokenLogprob
from sllm_node.core.units import MIB

TOKENS_MAX: Final = 16_384
"""Of one message: at most 5 bytes each. What is more goes in several."""
PIECES_MAX: Final = 256
"""Of one `Tokens`."""
MESSAGES_MAX: Final = 1024
"""Of one frame."""
FRAME_LIMIT: Final = MIB
"""Bytes of a frame that any message fits into: of tokens, 5 bytes each, or of pieces with log probabilities."""
FRAME_BYTES: Final = 64
"""What a frame needs beside its messages at most."""

_Session = Annotated[str, Meta(min_length=1, max_length=200)]
_Node = Annotated[str, Meta(max_length=64)]
_Number = Annotated[int, Meta(ge=0, le=LARGEST_BOOT)]
_Epoch = Annotated[int, Meta(ge=1, le=1 << 31)]
_Token = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Tokens = Annotated[tuple[_Token, ...], Meta(max_length=TOKENS_MAX)]


class Reason(StrEnum):
    """Why a node does not hold a session, or not any more."""

    MEMORY = "memory"
    """No room for the model or for the session's keys and values."""
    MODEL = "model"
    """It can't serve that model."""
    DRAINING = "draining"
    FAILED = "failed"
    """A load or a step of it failed."""
    UNKNOWN = "unknown"
    """It has no such attempt: it restarted, or gave it up long ago."""
    SILENT = "silent"
    """Not heard for too long, or known to be dead."""
    SLOW = "slow"
    """Not done within the limit."""


class MoveOutcome(StrEnum):
    """What an entry node answers who asks it to move a session."""

    STARTED = "started"
    SEEKING = "seeking"
    """It asks placement for a destination first."""
    ALREADY_MOVING = "already_moving"
    ALREADY_THERE = "already_there"
    NOT_OWNER = "not_owner"
    """The asker speaks of an epoch that is over."""
    UNKNOWN = "unknown_session"
    """It has ended, or never was."""


class Attempt(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One life of a holder: unique and growing on its node, through restarts too."""

    boot: _Number = 0
    number: _Number = 0


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one chunk of the engine brought; it is accepted whole or not at all."""

    tokens: _Tokens
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_text: str | None = None
    cached_tokens: int = 0


class _About(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every message has."""

    session: _Session
    epoch: _Epoch


class Prepare(_About, frozen=True, tag="prepare"):
    """Entry to destination: make ready to take this session; its tokens follow."""

    request: GenerationRequest
    """Without the tokens of prompt and output."""
    prompt_tokens: _Number
    reservation: Annotated[str, Meta(max_length=200)] = ""
    """The promise that placement got for it, if it did."""


class Round(_About, frozen=True, tag="round"):
    """Entry to destination: tokens to compute; with none, only a question how it is."""

    attempt: Attempt
    position: _Number
    tokens: _Tokens


class Standing(_About, frozen=True, tag="standing"):
    """Destination to entry: how far it is."""

    attempt: Attempt
    is_ready: bool
    held: _Number
    """Tokens that it has."""
    computed: _Number
    """Tokens whose keys and values it has."""


class Grant(_About, frozen=True, tag="grant"):
    """Entry to destination: you own the session now; these are the last tokens before yours."""

    attempt: Attempt
    position: _Number
    tokens: _Tokens


class Tokens(_About, frozen=True, tag="tokens"):
    """Owner to entry: what it generated; with none, only that it owns."""

    position: _Number
    pieces: Annotated[tuple[Piece, ...], Meta(max_length=PIECES_MAX)]


class Accepted(_About, frozen=True, tag="accepted"):
    """Entry to owner: tokens before this position have been taken."""

    attempt: Attempt
    position: _Number
    asks: bool = False
    """Whether an answer is wanted although there may be nothing new."""


class Release(_About, frozen=True, tag="release"):
    """Entry to holder: this epoch, and all before it, are over."""


class Dropped(_About, frozen=True, tag="dropped"):
    """Holder to entry: this attempt is no more, and never comes back."""

    attempt: Attempt
    reason: Reason


class Move(_About, frozen=True, tag="move"):
    """Anybody to entry: move the session away from the owner of this epoch."""

    to: _Node = ""
    """Empty: wherever placement says."""
    reason: Annotated[str, Meta(max_length=64)] = ""


class Moved(_About, frozen=True, tag="moved"):
    """Entry to who asked for a move."""

    outcome: MoveOutcome


Message = Prepare | Round | Standing | Grant | Tokens | Accepted | Release | Dropped | Move | Moved


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    protocol: _Number
    messages: Annotated[tuple[Message, ...], Meta(max_length=MESSAGES_MAX)]


_DECODER: Final = msgspec.msgpack.Decoder(_Frame)
_ENCODER: Final = msgspec.msgpack.Encoder()


def encode_frames(messages: Iterable[Message], limit: int) -> tuple[bytes, ...]:
    """Return frames of at most `limit` bytes that together have `messages`, in their order.

    Raises:
        MessageTooLargeError: one message alone is more than `limit`.
    """
    frames: list[bytes] = []
    gathered: list[msgspec.Raw] = []
    size = FRAME_BYTES
    for message in messages:
        data = _ENCODER.encode(message)
        if len(data) + FRAME_BYTES > limit:
            raise MessageTooLargeError(len(data) + FRAME_BYTES, limit)
        if gathered and (size + len(data) > limit or len(gathered) == MESSAGES_MAX):
            frames.append(_ENCODER.encode([PROTOCOL, gathered]))
            gathered, size = [], FRAME_BYTES
        gathered.append(msgspec.Raw(data))
        size += len(data)
    if gathered:
        frames.append(_ENCODER.encode([PROTOCOL, gathered]))
    return tuple(frames)


def decode_frame(data: bytes, limit: int) -> tuple[Message, ...]:
    """Return the messages that `data` has.

    Raises:
        MessageTooLargeError: more than `limit` bytes.
        ProtocolVersionError: a node of another release sent it.
        MessageFormatError: it is no frame.
    """
    if len(data) > limit:
        raise MessageTooLargeError(len(data), limit)
    check_protocol(data)
    try:
        return _DECODER.decode(data).messages
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(str(error)) from error
