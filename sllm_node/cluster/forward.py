"""One session that another node serves for this one, as its reader sees it: a stream that outlives nodes.

    placed -> waiting -> running -> ended, and back to placed when its node fails or refuses

This node holds all that the session is: prompt, sampling, and the tokens so far. When its node dies,
drains or refuses, it is placed again and goes on behind those tokens (`GenerationRequest.resumed`): the
reader sees a pause. Text is made where a token is drawn and comes with it, and whoever resumes feeds the
known tokens to a new detokenizer, which shows what the old one had not shown: nothing twice, nothing
lost. One task drives a session; what its reader has not taken is joined.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.document import decode_state
from sllm_node.cluster.reservations import Ask
from sllm_node.cluster.serving import GENERATE
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.wire import (
    HOPS_MAX,
    Failed,
    Forward,
    Granted,
    Record,
    Refusal,
    Tokens,
    Waiting,
    error_of,
    pack,
    unpack_record,
)
from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    CancelledByOperatorError,
    Fault,
    InternalError,
    MessageError,
    ModelNotFoundError,
    NoPlaceError,
    PeerDeniedError,
    PeerUnreachableError,
    SllmError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    NodeId,
    SessionStatus,
)
from sllm_node.schedule.stream import Stream

log = logging.getLogger(__name__)

REFUSALS_MAX: Final = 3
"""By one node in a row: then it is not asked again for this session."""
UNREACHABLE: Final = (PeerUnreachableError, PeerDeniedError, MessageError)
"""Whoever fails like this may be there again later."""


class Ways(Protocol):
    """What a session asks of the router."""

    def choose(self, request: GenerationRequest, excluded: frozenset[NodeId]) -> Choice | None:
        """Place it anew."""

    def ask(self, choice: Choice, request: GenerationRequest) -> Ask:
        """Return what the choice counts on."""

    def open_local(self, request: GenerationRequest, keep_alive_s: float | None) -> Stream:
        """Begin it here."""

    def learn(self, state: NodeState) -> None:
        """Take the state that came with a refusal."""

    def lost(self, node: NodeId, error: SllmError) -> None:
        """Take note that a node can't be reached."""

    def started(self, choice: Choice, model: str, seconds: float) -> None:
        """Take note that a session runs, so long after it was placed."""

    def left(self, choice: Choice, model: str, outcome: str) -> None:
        """Take note of how a node's part in a session ended."""

    def ended(self, stream: "RoutedStream") -> None:
        """Take note that a session has ended."""

    async def changed(self, timeout_s: float) -> bool:
        """Wait until something is heard of the cluster; False: nothing for so long."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a session is, in seconds."""

    silence_s: float
    """A node that says nothing for so long is given up."""
    patience_s: float
    """How long a session waits for any node that can take it, after one was lost."""


