"""One session as its reader sees it: waits for the grant, then passes on what the engine makes.

    waiting -> running -> ended
    waiting -> ended

The end comes once, from whoever is first: the last chunk, an error of the engine, the reader's
`cancel`, or the scheduler (refused, stopped). Everything here runs on the event loop.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final, NoReturn, Protocol, Self, TypeVar

from sllm_node.core.clock import Clock
from sllm_node.core.errors import EngineError, SllmError
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    NodeId,
    RequestId,
    SessionId,
    SessionStatus,
    Startup,
    TokenIds,
    Waited,
    Weights,
)
from sllm_node.schedule.actions import TicketId
from sllm_node.schedule.estimate import waited
from sllm_node.schedule.ports import Generation

_WITH_SUFFIX: Final = re.compile(r"(.+)-[0-9a-f]{8}")


class Outcome(Enum):
    """How a session ended; the label of the metric."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    """The reader went away."""
    MOVED = "moved"
    """Its entry lets another node go on with it."""
    REFUSED = "refused"
    """It never ran."""
    STOPPED = "stopped"
    """An operator or a drain ended it."""
    FAILED = "failed"


class Stream:
    """The chunks of one session; iterate once.

    A reader that stops early must call `cancel`. Between chunks the reader may be cancelled and come
    back as long as the session waits for its grant.
    """

    def __init__(
        self,
        ticket: TicketId,
        request: GenerationRequest,
        clock: Clock,
        status: Callable[[], ModelStatus | None],
        on_ended: Callable[["Stream", Outcome], None],
    ) -> None:
        self.ticket = ticket
        self.request = request
        self.entry: NodeId | None = None
        """The node of its client, if that is another one."""
        self.is_held = request.held
        """Another node runs the session, and this one is to go on with it."""
        self.opened = clock.now()
        self.granted: float | None = None
        self.waited: Waited | None = None
        """For what, until it was granted."""
        self.weights: Weights | None = None
        """What it is computed with, since it was granted."""
        self.is_early = False
        """It was computed before it was granted."""
        self.cached_tokens = 0
        """Of what was known of it, that needed no computing."""
        self.first_token: float | None = None
        self.migration = ""
        """The move that took it away."""
        self.tokens = 0
        """Output tokens passed on."""
        self.position = len(request.resumed)
        """Output tokens of the session that its reader knows, those made elsewhere included."""
        self.error: SllmError | None = None
        self.started = asyncio.Event()
        """Set when the wait is over: the session was granted, or it has ended."""
        self._clock = clock
        self._status = status
        self._on_ended = on_ended
        self._generation: Generation | None = None
        self._is_ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._generation is None and not self._is_ended:
            await self.started.wait()
        if self._is_ended or self._generation is None:
            self._raise_end()
        try:
            chunk = await self._generation.__anext__()
        except (StopAsyncIteration, SllmError) as error:
            if not self._is_ended:
                self.error = error if isinstance(error, SllmError) else self._broken()
                self._end(Outcome.FAILED)
            self._raise_end()
        if self._is_ended:
            self._raise_end()
        self._count(chunk)
        return chunk

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if not self._is_ended:
            self._end(Outcome.CANCELLED)

    def leave(self, migration: str) -> None:
        """End the session here, as another node goes on with it; nothing if it has ended."""
        if not self._is_ended:
            self.migration = migration
            self._end(Outcome.MOVED)

    def status(self) -> ModelStatus | None:
        """Return how the model stands while the session waits for it, else None."""
        return None if self.started.is_set() else self._status()

    def startup(self) -> Startup:
        """Return how it came to run, as far as that is known."""
        return Startup(startup_s=None if self.granted is None else self.granted - self.opened)

    def passed_on(self) -> None:
        """Take note that its client has what it gave so far: nothing to do."""

    def session_status(self) -> SessionStatus:
        """Return what `status` shows of the session."""
        request = self.request
        return SessionStatus(
            request.session,
            request.model,
            "waiting" if self._generation is None else "running",
            len(request.prompt),
            self.tokens,
            self._clock.now() - self.opened,
            entry=self.entry,
        )

    # --- while it holds -----------------------------------------------------------------------

    async def standing(self, told: int) -> int | None:
        """Wait until more output tokens than `told` are computed while it holds; None: it does not."""
        return None if self._generation is None else await self._generation.standing(told)

    def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Add output tokens of another node to a session that holds; `lets_go`: go on behind them."""
        if self._generation is not None and not self._is_ended:
            self._generation.extend(position, tokens, lets_go=lets_go)
            self.is_held = self.is_held and not lets_go
            self.position = max(self.position, position + len(tokens))

    # --- for the driver -----------------------------------------------------------------------

    @property
    def is_granted(self) -> bool:
        """Whether the session runs or ran."""
        return self.granted is not None

    def grant(
        self, generation: Generation, *, is_early: bool = False,
        load: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Let the session run; `load`: when that of its model began and ended."""
        assert not self._is_ended
        self.is_early = is_early
        self._generation = generation
        self.granted = self._clock.now()
        self.waited = waited(self.opened, self.granted, load)
        self.started.set()

    def fail(self, error: SllmError, outcome: Outcome) -> None:
        """End the session; the reader gets `error`."""
        assert not self._is_ended
        self.error = error
        self._end(outcome)

    # --- the end ------------------------------------------------------------------------------

    def _count(self, chunk: GenerationChunk) -> None:
        self.tokens += len(chunk.tokens)
        self.position += len(chunk.tokens)
        if chunk.tokens and self.first_token is None:
            self.first_token = self._clock.now()
            self.cached_tokens = chunk.cached_tokens
        if chunk.finish is not None:
            self._end(Outcome(chunk.finish))

    def _end(self, outcome: Outcome) -> None:
        self._is_ended = True
        self.started.set()
        if self._generation is not None and outcome not in (Outcome.STOP, Outcome.LENGTH):
            self._generation.cancel()
        self._on_ended(self, outcome)

    def _broken(self) -> SllmError:
        return EngineError(self.request.model, "the session ended without a last chunk")

    def _raise_end(self) -> NoReturn:
        if self.error is not None:
            raise self.error
        raise StopAsyncIteration


def request_of(session: SessionId) -> RequestId:
    """Return the request that a session belongs to: its id is "<request>-<choice>"."""
    return RequestId(session.rpartition("-")[0])


def client_id_of(request: RequestId) -> str | None:
    """Return the id that the client gave a request, which has a suffix of ours; None: it gave none."""
    found = _WITH_SUFFIX.fullmatch(request)
    return found[1] if found else None


class _Asked(Protocol):
    @property
    def request(self) -> GenerationRequest: ...


AskedT = TypeVar("AskedT", bound=_Asked)


def sessions_of(sessions: Iterable[AskedT], request: str) -> list[AskedT]:
    """Return those of a request by its id; if it has none, all of requests that clients gave this id."""
    known = [(one, request_of(one.request.session)) for one in sessions]
    return [one for one, own in known if own == request] or [
        one for one, own in known if client_id_of(own) == request
    ]
