"""How nodes, registered models and desired replicas are written in the directory: keys and values.

A key is the kind, a slash and the name, behind a prefix that `cluster/etcd.py` adds; a value is JSON.
"""

from dataclasses import dataclass
from typing import Final

import msgspec

from sllm_node.cluster.records import Desired, KnownPeer, Registration, check
from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import NodeId

FORMAT: Final = 1
"""Of the values; others are passed over and told."""
SHARED: Final[dict[str, type[Registration | Desired]]] = {
    "models": Registration,
    "desired": Desired,
}
"""Kinds of records that the directory holds, by the part of the key that names them."""
NODES: Final = "nodes"
SharedRecord = Registration | Desired


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What a node registers of itself."""

    node: NodeId
    address: str
    boot: int
    is_leaving: bool = False
    """Its key goes next, and no lease had to end for that."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of the directory, without the prefix; `value` is None where it was deleted."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Head:
    """How far the server is that answers."""

    revision: int
    term: int


def key_of(record: NodeRecord | SharedRecord) -> str:
    """Return the key of a record, without the prefix."""
    match record:
        case NodeRecord():
            return f"{NODES}/{record.node}"
        case Registration():
            return f"models/{record.model}"
        case Desired():
            return f"desired/{record.model}"


def encode(record: NodeRecord | SharedRecord) -> bytes:
    """Return the value under which a record is put."""
    return msgspec.json.encode({"format": FORMAT, **msgspec.to_builtins(record)})


def decode(key: str, value: bytes) -> NodeRecord | SharedRecord | None:
    """Return the record under a key; None: a key of another release.

    Raises:
        ValueError: the value is none of ours, or of another key.
    """
    kind = key.partition("/")[0]
    wanted: type[NodeRecord | SharedRecord] | None
    wanted = NodeRecord if kind == NODES else SHARED.get(kind)
    if wanted is None:
        return None
    fields = msgspec.json.decode(value, type=dict[str, object])
    if (found := fields.pop("format", None)) != FORMAT:
        raise ValueError(f"format {found!r}, and this release knows {FORMAT}")
    record = msgspec.convert(fields, wanted)
    if key_of(record) != key:
        raise ValueError(f"is the value of {key_of(record)!r}")
    try:
        is_node = isinstance(record, NodeRecord)
        check(KnownPeer(record.node, record.address) if is_node else record)  # type: ignore[union-attr,arg-type]
    except InvalidRequestError as error:
        raise ValueError(str(error)) from error
    return record
