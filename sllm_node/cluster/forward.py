"""One session that may change its node, as its reader sees it: a stream that outlives nodes.

    placed -> waiting -> running -> ended, and back to placed when its node fails or refuses

This node holds all that the session is: prompt, sampling, and the tokens so far. When its node dies,
drains or refuses, it is placed again and goes on behind those tokens (`GenerationRequest.resumed`): the
reader sees a pause. Text is made where a token is drawn and comes with it, and whoever resumes feeds the
known tokens to a new detokenizer, which shows what the old one had not shown: nothing twice, nothing
lost. One task drives a session; what its reader has not taken is joined.
"""

import asyncio
import logging
from dataclasses import replace
from functools import partial
from typing import Self

from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.cluster.course import Course
from sllm_node.cluster.move import Move, MoveReport
from sllm_node.cluster.pace import Pace
from sllm_node.cluster.part import LocalSource, Part, PeerSource
from sllm_node.cluster.retries import ABSENT, RefusedError, Retries
from sllm_node.cluster.state import ResumeFit
from sllm_node.cluster.ways import Begun, Lost, Tools, Ways
from sllm_node.cluster.wire import (
    HOPS_MAX,
    Failed,
    Forward,
    Granted,
    Leave,
    Record,
    Refusal,
    Standing,
    Tokens,
    Waiting,
    error_of,
)
from sllm_node.core.errors import (
    GivenBackError,
    InternalError,
    MessageFormatError,
    MoveRefusedError,
    NoPlaceError,
    SllmError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    NodeId,
    SessionStatus,
    Startup,
    TokenIds,
    Waited,
)

log = logging.getLogger(__name__)


