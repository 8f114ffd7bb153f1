"""What outlives a restart, as plain data: pins, aliases, registered models, desired replicas, peers.

The journal keeps them on this node's disk, the directory (if there is one) shares some of them. Both
take the same changes: put a record in the place of the one with its key, or drop a key.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import ModelId, NodeId
from sllm_node.core.urls import is_plain

RECORDS_MAX: Final = 10_000
"""Of one kind."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,254}")
_NO_ADDRESS: Final = (
    "an address of a remote is needed, as in https://host/path or s3://bucket/prefix, without user, password, "
    "query and fragment: all nodes keep and show it; credentials belong into [remotes] of each node's config"
)
_TEXT_MAX: Final = 2048
_REPLICAS_MAX: Final = 10_000
_KEEP_ALIVE_S_MAX: Final = 31_536_000.0
_AT_MS_MAX: Final = 253_402_300_800_000
"""The year 10000."""


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator's wish that a model stays on this node's devices."""

    model: ModelId

    @property
    def key(self) -> str:
        return self.model


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name under which clients may ask for a model."""

    name: str
    model: ModelId

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Registration:
    """A model that the cluster serves, and the remote where its checkpoint can be fetched."""

    model: ModelId
    url: str

    @property
    def key(self) -> str:
        return self.model


@dataclass(frozen=True, slots=True)
class Desired:
    """Between how many replicas a model is to have, and how long one stays that demand needs no more."""

    model: ModelId
    minimum: int = 0
    maximum: int = 1
    keep_alive_s: float = 300.0

    @property
    def key(self) -> str:
        return self.model


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """Where a peer was reached last: what a node starts from when the directory is gone."""

    node: NodeId
    address: str

    @property
    def key(self) -> str:
        return self.node


@dataclass(frozen=True, slots=True)
class Wished:
    """When and where an alias or desired replicas were last set or forgotten; who has none is older than all."""

    what: str
    """`alias NAME` or `desired MODEL`."""
    at_ms: int
    node: NodeId

    @property
    def key(self) -> str:
        return self.what

    @property
    def order(self) -> tuple[int, str]:
        """Of two wishes the greater one counts."""
        return self.at_ms, self.node


Record = Pin | Alias | Registration | Desired | KnownPeer | Wished


@dataclass(frozen=True, slots=True)
class Put:
    """`record` takes the place of the one with its key."""

    record: Record


@dataclass(frozen=True, slots=True)
class Drop:
    """The record of that kind and key is no more; there may be none."""

    kind: type[Record]
    key: str


Change = Put | Drop


@dataclass(frozen=True, slots=True)
class Records:
    """All records, by kind and key."""

    pins: Mapping[str, Pin] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    registrations: Mapping[str, Registration] = field(default_factory=dict)
    desired: Mapping[str, Desired] = field(default_factory=dict)
    peers: Mapping[str, KnownPeer] = field(default_factory=dict)
    wished: Mapping[str, Wished] = field(default_factory=dict)

    def of(self, kind: type[Record]) -> Mapping[str, Record]:
        """Return the records of one kind."""
        found: Mapping[str, Record] = getattr(self, FIELDS[kind])
        return found

    def after(self, change: Change) -> "Records":
        """Return the records with `change` made."""
        kind = type(change.record) if isinstance(change, Put) else change.kind
        rows = dict(self.of(kind))
        if isinstance(change, Put):
            rows[change.record.key] = change.record
        else:
            rows.pop(change.key, None)
        changed: Any = {FIELDS[kind]: rows}
        return replace(self, **changed)


FIELDS: Final[Mapping[type[Record], str]] = {
    Pin: "pins",
    Alias: "aliases",
    Registration: "registrations",
    Desired: "desired",
    KnownPeer: "peers",
    Wished: "wished",
}


def check(record: Record) -> None:
    """Refuse what no operator can have meant.

    Raises:
        InvalidRequestError: it names the field.
    """
    match record:
        case Pin(model):
            _check_name("model", model)
        case Alias(name, model):
            _check_name("alias", name)
            _check_name("model", model)
            if name == model:
                raise InvalidRequestError(f"{name!r} is an alias of itself", param="alias")
        case Registration(model, url):
            _check_name("model", model)
            if not is_plain(url) or len(url) > _TEXT_MAX:
                raise InvalidRequestError(_NO_ADDRESS, param="url")
        case Desired():
            _check_desired(record)
        case KnownPeer(node, address):
            _check_name("node", node)
            _check_address(node, address)
        case Wished():
            _check_wished(record)


def _check_name(param: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        a = "an" if param == "alias" else "a"
        raise InvalidRequestError(f"{name[:100]!r} is no name of {a} {param}", param=param)


def _check_address(node: str, address: str) -> None:
    if not 0 < len(address) <= _TEXT_MAX:
        raise InvalidRequestError(f"node {node!r} has no address", param="address")


def _check_desired(desired: Desired) -> None:
    _check_name("model", desired.model)
    if not 0 <= desired.minimum <= desired.maximum <= _REPLICAS_MAX:
        raise InvalidRequestError(
            f"from {desired.minimum} to {desired.maximum} replicas: the least must not be above the "
            f"most, and both lie between 0 and {_REPLICAS_MAX}",
            param="minimum",
        )
    keep_alive_s = desired.keep_alive_s
    if not (math.isfinite(keep_alive_s) and 0 <= keep_alive_s <= _KEEP_ALIVE_S_MAX):
        raise InvalidRequestError(
            f"keep_alive_s = {keep_alive_s}: must be from 0 to {_KEEP_ALIVE_S_MAX:.0f}",
            param="keep_alive_s",
        )


def _check_wished(wished: Wished) -> None:
    if not 0 < len(wished.what) <= _TEXT_MAX or len(wished.node) > _TEXT_MAX:
        raise InvalidRequestError(f"{wished.what[:100]!r} is nothing to wish for", param="what")
    if not 0 <= wished.at_ms <= _AT_MS_MAX:
        raise InvalidRequestError(f"a wish of {wished.at_ms} ms is of no time", param="at_ms")
