"""How a node asks a peer for a part of a checkpoint's file, and what the first frame of the answer is.

`AskFile` names a model, one of its files and a range. The answer is `FileHead` and then the bytes in
frames, as many as the head says; or `FileRefused` alone.
"""

from typing import Final, Literal

import msgspec

from sllm_node.cluster.packing import unpack

FILE: Final = "file"
RANGE_BYTES: Final = 16 << 20
"""Asked for at once, at most: so a node that sends has its turns free again soon."""
FRAME_BYTES: Final = 256 << 10
"""Of a file: what may keep the sender's event loop for the time of one write."""
HEAD_BYTES: Final = 64 << 10

Refused = Literal["absent", "other", "busy", "range"]
"""All of the file is not there; another version of it is; too many are sent at once; no such bytes."""


class AskFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Send these bytes."""

    model: str
    name: str
    digest: str
    """Of the index that the asker has (`checkpoint.given.index_digest`); empty: it has none yet."""
    first: int
    size: int
    """At most so many: the file may end before."""


class FileHead(msgspec.Struct, frozen=True, array_like=True, tag="head"):
    """So many bytes follow."""

    size: int
    total: int
    """Of the whole file."""
    texts: tuple[str, ...] = ()
    """With an index: which of the texts are there."""


class FileRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Nothing follows."""

    reason: Refused


_asks: Final = msgspec.msgpack.Decoder(AskFile)
_heads: Final[msgspec.msgpack.Decoder[FileHead | FileRefused]] = msgspec.msgpack.Decoder(
    FileHead | FileRefused
)


def unpack_ask(data: bytes) -> AskFile:
    """Return a request for a file, or raise MessageFormatError."""
    return unpack(_asks, data)


def unpack_head(data: bytes) -> FileHead | FileRefused:
    """Return the first frame of its answer, or raise MessageFormatError."""
    return unpack(_heads, data)
