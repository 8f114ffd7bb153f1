"""What a node asks of a peer beside heartbeats, and the records of the answers, as bytes.

`Forward` asks for a session: the request in tokens, what its placement counts on (`Ask`), and how often
it was passed on. It is answered by records: `Waiting` as often as a sign of life is due, `Granted` once,
`Tokens` as they come; the last is `Tokens` with a finish, `Failed`, or `Refusal`, before anything began.
Between two of them a `Leave` may ask that the session be moved; an entry that does not answers `Stays`.

A session that moves is asked for with `held` set: then `Standing` says how many of its output tokens are
computed, each `Extend` brings more of them, and the last one lets it go. All of these name the epoch,
which grows with each node that serves the session.
"""

import math
from typing import Final

import msgspec

from sllm_node.cluster.packing import unpack
from sllm_node.cluster.reservations import Ask
from sllm_node.core import errors
from sllm_node.core.errors import MessageFormatError, SllmError
from sllm_node.core.types import GenerationChunk, GenerationRequest, ModelStatus, Waited, Weights

VERSION: Final = "v1"
HOPS_MAX: Final = 1
"""Times that a request is passed on: who gets it serves it, or refuses."""


class Forward(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Serve this session."""

    request: GenerationRequest
    ask: Ask
    hops: int
    why: str
    """The placement's reason, for the log of who serves."""
    keep_alive_s: float | None = None
    epoch: int = 1
    """Which node of the session's this makes: one and only one epoch may give tokens at a time."""
    migration: str = ""
    """The id of the move that it belongs to, for the logs of both nodes."""


class Extend(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Add tokens to a session that holds; they may be known, and a second copy changes nothing."""

    session: str
    epoch: int
    position: int
    """Output tokens of the session before these."""
    tokens: tuple[int, ...]
    lets_go: bool
    """It owns the session now: go on behind these."""


class Left(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Another node goes on with this session: what follows is no cancellation."""

    session: str
    epoch: int
    migration: str


class Hint(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A session of this model is on its way: its load may begin."""

    model: str
    request: str
    """For the logs."""


class Describe(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What must be known of a model to take requests for it: limits, tokenizer, chat template."""

    model: str


class Described(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of the answer; each file follows in pieces."""

    context_tokens: int
    files: tuple[tuple[str, int], ...]
    """Names, and their bytes."""


class Waiting(msgspec.Struct, frozen=True, array_like=True, tag="waiting"):
    """The session has no place yet, or no token came: the node lives."""

    status: ModelStatus | None = None


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="granted"):
    """The session runs."""

    waited: Waited | None = None
    """For what, at this node; None: an older release does not tell, or it is no grant but an answer."""
    weights: Weights | None = None
    """What it is computed with; None as above."""


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """What the session has new."""

    chunk: GenerationChunk
    position: int
    """Output tokens of the session before these."""


class Standing(msgspec.Struct, frozen=True, array_like=True, tag="standing"):
    """A session that holds: so many of its output tokens are there and computed."""

    position: int


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """The session's node asks its entry to move it: another model is to have the room (`vacate`)."""

    to: str
    vacate: str
    """The id of it all, for the logs: the session that waits for the room."""


class Stays(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The entry's word that a session that was to leave does not."""

    session: str
    reason: str


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """Nothing was begun: decide again with this state document."""

    reason: str
    document: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The session ended, or was not taken, with this error."""

    code: str
    message: str
    retry_after_s: float | None = None
    param: str | None = None
    remote: str | None = None
    """Which remote failed, if one did: who waits may do better if it is the peers."""


Record = Waiting | Granted | Standing | Tokens | Leave | Refusal | Failed
_forward_decoder: Final = msgspec.msgpack.Decoder(Forward)
_extend_decoder: Final = msgspec.msgpack.Decoder(Extend)
_left_decoder: Final = msgspec.msgpack.Decoder(Left)
_hint_decoder: Final = msgspec.msgpack.Decoder(Hint)
_stays_decoder: Final = msgspec.msgpack.Decoder(Stays)
_describe_decoder: Final = msgspec.msgpack.Decoder(Describe)
_described_decoder: Final = msgspec.msgpack.Decoder(Described)
_record_decoder: Final[msgspec.msgpack.Decoder[Record]] = msgspec.msgpack.Decoder(Record)
_PLAIN: Final = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SllmError)
    and kind not in (errors.RouteError, errors.UnsupportedEncodingError)
}  # fmt: skip


def unpack_forward(data: bytes) -> Forward:
    """Return a request for a session, or raise MessageFormatError."""
    forward = unpack(_forward_decoder, data)
    if not 0.0 <= forward.request.waited_s < math.inf:
        raise MessageFormatError(f"a request that has waited {forward.request.waited_s} s")
    return forward


def unpack_extend(data: bytes) -> Extend:
    """Return tokens for a session that holds, or raise MessageFormatError."""
    return unpack(_extend_decoder, data)


def unpack_left(data: bytes) -> Left:
    """Return the word that a session has moved away, or raise MessageFormatError."""
    return unpack(_left_decoder, data)


def unpack_hint(data: bytes) -> Hint:
    """Return a hint, or raise MessageFormatError."""
    return unpack(_hint_decoder, data)


def unpack_stays(data: bytes) -> Stays:
    """Return an entry's word about a session that was to leave, or raise MessageFormatError."""
    return unpack(_stays_decoder, data)


def unpack_describe(data: bytes) -> Describe:
    """Return a request for what is known of a model, or raise MessageFormatError."""
    return unpack(_describe_decoder, data)


def unpack_described(data: bytes) -> Described:
    """Return the head of its answer, or raise MessageFormatError."""
    return unpack(_described_decoder, data)


def unpack_record(data: bytes) -> Record:
    """Return a record, or raise MessageFormatError."""
    return unpack(_record_decoder, data)


def failed(error: SllmError) -> Failed:
    """Return the record of an error."""
    remote = error.remote if isinstance(error, errors.RemoteError) else None
    param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
    return Failed(error.code, str(error), retry_after_s, param, remote)


def error_of(record: Failed) -> SllmError:
    """Return the error that a record tells of, of the class that it had where it was raised.

    Its fields beside those of the record are not there: it is to be told, not to be looked into.
    """
    kind = _PLAIN.get(record.code, errors.InternalError)
    error = kind.__new__(kind, record.message)
    Exception.__init__(error, record.message)
    if record.retry_after_s is not None:
        vars(error)["retry_after_s"] = record.retry_after_s
    if record.param is not None:
        vars(error)["param"] = record.param
    if isinstance(error, errors.RemoteError):  # an older release does not tell which
        error.remote = record.remote or ""
    return error
