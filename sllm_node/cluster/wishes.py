"""What operators wish of running nodes: other names of models, and between how many replicas they have.

A wish is written to this node's journal and then told to every peer that is alive, which writes it to its
own; who was not reached is named in the answer, and the wish can be made again. Where there is a
directory, desired replicas go there instead and reach all nodes by it; registered models are only there. What the cluster file says of a
model is not changed by a wish: it would come back with the file.

Wishes of one node are made and told one after another, to their end even if the operator goes away. Each
is kept with when and where it was made, forgotten ones too, and the last one counts at all nodes: a
peer that knows a newer one for the same key answers with that, which is then kept here, too.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from sllm_node.cluster.aliases import Aliases
from sllm_node.cluster.directory_keys import SharedRecord
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.packing import pack
from sllm_node.cluster.records import Alias, Change, Desired, Drop, Put, Registration, Wished, check
from sllm_node.cluster.transport import Reply
from sllm_node.cluster.wire import Failed, error_of, failed
from sllm_node.cluster.wish_messages import (
    WISH,
    Kept,
    Wish,
    change_of,
    is_about_same,
    key_of,
    unpack_kept,
    unpack_wish,
    wish_of,
    word_of,
)
from sllm_node.core.errors import (
    InvalidRequestError,
    MessageFormatError,
    SllmError,
    WishConflictError,
)
from sllm_node.core.types import ModelId, NodeId

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FORGOTTEN_MAX: Final = 1000
"""Wishes that were taken back, of which it is remembered when."""


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

    def registrations(self) -> tuple[Registration, ...]: ...

    async def put(self, record: SharedRecord) -> None: ...

    async def drop(self, record: SharedRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class Reach:
    """Who is to know of wishes beside this node; None: nobody."""

    others: Others | None = None
    directory: Shared | None = None
    me: str = ""


@dataclass(frozen=True, slots=True)
class _Told:
    """How a wish went."""

    missed: list[str]
    had: bool
    """Something was wished for before, here or at a peer."""


class Wishes:
    """The wishes that hold on this node."""

    def __init__(
        self,
        journal: Journal,
        find: Callable[[str], object],
        reach: Reach | None = None,
        wall: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`find` returns a model that some node has, or raises ModelNotFoundError; `wall`: seconds."""
        self._journal = journal
        self._find = find
        self._aliases = aliases = Aliases(journal, find)
        self.resolve, self.aliases, self.hidden = aliases.resolve, aliases.all, aliases.hidden
        self._reach = reach or Reach()
        self._wall = wall
        self._turn = asyncio.Lock()
        """Of making a wish and telling it."""
        self._keeping = asyncio.Lock()
        """Of comparing a wish with what is kept, and writing it. Not held while peers are told, as they keep theirs."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Wait for what is being made and told."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- what holds ---------------------------------------------------------------------------

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
        if self._aliases.is_model(name):
            raise WishConflictError(f"a model is called {name!r}; take another name for the alias")
        return (await self._make(Put(alias))).missed

    async def drop_alias(self, name: str) -> list[str]:
        """Forget an alias, here or not; return the peers that may still have it.

        Raises:
            InvalidRequestError: there is none of that name at any node.
            JournalError: it would come back.
        """
        told = await self._forget(Drop(Alias, name))
        if not (told.missed or told.had):
            raise InvalidRequestError(f"there is no alias {name!r}", param="alias")
        return told.missed

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
        return (await self._make(Put(desired))).missed

    async def unscale(self, model: str) -> list[str]:
        """Desire no replicas of a model any more; return the peers that may still do.

        Raises:
            InvalidRequestError: nobody has wished for any.
            WishConflictError: the cluster file does, or `model` is an alias.
            SllmError: it would come back.
        """
        self._check_free(model)
        none = InvalidRequestError(f"no replicas of {model!r} are desired", param="model")
        wish = next((one for one in self.desired() if one.model == model), None)
        if wish is None:
            self._aliases.check_no_alias(model)
        if self._reach.directory is not None:
            if wish is None:
                raise none
            await self._reach.directory.drop(wish)
            return []
        told = await self._forget(Drop(Desired, model))
        if not (told.missed or told.had):
            raise none
        return told.missed

    async def register(self, registration: Registration) -> None:
        """Let every node load a model from an address.

        Raises:
            InvalidRequestError: the address is none, or the cluster has no directory.
            WishConflictError: the model is an alias.
            SllmError: the directory does not take it.
        """
        check(registration)
        self._aliases.check_no_alias(registration.model)
        await self._shared().put(registration)

    async def unregister(self, model: str) -> None:
        """Let nodes load a model from its address no more; what has come of it stays.

        Raises:
            InvalidRequestError: it is not registered.
            SllmError: the directory does not take it.
        """
        shared = self._shared()
        for registration in shared.registrations():
            if registration.model == model:
                await shared.drop(registration)
                return
        raise InvalidRequestError(f"the model {model!r} is not registered", param="model")

    def _shared(self) -> Shared:
        if self._reach.directory is None:
            problem = "there is no directory that models could be registered in"
            raise InvalidRequestError(f"{problem}; name a remote in [remotes] of each node instead")
        return self._reach.directory

    def _find_model(self, model: str) -> None:
        self._aliases.check_no_alias(model)
        self._find(model)

    def _check_free(self, model: str) -> None:
        if self._reach.others is None:
            problem = "this node is in no cluster (cluster.file in its config); it has one replica of a model"
            raise InvalidRequestError(problem)
        for wish in self._reach.others.desired():
            if wish.model == model:
                said = f"{wish.minimum} to {wish.maximum} replicas of {model!r}"
                raise WishConflictError(f"the cluster file desires {said}; change it there")

    # --- making it so -------------------------------------------------------------------------

    async def _forget(self, change: Drop) -> _Told:
        """Drop a record, here and at peers, though it is not here: one that was missed may have it."""
        if self._reach.others is None and not self._has(change):
            return _Told([], had=False)
        return await self._make(change)

    async def _make(self, change: Change) -> _Told:
        return await self._to_its_end(self._in_turn(change))

    async def _to_its_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do `work` whether or not who asked for it goes away."""
        task = asyncio.create_task(work, name="wish")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("wish not kept", extra={"error": str(error)})

    async def _in_turn(self, change: Change) -> _Told:
        async with self._turn:
            wish, had = await self._write(change)
            others = self._reach.others
            if others is None:
                return _Told([], had)
            peers = others.known()
            told = await asyncio.gather(*(self._tell(others, peer, wish) for peer in peers))
            answers = [answer for answer in told if answer is not None]
            await self._give_way(change, [one.newer for one in answers if one.newer is not None])
            missed: list[str] = [
                peer for peer, answer in zip(peers, told, strict=True) if answer is None
            ]
            return _Told(missed, had or any(answer.had for answer in answers))

    async def _write(self, change: Change) -> tuple[Wish, bool]:
        """Keep a wish that is made now: later than all that is known for its key."""
        async with self._keeping:
            word, had = word_of(*key_of(change)), self._has(change)
            known = self._journal.records.wished.get(word)
            at_ms = max(int(self._wall() * 1000), 0 if known is None else known.at_ms + 1)
            made = Wished(word, at_ms, NodeId(self._reach.me))
            await self._journal.write(*self._too_many(word), change, Put(made))
        log.info("wish kept", extra={"wish": str(change)})
        return wish_of(change, made), had

    async def _give_way(self, change: Change, newer: list[Wish]) -> None:
        """Keep what peers say was wished for later; tell the operator if it is something else."""
        for wish in newer:
            await self._keep(wish)
        if newer and (holds := self._kept(change)) != change:
            where = max(newer, key=lambda wish: wish.at_ms).node
            problem = f"{where!r} was told otherwise later, and that counts: {_said(holds)}"
            raise WishConflictError(f"{problem}; ask again if it is not to")

    async def _tell(self, others: Others, peer: NodeId, wish: Wish) -> Kept | None:
        try:
            answer = unpack_kept(await others.tell(peer, WISH, pack(wish)))
            if isinstance(answer, Failed):
                raise error_of(answer)
            if answer.newer is not None and not is_about_same(wish, answer.newer):
                raise MessageFormatError("the answer to a wish is about another")
        except SllmError as error:
            log.warning("wish not told", extra={"peer": peer, "error": str(error)})
            return None
        return answer

    async def take(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Keep what an operator wished for at a peer, unless something newer is known here."""
        wish = unpack_wish(payload)
        change_of(wish)
        try:
            kept = await self._to_its_end(self._keep(wish))
        except SllmError as error:
            await reply.send(pack(failed(error)))
            return
        log.info(
            "wish of a peer", extra={"wish": str(wish), "peer": sender, "counts": not kept.newer}
        )
        await reply.send(pack(kept))

    async def _keep(self, wish: Wish) -> Kept:
        change, made = change_of(wish)
        async with self._keeping:
            had, known = self._has(change), self._journal.records.wished.get(made.what)
            if known is not None and made.order < known.order:
                return Kept(had, wish_of(self._kept(change), known))
            await self._journal.write(*self._too_many(made.what), change, Put(made))
        return Kept(had)

    def _has(self, change: Change) -> bool:
        kind, key = key_of(change)
        return key in self._journal.records.of(kind)

    def _kept(self, change: Change) -> Change:
        """Return what holds here for the key of `change`."""
        kind, key = key_of(change)
        record = self._journal.records.of(kind).get(key)
        return Drop(kind, key) if record is None else Put(record)

    def _too_many(self, word: str) -> list[Change]:
        """Return what makes room for one more wish that was taken back: the oldest of these go."""
        records = self._journal.records
        held = {word_of(kind, key) for kind in (Alias, Desired) for key in records.of(kind)}
        gone = [one for key, one in records.wished.items() if key not in held and key != word]
        gone.sort(key=lambda one: one.order)
        return [Drop(Wished, one.what) for one in gone[: max(0, len(gone) + 1 - _FORGOTTEN_MAX)]]


def _said(change: Change) -> str:
    match change:
        case Put(Alias(name, model)):
            return f"{name!r} is an alias of {model!r}"
        case Put(Desired(model, minimum, maximum)):
            return f"{minimum} to {maximum} replicas of {model!r}"
        case _:
            return f"{key_of(change)[1]!r} was taken back"
