"""How a node tells its peers of a wish, and what they answer. Pure.

A wish carries when and where it was made, so that all nodes keep the same one of two for one key: the
later, and of two of the same millisecond the one of the greater node.
"""

from typing import Final

import msgspec

from sllm_node.cluster.packing import unpack
from sllm_node.cluster.records import Alias, Change, Desired, Drop, Put, Wished
from sllm_node.cluster.wire import Failed
from sllm_node.core.errors import MessageFormatError
from sllm_node.core.types import NodeId

WISH: Final = "wish"
Kind = type[Alias] | type[Desired]
_WORDS: Final[dict[Kind, str]] = {Alias: "alias", Desired: "desired"}


class Wish(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One change, as peers are told: exactly one of the first four."""

    alias: Alias | None = None
    desired: Desired | None = None
    forgets_alias: str | None = None
    forgets_desired: str | None = None
    at_ms: int = 0
    node: str = ""


class Kept(msgspec.Struct, frozen=True, array_like=True, tag="kept"):
    """The peer has the wish, or a newer one for the same key."""

    had: bool
    """Whether something was wished for before, as far as this peer knew."""
    newer: Wish | None = None
    """What holds at the peer instead."""


_wishes: Final = msgspec.msgpack.Decoder(Wish)
_answers: Final[msgspec.msgpack.Decoder[Kept | Failed]] = msgspec.msgpack.Decoder(Kept | Failed)


def key_of(change: Change) -> tuple[Kind, str]:
    """Return which record a wish is about."""
    match change:
        case Put(Alias() | Desired() as record):
            return type(record), record.key
        case Drop(kind, key) if kind is Alias or kind is Desired:
            return kind, key
    raise AssertionError(change)


def word_of(kind: Kind, key: str) -> str:
    """Return the key of the record of when a wish was made."""
    return f"{_WORDS[kind]} {key}"


def wish_of(change: Change, made: Wished) -> Wish:
    """Return a change as peers are told of it."""
    match change:
        case Put(Alias() as alias):
            wish = Wish(alias=alias)
        case Put(Desired() as desired):
            wish = Wish(desired=desired)
        case _:
            kind, key = key_of(change)
            wish = Wish(forgets_alias=key) if kind is Alias else Wish(forgets_desired=key)
    return msgspec.structs.replace(wish, at_ms=made.at_ms, node=made.node)


def change_of(wish: Wish) -> tuple[Change, Wished]:
    """Return the change that a wish is, and when it was made.

    Raises:
        MessageFormatError: it is none, or several.
    """
    found: list[Change] = [Put(one) for one in (wish.alias, wish.desired) if one is not None]
    if wish.forgets_alias is not None:
        found.append(Drop(Alias, wish.forgets_alias))
    if wish.forgets_desired is not None:
        found.append(Drop(Desired, wish.forgets_desired))
    if len(found) != 1:
        raise MessageFormatError(f"a wish of {len(found)} changes")
    word = word_of(*key_of(found[0]))
    return found[0], Wished(word, wish.at_ms, NodeId(wish.node))


def is_about_same(wish: Wish, other: Wish) -> bool:
    """Tell whether two wishes have the same key, or raise MessageFormatError."""
    return key_of(change_of(wish)[0]) == key_of(change_of(other)[0])


def unpack_wish(data: bytes) -> Wish:
    """Return a wish, or raise MessageFormatError."""
    return unpack(_wishes, data, "a wish")


def unpack_kept(data: bytes) -> Kept | Failed:
    """Return a peer's answer, or raise MessageFormatError."""
    return unpack(_answers, data, "an answer to a wish")
