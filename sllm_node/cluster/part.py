"""One node's part in a session, as its entry node sees it: at a peer or here, both alike.

A part has an epoch, and gives records from `start` on until it has ended, is given up (`close`), or hands
over to a part of the next epoch. One that holds takes tokens (`extend`) and gives none until it is let go.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Final, Protocol

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.packing import pack
from sllm_node.cluster.serving import EXTEND, GENERATE, LEFT
from sllm_node.cluster.wire import (
    Extend,
    Failed,
    Forward,
    Granted,
    Left,
    Record,
    Refusal,
    Standing,
    Tokens,
    Waiting,
    error_of,
    unpack_record,
)
from sllm_node.core.errors import PeerUnreachableError, SllmError
from sllm_node.core.types import NodeId, TokenIds
from sllm_node.schedule.stream import Stream

LEFT_S: Final = 1.0
"""After so long, a node that does not hear that its session moved sees the connection end."""
TOLD_S: Final = 1.0
"""So often a session that waits here tells how its model stands."""
FRAME_BYTES: Final = 64
"""What a message costs beside its payload, about; for the count of bytes."""


class Asking(Protocol):
    """The way to peers; `transport.Client` satisfies it."""

    def stream(
        self, peer: NodeId, what: str, payload: bytes, silence_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask, and give the frames of the answer as they come; leaving early ends it there."""


class Source(Protocol):
    """Where a part's records come from."""

    bytes_sent: int

    def records(self) -> AsyncGenerator[Record, None]:
        """Give them; leaving early ends the session there."""

    async def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Add tokens to a session that holds."""

    def leaves(self, migration: str) -> None:
        """Let the node know, when reading ends, that it is a move."""

    def close(self) -> None:
        """Drop what nobody reads any more, if reading never began."""


class RefusedError(Exception):
    """A node took no session, and told its state."""

    def __init__(self, record: Refusal) -> None:
        super().__init__(record.reason)
        self.record = record


class Part:
    """Ends with None (the session is over), an error, or the part that goes on."""

    def __init__(self, choice: Choice, epoch: int, source: Source) -> None:
        self.choice = choice
        self.epoch = epoch
        self.source = source
        self.ended: asyncio.Future[Exception | Part | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self, take: "Callable[[Part, Record], bool]") -> None:
        """Begin; `take` gets the records and says which was the last."""
        self._task = asyncio.create_task(self._pump(take), name=f"part at {self.choice.node}")

    def end(self, how: "Exception | Part | None") -> None:
        """Say how it ended; only the first word counts."""
        if not self.ended.done():
            self.ended.set_result(how)

    def close(self) -> None:
        """Let the node drop the session, if it still has it."""
        if self._task is not None and not self._is_closed:  # its last word may be on its way
            self._task.cancel()
        self._is_closed = True
        self.source.close()

    async def _pump(self, take: "Callable[[Part, Record], bool]") -> None:
        try:
            async with aclosing(self.source.records()) as records:
                async for record in records:
                    _check(record)
                    if take(self, record):
                        self.end(None)
                        return
            end: Exception = PeerUnreachableError(
                self.choice.node, "its answer ended in the middle"
            )
        except Exception as error:  # noqa: BLE001 - told to whoever waits for the end
            end = error
        self.end(end)


def _check(record: Record) -> None:
    """Raise what a record says that went wrong."""
    if isinstance(record, Refusal):
        raise RefusedError(record)
    if isinstance(record, Failed):
        raise error_of(record)


class PeerSource:
    """A session that a peer serves."""

    def __init__(self, client: Asking, choice: Choice, forward: Forward, silence_s: float) -> None:
        self._client = client
        self._peer = choice.node
        self._forward = forward
        self._silence_s = silence_s
        self._migration = ""
        self.bytes_sent = 0

    async def records(self) -> AsyncGenerator[Record, None]:
        """Give what the peer tells."""
        payload = pack(self._forward)
        self.bytes_sent += len(payload) + FRAME_BYTES
        async with self._client.stream(self._peer, GENERATE, payload, self._silence_s) as frames:
            try:
                async for frame in frames:
                    yield unpack_record(frame)
            finally:
                if self._migration:
                    await self._tell_left()

    async def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Send tokens.

        Raises:
            MoveRefusedError: the peer does not hold the session any more.
            PeerUnreachableError: it can't be asked.
        """
        session, epoch = self._forward.request.session, self._forward.epoch
        payload = pack(Extend(session, epoch, position, tokens, lets_go))
        self.bytes_sent += len(payload) + FRAME_BYTES
        async with self._client.stream(self._peer, EXTEND, payload, self._silence_s) as frames:
            async for frame in frames:
                record = unpack_record(frame)
                if isinstance(record, Failed):
                    raise error_of(record)

    def leaves(self, migration: str) -> None:
        """Tell the peer before leaving the answer."""
        self._migration = migration

    def close(self) -> None:
        """Do nothing: leaving the answer tells the peer."""

    async def _tell_left(self) -> None:
        told = Left(self._forward.request.session, self._forward.epoch, self._migration)
        with suppress(SllmError, TimeoutError):  # it ends anyway, with the answer
            async with (
                asyncio.timeout(LEFT_S),
                self._client.stream(self._peer, LEFT, pack(told), LEFT_S) as frames,
            ):
                async for _ in frames:
                    pass


class LocalSource:
    """A session that this node serves itself."""

    def __init__(
        self,
        opening: Callable[[], Stream] | None = None,
        stream: Stream | None = None,
        known: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Of a session that is begun when it is read, or that is there.

        `known`: to be waited for before it begins: then this node knows the model.
        """
        self._opening = opening
        self._known = known
        self._stream = stream
        self.bytes_sent = 0

    async def records(self) -> AsyncGenerator[Record, None]:
        """Give what the session gives."""
        if self._stream is None:
            assert self._opening is not None
            if self._known is not None:
                await self._known()
            self._stream = self._opening()
        stream = self._stream
        try:
            while not stream.started.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(TOLD_S):
                        await stream.started.wait()
                yield Waiting(stream.status())
            if stream.is_granted:
                yield Granted(stream.waited, stream.weights)
            told = await stream.standing(-1)
            while told is not None:
                yield Standing(told)
                told = await stream.standing(told)
            async for chunk in stream:
                yield Tokens(chunk, stream.position - len(chunk.tokens))
        finally:
            stream.cancel()

    async def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Add tokens."""
        if self._stream is not None:
            self._stream.extend(position, tokens, lets_go=lets_go)

    def leaves(self, migration: str) -> None:
        """End the session here."""
        if self._stream is not None:
            self._stream.leave(migration)

    def close(self) -> None:
        """End the session here."""
        if self._stream is not None:
            self._stream.cancel()
