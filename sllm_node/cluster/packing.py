"""Messages between nodes as MessagePack, and back with one typed error. Pure."""

from typing import TypeVar

import msgspec

from sllm_node.core.errors import MessageFormatError

MessageT = TypeVar("MessageT")


def pack(message: msgspec.Struct) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def unpack(
    decoder: msgspec.msgpack.Decoder[MessageT], data: bytes, what: str | None = None
) -> MessageT:
    """Return the message that `data` is; `what` it should be goes into the error.

    Raises:
        MessageFormatError: it is none.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(str(error) if what is None else f"{what}: {error}") from error