class RoutedStream:
    """The chunks of one session; iterate once, and `cancel` if not to the end."""

    def __init__(
        self,
        request: GenerationRequest,
        keep_alive_s: float | None,
        first: Choice | None,
        ways: Ways,
        tools: Tools,
        before: Begun | Lost | None = None,
    ) -> None:
        """`first`: None if no node that has the model can be asked now; it waits for one.

        `before`: it runs here already, and has given these tokens; or who has failed it.
        """
        self.request = request
        self.node = NodeId("") if first is None else first.node
        """Where it is now, or was last."""
        self._keep_alive_s = keep_alive_s
        self._ways = ways
        self._client, self._clock, self._limits = tools.client, tools.clock, tools.limits
        self._retries = Retries(request, ways, tools)
        self._placed = tools.clock.now()
        self._tokens: list[int] = []
        """All output so far, resumed tokens of the request not included."""
        self._cached: int | None = None
        self._epoch = 0
        """Of who owns it now: of anybody else no token is taken."""
        self._part: Part | None = None
        self._move: Move | None = None
        self._moved: MoveReport | None = None
        """A move whose destination has given no token yet."""
        self._last_at: float | None = None
        """When its last token came."""
        self._held_since: float | None = None
        """When the first token came that its client does not have."""
        self._course = Course(startup_of(first, None), self._placed - request.waited_s)
        self.pace = Pace()
        self.is_orphaned = False
        """Its node failed while it moves: it only waits for the destination."""
        self._unread: list[GenerationChunk] = []
        self._news = asyncio.Event()
        self._status: ModelStatus | None = None
        self._is_running = False
        self._error: SllmError | None = None
        self._is_ended = False
        if isinstance(before, Begun) and first is not None:
            self._tokens += before.tokens
            self._cached, self._epoch = before.cached, 1
            self._is_running = before.stream.is_granted
            self._course = before.course()
            self._part = Part(first, 1, LocalSource(stream=before.stream))
            self._last_at = self._clock.now() if before.tokens else None
        self._task = asyncio.create_task(
            self._live(first, before if isinstance(before, Lost) else None),
            name=f"route {request.session}",
        )

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
            self._let_go()

    def stop(self, error: SllmError) -> None:
        """End the session; its reader gets `error`."""
        if not self._is_ended:
            self._end(error)
            self._let_go()

    def _let_go(self) -> None:
        self._task.cancel()
        if self._part is not None:
            self._part.close()

    def status(self) -> ModelStatus | None:
        """Return how the model stands where the session waits for it, else None."""
        if self._is_running or self._is_ended:
            return None
        if self._status is None:  # no node has told
            self._status = self._ways.standing(self.request.model)
        return self._status

    def startup(self) -> Startup:
        """Return how it came to run, as far as that is known."""
        return self._course.startup()

    def passed_on(self) -> None:
        """Take note that its client has what it gave so far."""
        if self._held_since is not None:
            self._ways.passed_on(self.node, self._clock.now() - self._held_since)
            self._held_since = self._last_at if self._unread else None

    def session_status(self) -> SessionStatus:
        """Return what `status` shows of the session."""
        return SessionStatus(
            self.request.session, self.request.model,
            "running" if self._is_running else "waiting",
            len(self.request.prompt), len(self._tokens), self._clock.now() - self._course.arrived,
            self.node or None, self.migration,
        )  # fmt: skip

    # --- the session --------------------------------------------------------------------------

    async def _live(self, first: Choice | None, lost: Lost | None) -> None:
        try:
            part = self._part
            if part is None and first is None:
                first = await self._found(lost)
            if part is None:
                assert first is not None
                part = self._begin(first)
            part.start(self.take)
            await self._run(part)
            end: SllmError | None = None
        except SllmError as found:
            end = found
        except Exception:
            log.exception("routed session failed", extra={"session": self.request.session})
            end = InternalError(self.request.session)
        if not self._is_ended:
            self._end(end)

    async def _found(self, lost: Lost | None) -> Choice:
        """Return the first node that it is placed at."""
        error: SllmError = NoPlaceError(self.request.model, ABSENT, self._limits.silence_s)
        if lost is not None:
            error = lost.error
            self._retries.failed(lost.choice, error, len(self._tokens))
        return await self._retries.place_again(error, has_tokens=bool(self._tokens))

    async def _run(self, part: Part) -> None:
        """Have it served somewhere, and elsewhere when that fails or it moves."""
        while True:
            self._part, self.node = part, part.choice.node
            try:
                end = await part.ended
            except asyncio.CancelledError:
                self._ways.left(part.choice, self.request.model, "cancelled")
                raise
            finally:
                part.close()
            following = await self._after(part, end)
            if following is None:
                return
            part = following

    async def _after(self, part: Part, end: Exception | Part | None) -> Part | None:
        """Return what follows a part that ended so; None: the session is over."""
        outcome = "failed"
        try:
            if end is None:
                outcome = "ok"
                return None
            if self._part is not part:
                outcome = "moved"
                return self._part
            assert isinstance(end, Exception)
            error: SllmError
            if isinstance(end, RefusedError):
                outcome = "refused"
                error = self._retries.refused(part.choice, end.record)
            elif isinstance(end, GivenBackError):
                outcome = "refused"
                error = self._retries.given_back(part.choice, end)
            elif isinstance(end, SllmError):
                error = end
                self._lost(part, error)
            else:
                raise end
        finally:
            self._ways.left(part.choice, self.request.model, outcome)
        choice: Choice | None = None
        if self._move is not None:  # the destination may be ready soon
            self.is_orphaned = True
            choice = await self._retries.outlast(self._move)
            self.is_orphaned = False
        if self._part is not part and self._part is not None:
            return self._part
        if choice is None:
            choice = await self._retries.place_again(error, has_tokens=bool(self._tokens))
        self._retries.goes_on(part.choice, choice, len(self._tokens))
        following = self._begin(choice)
        following.start(self.take)
        return following

    def _lost(self, part: Part, error: SllmError) -> None:
        """Take note that its node failed, or raise the error if nobody else can do better."""
        self._retries.failed(part.choice, error, len(self._tokens))
        if self._is_running:
            self._course.left(part.choice.node, error.code, self._clock.now())
        self._is_running, self._status = False, None

    def _begin(self, choice: Choice) -> Part:
        """Make the part that a node is to take next, not started."""
        self._placed = self._clock.now()
        self._epoch += 1
        return self._make(choice, self._epoch, "", is_held=False)

    def _make(self, choice: Choice, epoch: int, migration: str, *, is_held: bool) -> Part:
        ask = self._ways.ask(choice, self.request)
        waited_s = self._course.waited_s(self._clock.now())
        request = replace(self._as_it_stands(), held=is_held, waited_s=waited_s)
        if not ask.boot:  # here
            opening = partial(self._ways.open_local, request, self._keep_alive_s, choice)
            known = partial(self._ways.ensure, request.model)
            return Part(choice, epoch, LocalSource(opening, known=known))
        why, keep_alive_s = choice.reason, self._keep_alive_s
        forward = Forward(request, ask, HOPS_MAX, why, keep_alive_s, epoch, migration)
        source = PeerSource(self._client, choice, forward, self._limits.silence_s)
        return Part(choice, epoch, source)

    def _as_it_stands(self) -> GenerationRequest:
        if not self._tokens:
            return self.request
        return replace(self.request, resumed=(*self.request.resumed, *self._tokens))

    def take(self, part: Part, record: Record) -> bool:
        """Take a record of a node that serves it, or is to; return whether it was the last."""
        if isinstance(record, Refusal):
            raise RefusedError(record)
        if isinstance(record, Failed):
            raise error_of(record)
        if part is not self._part:
            if self._move is not None and self._move.part is part:
                self._move.take(record)
            return False  # an owner that was, or is not yet: its tokens are nobody's
        match record:
            case Waiting(status):
                self._status = status or self._status
            case Granted(waited):
                self._granted(part.choice, waited)
            case Tokens(chunk, position):
                if position != self.position:
                    what = f"tokens at {position} of a session that is at {self.position}"
                    raise MessageFormatError(what)
                self._give(chunk)
                return chunk.finish is not None
            case Leave() | Standing():
                self._asked(part, record)
        return False

    def _asked(self, part: Part, record: Leave | Standing) -> None:
        if isinstance(record, Leave):  # how far the owner is, its tokens tell
            self._ways.leave(self.request.session, part.choice.node, record)

    def _granted(self, choice: Choice, waited: Waited | None) -> None:
        self._is_running = True
        now = self._clock.now()
        self._course.granted(choice, now)
        self._ways.started(choice, self.request.model, now - self._placed, waited)

    def _give(self, chunk: GenerationChunk) -> None:
        now = self._clock.now()
        if self._cached is None:
            self._cached = chunk.cached_tokens
        self._retries.forget()
        self._tokens += chunk.tokens
        self._course.took(len(chunk.tokens))
        if self._moved is not None:
            self._tell_move(None if self._last_at is None else now - self._last_at)
        elif self._last_at is not None:
            self.pace.came(len(chunk.tokens), now - self._last_at)
        self._last_at = now
        self._held_since = now if self._held_since is None else self._held_since
        # What a resumed part found cached is of its own making: a prompt counts as it was first met.
        self._unread.append(replace(chunk, cached_tokens=self._cached))
        if chunk.finish is not None:
            self._end(None)
        self._news.set()

    # --- moves --------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Output tokens so far, resumed tokens of the request included."""
        return len(self.request.resumed) + len(self._tokens)

    @property
    def migration(self) -> str | None:
        """The id of the move that is under way."""
        return None if self._move is None else self._move.report.id

    def tokens_from(self, position: int) -> TokenIds:
        """Return the output tokens from `position` on."""
        return self._as_it_stands().resumed[position:]

    @property
    def _has_node(self) -> bool:
        """Whether a node generates it: not while it is placed anew, which takes the next epoch."""
        return not self._is_ended and self._part is not None and not self._part.ended.done()

    @property
    def can_move(self) -> bool:
        """Whether it has a node, and no move is under way."""
        return self._has_node and self._move is None and self._moved is None

    def move(
        self, choice: Choice, reason: str, fit: ResumeFit | None = None, vacate: str = ""
    ) -> MoveReport:
        """Begin to move it; return what will be known of the move.

        Raises:
            MoveRefusedError: it is moving already, or has ended.
            SllmError: it is to move here, and is refused.
        """
        session = self.request.session
        if not self._has_node:
            raise MoveRefusedError(session, "it has ended or waits for a node")
        if self._move is not None or self._moved is not None:
            raise MoveRefusedError(session, "it is moving already")
        number = f"{session}.{self._epoch + 1}"
        prompt = len(self.request.prompt)
        report = MoveReport(number, session, self.node, choice.node, reason, prompt, vacate=vacate)
        self.pace.aim(fit, is_replayed=self.request.resume == "replay")
        part = self._make(choice, self._epoch + 1, number, is_held=True)
        self._move = Move(self, part, report, self._clock)
        return report

    def hand_over(self, part: Part) -> bool:
        """Take nothing more from the owner, and the rest from `part`; False: it has ended."""
        old = self._part
        if self._is_ended or old is None:
            return False
        self._epoch = part.epoch
        if self._is_running:
            self._course.left(old.choice.node, "moved", self._clock.now())
        self._course.goes_on(part.choice)
        self._part, self.node = part, part.choice.node
        old.end(part)
        if self._move is not None:
            old.source.leaves(self._move.report.id)
        old.close()
        self._is_running = True
        if self._move is not None:
            self._moved = self._move.report
        return True

    def settled(self, move: Move) -> None:
        """Take note that a move has come to an end, either way."""
        self._move = None
        if move.report.outcome != "moved":
            self._ways.moved(move.report)

    def _tell_move(self, gap_s: float | None) -> None:
        if self._moved is not None:
            report, self._moved = self._moved, None
            report.gap_s = gap_s
            report.bytes_sent = self._part.source.bytes_sent if self._part else 0
            self._ways.moved(report)

    def _end(self, error: SllmError | None) -> None:
        self._error = error
        self._is_ended = True
        if self._move is not None:
            self._move.stop("ended")
        self._tell_move(None)
        self._news.set()
        self._ways.ended(self)


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
