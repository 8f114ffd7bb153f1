"""What operators wish of running nodes: other names of models, and between how many replicas they have.

A wish is written to this node's journal and then told to every peer that is alive, which writes it to its
own; who was not reached is named in the answer, and the wish can be made again. Where there is a
directory, desired replicas go there instead and reach all nodes by it. What the cluster file says of a
model is not changed by a wish: it would come back with the file.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from sllm_node.cluster.journal import Journal
from sllm_node.cluster.records import Alias, Change, Desired, Drop, Put, check
from sllm_node.cluster.transport import Reply
from sllm_node.cluster.wire import Failed, Granted, error_of, failed, pack, unpack_record
from sllm_node.core.errors import (
    InvalidRequestError,
    MessageFormatError,
    SllmError,
    WishConflictError,
)
from sllm_node.core.types import ModelId, NodeId

log = logging.getLogger(__name__)

WISH: Final = "wish"


class Wish(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One change, as peers are told: exactly one of these."""

    alias: Alias | None = None
    desired: Desired | None = None
    forgets_alias: str | None = None
    forgets_desired: str | None = None


class Others(Protocol):
    """The peers; `Peers` satisfies it."""

    def desired(self) -> tuple[Desired, ...]:
        """Return what the cluster file wishes for."""

    def known(self) -> tuple[NodeId, ...]:
        """Return all peers, alive or not."""

    async def tell(self, peer: NodeId, what: str, payload: bytes) -> bytes:
        """Tell a peer and return its answer."""


class Shared(Protocol):
    """The directory, as far as it has wishes; `Listing` satisfies it."""

    def desired(self) -> tuple[Desired, ...]: ...

    async def put(self, record: Desired) -> None: ...

    async def drop(self, record: Desired) -> None: ...


@dataclass(frozen=True, slots=True)
class Reach:
    """Who is to know of wishes beside this node; None: nobody."""

    others: Others | None = None
    directory: Shared | None = None


