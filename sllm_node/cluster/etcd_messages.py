"""What etcd's JSON gateway answers, as far as we read it; 64-bit numbers come as strings, bytes in base64."""

import msgspec


class Header(msgspec.Struct):
    """How far the server is."""

    revision: int = 0
    raft_term: int = 0


class Pair(msgspec.Struct):
    """A key and its value."""

    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class Event(msgspec.Struct):
    """A change of a key."""

    kv: Pair
    type: str = "PUT"


class Fault(msgspec.Struct):
    """Why a call was refused; `code` is gRPC's."""

    message: str = ""
    code: int = 0


class Answer(msgspec.Struct):
    """What unary calls answer; each has some of it."""

    header: Header = msgspec.field(default_factory=Header)
    kvs: tuple[Pair, ...] = ()
    more: bool = False
    lease: int = msgspec.field(default=0, name="ID")
    succeeded: bool = False
    token: str = ""


class Kept(msgspec.Struct):
    """The time that a lease has now; 0: it is no more."""

    ttl_s: int = msgspec.field(default=0, name="TTL")


class KeptLine(msgspec.Struct):
    """What a keep-alive answers; no result: the server can't tell now."""

    result: Kept | None = None


class Watched(msgspec.Struct):
    """What a watch tells."""

    header: Header = msgspec.field(default_factory=Header)
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0
    events: tuple[Event, ...] = ()


class WatchLine(msgspec.Struct):
    """One line of a watch."""

    result: Watched | None = None
    error: Fault | None = None


def end_of(prefix: str) -> bytes:
    """Return the first key behind all that begin with `prefix`, which ends in a slash."""
    return prefix[:-1].encode() + b"0"


def base64_of(content: bytes) -> str:
    """Return bytes as the gateway takes them."""
    return str(msgspec.to_builtins(content))