class Asking(Protocol):
    """The way to peers; `transport.Client` satisfies it."""

    def stream(
        self, peer: NodeId, what: str, payload: bytes, silence_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask, and give the frames of the answer as they come; leaving early ends it there."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all routed sessions of a node share."""

    client: Asking
    clock: Clock
    limits: Limits


class _RefusedError(Exception):
    """A node took no session, and told its state."""

    def __init__(self, record: Refusal) -> None:
        super().__init__(record.reason)
        self.record = record


class RoutedStream:
    """The chunks of one session; iterate once, and `cancel` if not to the end."""

    def __init__(
        self,
        request: GenerationRequest,
        keep_alive_s: float | None,
        first: Choice | None,
        ways: Ways,
        tools: Tools,
    ) -> None:
        """`first`: None if no node that has the model can be asked now; it waits for one."""
        self.request = request
        self.node = NodeId("") if first is None else first.node
        """Where it is now, or was last."""
        self._keep_alive_s = keep_alive_s
        self._ways = ways
        self._client = tools.client
        self._clock = tools.clock
        self._limits = tools.limits
        self._opened = self._placed = tools.clock.now()
        self._tokens: list[int] = []
        """All output so far, resumed tokens of the request not included."""
        self._cached: int | None = None
        self._unread: list[GenerationChunk] = []
        self._news = asyncio.Event()
        self._status: ModelStatus | None = None
        self._is_running = False
        self._error: SllmError | None = None
        self._is_ended = False
        self._excluded: set[NodeId] = set()
        self._refusals = 0
        self._waits_until: float | None = None
        self._task = asyncio.create_task(self._live(first), name=f"route {request.session}")

    # --- for its reader -----------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        unread, self._unread = self._unread, []
        return _joined(unread)

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if not self._is_ended:
            self._unread.clear()
            self._end(None)
            self._task.cancel()

    def stop(self, error: SllmError) -> None:
        """End the session; its reader gets `error`."""
        if not self._is_ended:
            self._end(error)
            self._task.cancel()

    def status(self) -> ModelStatus | None:
        """Return how the model stands where the session waits for it, else None."""
        return None if self._is_running or self._is_ended else self._status

    def session_status(self) -> SessionStatus:
        """Return what `status` shows of the session."""
        return SessionStatus(
            self.request.session, self.request.model,
            "running" if self._is_running else "waiting",
            len(self.request.prompt), len(self._tokens), self._clock.now() - self._opened,
        )  # fmt: skip

    # --- the session --------------------------------------------------------------------------

    async def _live(self, first: Choice | None) -> None:
        try:
            if first is None:
                reason = "the nodes that have it can't be reached"
                error = NoPlaceError(self.request.model, reason, self._limits.silence_s)
                first = await self._place_again(error)
            await self._run(first)
            end: SllmError | None = None
        except SllmError as found:
            end = found
        except Exception:
            log.exception("routed session failed", extra={"session": self.request.session})
            end = InternalError(self.request.session)
        if not self._is_ended:
            self._end(end)

    async def _run(self, choice: Choice) -> None:
        """Serve it somewhere, and elsewhere when that fails."""
        while True:
            self.node = choice.node
            self._placed = self._clock.now()
            outcome = "failed"
            try:
                await self._serve(choice)
                outcome = "ok"
            except _RefusedError as refusal:
                outcome = "refused"
                self._refused(choice, refusal.record)
                error: SllmError = NoPlaceError(self.request.model, refusal.record.reason, 1.0)
            except SllmError as found:
                error = found
                self._give_up_node(choice, error)
            except asyncio.CancelledError:
                outcome = "cancelled"
                raise
            else:
                return
            finally:
                self._ways.left(choice, self.request.model, outcome)
            choice = await self._place_again(error)

    async def _serve(self, choice: Choice) -> None:
        ask = self._ways.ask(choice, self.request)
        request = self._as_it_stands()
        if not ask.boot:  # here
            await self._serve_here(choice, request)
            return
        forward = Forward(request, ask, HOPS_MAX, choice.reason, self._keep_alive_s)
        async with self._client.stream(
            choice.node, GENERATE, pack(forward), self._limits.silence_s
        ) as frames:
            async for frame in frames:
                if self._take(choice, unpack_record(frame)):
                    return
        raise PeerUnreachableError(choice.node, "its answer ended in the middle")

    async def _serve_here(self, choice: Choice, request: GenerationRequest) -> None:
        stream = self._ways.open_local(request, self._keep_alive_s)
        try:
            await stream.started.wait()
            self._granted(choice)
            async for chunk in stream:
                self._give(chunk)
        finally:
            stream.cancel()

    def _as_it_stands(self) -> GenerationRequest:
        if not self._tokens:
            return self.request
        return replace(self.request, resumed=(*self.request.resumed, *self._tokens))

    def _take(self, choice: Choice, record: Record) -> bool:
        """Take a record; return whether it was the last."""
        match record:
            case Waiting(status):
                self._status = status or self._status
            case Granted():
                self._granted(choice)
            case Tokens(chunk):
                self._give(chunk)
                return chunk.finish is not None
            case Refusal():
                raise _RefusedError(record)
            case Failed():
                raise error_of(record)
        return False

    def _granted(self, choice: Choice) -> None:
        self._is_running = True
        self._ways.started(choice, self.request.model, self._clock.now() - self._placed)

    def _give(self, chunk: GenerationChunk) -> None:
        if self._cached is None:
            self._cached = chunk.cached_tokens
        self._refusals, self._waits_until = 0, None
        self._tokens += chunk.tokens
        # What a resumed part found cached is of its own making: a prompt counts as it was first met.
        self._unread.append(replace(chunk, cached_tokens=self._cached))
        if chunk.finish is not None:
            self._end(None)
        self._news.set()

    def _end(self, error: SllmError | None) -> None:
        self._error = error
        self._is_ended = True
        self._news.set()
        self._ways.ended(self)

    # --- when a node fails --------------------------------------------------------------------

    def _refused(self, choice: Choice, record: Refusal) -> None:
        self._refusals += 1
        log.info("placement refused", extra={
            "session": self.request.session, "node": choice.node, "reason": record.reason,
        })  # fmt: skip
        if self._refusals >= REFUSALS_MAX:
            self._excluded.add(choice.node)
        try:
            self._ways.learn(decode_state(record.document))
        except MessageError:
            self._excluded.add(choice.node)

    def _give_up_node(self, choice: Choice, error: SllmError) -> None:
        """Take note of who failed, or raise the error if nobody else can do better."""
        is_final = error.fault is Fault.CALLER and not isinstance(error, ModelNotFoundError)
        if is_final or isinstance(error, CancelledByOperatorError):
            raise error
        log.warning("session lost its node", extra={
            "session": self.request.session, "model": self.request.model, "node": choice.node,
            "tokens": len(self._tokens), "error": str(error),
        })  # fmt: skip
        self._is_running = False
        self._excluded.add(choice.node)
        if isinstance(error, UNREACHABLE):
            self._ways.lost(choice.node, error)

    async def _place_again(self, error: SllmError) -> Choice:
        """Return where it goes on; wait for a node if none is left and one may come back.

        Raises:
            SllmError: `error`, as no node can take it.
        """
        while (choice := self._ways.choose(self.request, frozenset(self._excluded))) is None:
            if not (self._tokens or isinstance(error, (*UNREACHABLE, NoPlaceError))):
                raise error
            now = self._clock.now()
            if self._waits_until is None:
                self._waits_until = now + self._limits.patience_s
            self._excluded.clear()
            left_s = self._waits_until - now
            if left_s <= 0 or not await self._ways.changed(left_s):
                raise error
        return choice


def _joined(chunks: list[GenerationChunk]) -> GenerationChunk:
    """Return one chunk that says what `chunks` say, one after another."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
    )