class Wishes:
    """The wishes that hold on this node."""

    def __init__(
        self, journal: Journal, find: Callable[[str], object], reach: Reach | None = None
    ) -> None:
        """`find` returns a model that some node has, or raises ModelNotFoundError."""
        self._journal = journal
        self._find = find
        self._reach = reach or Reach()

    # --- what holds ---------------------------------------------------------------------------

    def resolve(self, name: str) -> str:
        """Return the model that clients mean by `name`."""
        alias = self._journal.records.aliases.get(name)
        return name if alias is None else alias.model

    def aliases(self) -> dict[str, str]:
        """Return the model behind each alias."""
        return {name: one.model for name, one in sorted(self._journal.records.aliases.items())}

    def desired(self) -> tuple[Desired, ...]:
        """Return the desired replicas that were wished for here or at a peer."""
        if self._reach.directory is not None:
            return self._reach.directory.desired()
        return tuple(self._journal.records.desired.values())

    # --- wishing ------------------------------------------------------------------------------

    async def set_alias(self, name: str, model: str) -> list[str]:
        """Let clients ask for `model` as `name`; return the peers that do not know it yet.

        Raises:
            ModelNotFoundError: no node has such a model.
            WishConflictError: a model has that name, or `model` is an alias itself.
            JournalError: it would not survive.
        """
        alias = Alias(name, ModelId(model))
        check(alias)
        self._find_model(model)
        if self._is_model(name):
            raise WishConflictError(f"a model is called {name!r}; take another name for the alias")
        return await self._make(Put(alias))

    async def drop_alias(self, name: str) -> list[str]:
        """Forget an alias; return the peers that still have it.

        Raises:
            InvalidRequestError: there is none of that name.
            JournalError: it would come back.
        """
        if name not in self._journal.records.aliases:
            raise InvalidRequestError(f"there is no alias {name!r}", param="alias")
        return await self._make(Drop(Alias, name))

    async def scale(self, desired: Desired) -> list[str]:
        """Keep between so many replicas of a model; return the peers that do not know it yet.

        Raises:
            InvalidRequestError: the numbers make no sense, or this node is in no cluster.
            ModelNotFoundError: no node has such a model.
            WishConflictError: the cluster file says it already.
            SllmError: it can't be kept.
        """
        check(desired)
        self._find_model(desired.model)
        self._check_free(desired.model)
        if self._reach.directory is not None:
            await self._reach.directory.put(desired)
            return []
        return await self._make(Put(desired))

    async def unscale(self, model: str) -> list[str]:
        """Desire no replicas of a model any more; return the peers that still do.

        Raises:
            InvalidRequestError: nobody has wished for any.
            WishConflictError: the cluster file does.
            SllmError: it would come back.
        """
        self._check_free(model)
        wish = next((one for one in self.desired() if one.model == model), None)
        if wish is None:
            raise InvalidRequestError(f"no replicas of {model!r} are desired", param="model")
        if self._reach.directory is not None:
            await self._reach.directory.drop(wish)
            return []
        return await self._make(Drop(Desired, model))

    def _find_model(self, model: str) -> None:
        if (meant := self.resolve(model)) != model:
            raise WishConflictError(f"{model!r} is an alias of {meant!r}; name the model itself")
        self._find(model)

    def _is_model(self, name: str) -> bool:
        try:
            self._find(name)
        except SllmError:
            return False
        return True

    def _check_free(self, model: str) -> None:
        if self._reach.others is None:
            problem = "this node is in no cluster (cluster.file in its config); it has one replica of a model"
            raise InvalidRequestError(problem)
        for wish in self._reach.others.desired():
            if wish.model == model:
                said = f"{wish.minimum} to {wish.maximum} replicas of {model!r}"
                raise WishConflictError(f"the cluster file desires {said}; change it there")

    # --- making it so -------------------------------------------------------------------------

    async def _make(self, change: Change) -> list[str]:
        await self._journal.write(change)
        log.info("wish kept", extra={"wish": str(change)})
        others = self._reach.others
        if others is None:
            return []
        payload = pack(_packed(change))
        peers = others.known()
        told = await asyncio.gather(*(self._tell(others, peer, payload) for peer in peers))
        return [peer for peer, is_told in zip(peers, told, strict=True) if not is_told]

    async def _tell(self, others: Others, peer: NodeId, payload: bytes) -> bool:
        try:
            record = unpack_record(await others.tell(peer, WISH, payload))
            if isinstance(record, Failed):
                raise error_of(record)
        except SllmError as error:
            log.warning("wish not told", extra={"peer": peer, "error": str(error)})
            return False
        return True

    async def take(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Keep what an operator wished for at a peer."""
        change = _unpacked(payload)
        try:
            await self._journal.write(change)
        except SllmError as error:
            await reply.send(pack(failed(error)))
            return
        log.info("wish kept", extra={"wish": str(change), "peer": sender})
        await reply.send(pack(Granted()))


def _packed(change: Change) -> Wish:
    match change:
        case Put(Alias() as alias):
            return Wish(alias=alias)
        case Put(Desired() as desired):
            return Wish(desired=desired)
        case Drop(kind, key) if kind is Alias:
            return Wish(forgets_alias=key)
        case Drop(kind, key) if kind is Desired:
            return Wish(forgets_desired=key)
    raise AssertionError(change)


def _unpacked(payload: bytes) -> Change:
    try:
        wish = msgspec.msgpack.decode(payload, type=Wish)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageFormatError(f"a wish: {error}") from error
    found: list[Change] = [Put(one) for one in (wish.alias, wish.desired) if one is not None]
    forgotten: tuple[tuple[Any, str | None], ...] = (
        (Alias, wish.forgets_alias), (Desired, wish.forgets_desired),
    )  # fmt: skip
    found += [Drop(kind, key) for kind, key in forgotten if key is not None]
    if len(found) != 1:
        raise MessageFormatError(f"a wish of {len(found)} changes")
    return found[0]
