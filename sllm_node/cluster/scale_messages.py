"""What a model's home asks of a node that is to start or retire a replica, and the answer: bounded data."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from sllm_node.cluster.packing import unpack


class ScaleAsk(msgspec.Struct, frozen=True, array_like=True):
    """Load the model, or let the replica of it leave once its sessions have ended."""

    what: Literal["start", "retire"]
    model: Annotated[str, Meta(min_length=1, max_length=255)]


class ScaleAnswer(msgspec.Struct, frozen=True, array_like=True):
    """Nothing in the way: it is done or under way. Else: why not."""

    problem: str


_asks: Final = msgspec.msgpack.Decoder(ScaleAsk)
_answers: Final = msgspec.msgpack.Decoder(ScaleAnswer)


def unpack_ask(data: bytes) -> ScaleAsk:
    """Return a home's request, or raise MessageFormatError."""
    return unpack(_asks, data)


def unpack_answer(data: bytes) -> ScaleAnswer:
    """Return a node's answer, or raise MessageFormatError."""
    return unpack(_answers, data)
