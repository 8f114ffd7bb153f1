"""A node's state as the document that heartbeats carry: MessagePack, deflated, bounded on arrival.

Names of fields repeat with each model and session, so deflating makes a fifth of it. What is too long
for the cluster's limit is told with fewer words first: busy replicas without their sessions.
"""

import zlib
from dataclasses import replace
from typing import Final

import msgspec

from sllm_node.cluster.state import FORMAT, NodeState, ReplicaState
from sllm_node.core.errors import MessageFormatError, ProtocolVersionError

_LEVEL: Final = 1
_INFLATED_MAX: Final = 32 << 20
"""Bytes; a document of 4 MiB that deflates better than that is no document."""


def encode_state(state: NodeState, limit: int) -> bytes:
    """Return the document of `state`; sessions are left out if it is above `limit` with them."""
    document = _deflated(state)
    if len(document) > limit:
        document = _deflated(replace(state, replicas=tuple(map(_short, state.replicas))))
    return document


def decode_state(document: bytes) -> NodeState:
    """Return the state that `document` is.

    Raises:
        ProtocolVersionError: a node of another release made it.
        MessageFormatError: it is none.
    """
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(document, _INFLATED_MAX)
        if not inflate.eof:
            raise MessageFormatError("a state document is cut off, or far too long")
        state = msgspec.msgpack.decode(data, type=NodeState)
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(f"a state document: {error}") from error
    if state.format != FORMAT:
        raise ProtocolVersionError(state.format, FORMAT)
    return state


def _deflated(state: NodeState) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(state), _LEVEL)


def _short(replica: ReplicaState) -> ReplicaState:
    """Tell of a busy replica only what it has free, and that it can't leave."""
    if not replica.sessions:
        return replica
    return replace(replica, sessions=(), slots=max(0, replica.free_slots), is_pinned=True)
