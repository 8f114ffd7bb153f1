"""What a model's home asks of a node that is to start or retire a replica, and the answer: bounded data."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from sllm_node.core.errors import MessageFormatError

MessageT = TypeVar("MessageT")


class ScaleAsk(msgspec.Struct, frozen=True, array_like=True):
    """Load the model, or let the replica of it leave once its sessions have ended."""

    what: Literal["start", "retire"]
    model: Annotated[str, Meta(min_length=1, max_length=255)]


class ScaleAnswer(msgspec.Struct, frozen=True, array_like=True):
    """Nothing in the way: it is done or under way. Else: why not."""

    problem: str


def pack(message: ScaleAsk | ScaleAnswer) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def unpack_ask(data: bytes) -> ScaleAsk:
    """Return a home's request, or raise MessageFormatError."""
    return _decode(ScaleAsk, data)


def unpack_answer(data: bytes) -> ScaleAnswer:
    """Return a node's answer, or raise MessageFormatError."""
    return _decode(ScaleAnswer, data)


def _decode(kind: type[MessageT], data: bytes) -> MessageT:
    try:
        found: Any = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(str(error)) from error
    checked: MessageT = found
    return checked
