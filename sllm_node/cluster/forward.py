"""One session that may change its node, as its reader sees it: a stream that outlives nodes.

This node holds all that the session is: prompt, sampling, and the tokens so far. When its node dies,
drains or refuses, it is placed again and goes on behind those tokens (`GenerationRequest.resumed`): the
reader sees a pause. Text is made where a token is drawn and comes with it, and whoever resumes feeds the
known tokens to a new detokenizer, which shows what the old one had not shown: nothing twice, nothing
lost. One task drives a session; what its reader has not taken is joined. What counts, and what follows
when a node fails or the session moves, `arbiter` decides; here it is carried out.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Self

from sllm_node.cluster.arbiter import Accept, Action, Arbiter, Extend, Open
from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.cluster.course import Course
from sllm_node.cluster.move import Move, MoveReport
from sllm_node.cluster.output import Output
from sllm_node.cluster.pace import Pace
from sllm_node.cluster.part import Part, RefusedError
from sllm_node.cluster.parts import Parts
from sllm_node.cluster.retries import Retries
from sllm_node.cluster.state import ResumeFit
from sllm_node.cluster.ways import Begun, Lost, Tools, Ways
from sllm_node.cluster.wire import (
    Failed,
    Granted,
    Leave,
    Record,
    Refusal,
    Standing,
    Tokens,
    Waiting,
)
from sllm_node.core.errors import (
    GivenBackError,
    InternalError,
    MoveRefusedError,
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
    Weights,
)
from sllm_node.engine.unread import Unread

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
        """`first`: None if no node that has the model can be asked now, or one is to be found; it waits for one.

        `before`: it runs here already, and has given these tokens; or who has failed it, after those.
        """
        self.request = request
        self.node = NodeId("") if first is None else first.node
        """Where it is now, or was last."""
        self._ways, self._clock = ways, tools.clock
        self._parts = Parts(ways, tools, keep_alive_s)
        self._retries = Retries(request, self.as_it_stands, ways, tools)
        self._placed = tools.clock.now()
        self._output = Output()
        self._part: Part | None = None
        """The owner's, or of who was it last."""
        self._move: Move | None = None
        self._moved: MoveReport | None = None
        """A move whose destination has given no token yet."""
        self._course = Course(startup_of(first, None), self._placed - request.waited_s)
        self.pace = Pace()
        self._unread = Unread()
        self._status: ModelStatus | None = None
        lost = before if isinstance(before, Lost) else None
        begun = before.begun if isinstance(before, Lost) else before
        if begun is not None:
            self._output.begin_with(begun.tokens, begun.cached, self._placed)
            self._course = begun.course(lost, self._placed)
        self._is_running = isinstance(before, Begun) and before.stream.is_granted
        self.arbiter = Arbiter(len(request.resumed) + len(self._output.tokens))
        if isinstance(before, Begun) and first is not None:
            self._part = self._parts.begun(before.stream, first, self.arbiter.placed())
        self._task = asyncio.create_task(self._live(first, lost), name=f"route {request.session}")

    # --- for its reader -----------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        return await anext(self._unread)

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if not self._unread.is_ended:
            self._unread.clear()
            self._end(None)
            self._task.cancel()

    def stop(self, error: SllmError) -> None:
        """End the session; its reader gets `error`."""
        if not self._unread.is_ended:
            self._end(error)
            self._task.cancel()

    def status(self) -> ModelStatus | None:
        """Return how the model stands where the session waits for it, else None."""
        if self._is_running or self._unread.is_ended:
            return None
        if self._status is None:  # no node has told
            self._status = self._ways.standing(self.request.model)
        return self._status

    def startup(self) -> Startup:
        """Return how it came to run, as far as that is known."""
        return self._course.startup()

    def passed_on(self) -> None:
        """Take note that its client has what it gave so far."""
        held_s = self._output.passed_on(self._clock.now(), is_all=not self._unread)
        if held_s is not None:
            self._ways.passed_on(self.node, held_s)

    def session_status(self) -> SessionStatus:
        """Return what `status` shows of the session."""
        return SessionStatus(
            self.request.session, self.request.model,
            "running" if self._is_running else "waiting",
            len(self.request.prompt), len(self._output.tokens), self._clock.now() - self._course.arrived,
            self.node or None, self.migration,
        )  # fmt: skip

    # --- the session --------------------------------------------------------------------------

    async def _live(self, first: Choice | None, lost: Lost | None) -> None:
        try:
            part = self._part
            if part is None and first is None:
                first = await self._retries.place(lost, len(self._output.tokens))
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
        if not self._unread.is_ended:
            self._end(end)

    async def _run(self, part: Part) -> None:
        """Have it served somewhere, and elsewhere when that fails or it moves."""
        while True:
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
            if end is None or self.arbiter.is_over:
                outcome = "ok"
                return None
            if self.arbiter.owner != part.epoch:
                outcome = "moved"
                return self._part
            assert isinstance(end, Exception)
            if isinstance(end, (RefusedError, GivenBackError)):
                outcome = "refused"
                error: SllmError = self._retries.refused(part.choice, end)
            elif isinstance(end, SllmError):
                error = end
                self._lost(part, error)
            else:
                raise end
        finally:
            self._ways.left(part.choice, self.request.model, outcome)
        self._parts.carry_out(self.arbiter.lost(part.epoch))
        # The destination of a move may be ready soon.
        choice = await self._retries.outlast(self._move) if self._move else None
        if self.arbiter.has_owner:
            return self._part
        if choice is None:
            choice = await self._retries.place_again(error, has_tokens=bool(self._output.tokens))
        self._retries.goes_on(part.choice, choice, len(self._output.tokens))
        following = self._begin(choice)
        following.start(self.take)
        return following

    def _lost(self, part: Part, error: SllmError) -> None:
        """Take note that its node failed, or raise the error if nobody else can do better."""
        self._retries.failed(part.choice, error, len(self._output.tokens))
        if self._is_running:
            self._course.left(part.choice.node, error.code, self._clock.now())
        self._is_running, self._status = False, None

    def _begin(self, choice: Choice) -> Part:
        """Make the part that a node is to take next, not started."""
        self._placed = self._clock.now()
        part = self._part = self._make(choice, self.arbiter.placed())
        self.node = choice.node
        return part

    def _make(self, choice: Choice, asked: Open, migration: str = "") -> Part:
        waited_s = self._course.waited_s(self._clock.now())
        request = replace(self.as_it_stands(), held=asked.is_held, waited_s=waited_s)
        return self._parts.make(request, choice, asked, migration)

    def take(self, part: Part, record: Record) -> bool:
        """Take a record of a node that serves it, or is to; return whether it was the last."""
        if isinstance(record, Tokens):
            return self._offer(part, record.chunk, record.position)
        if part.epoch != self.arbiter.owner:
            if self._move is not None and self._move.part is part:
                self._move.take(record)
            return False
        match record:
            case Waiting(status):
                self._status = status or self._status
            case Granted():
                self._granted(part.choice, record)
            case Leave():
                self._ways.leave(self.request.session, part.choice.node, record)
            case Standing() | Refusal() | Failed():
                pass  # how far the owner is, its tokens tell; with the others its part ends
        return False

    def _offer(self, part: Part, chunk: GenerationChunk, start: int) -> bool:
        """Give the reader what a node has given, if it counts; return whether it was the last."""
        is_last = chunk.finish is not None
        actions = self.arbiter.take(part.epoch, start, len(chunk.tokens), is_last=is_last)
        if Accept() not in actions:
            return False
        self._give(chunk)
        self._parts.carry_out(actions)
        if is_last:
            self._end(None)
        return is_last

    def _granted(self, choice: Choice, granted: Granted) -> None:
        self._is_running = True
        self._computed_with(granted.weights or self.request.weights)  # an older release tells none
        now = self._clock.now()
        self._course.granted(choice, now)
        self._ways.started(choice, self.request.model, now - self._placed, granted.waited)

    def _computed_with(self, weights: Weights | None) -> None:
        self.request = replace(self.request, weights=weights)

    def _give(self, chunk: GenerationChunk) -> None:
        now = self._clock.now()
        gap_s = self._output.gap_s(now)
        self._retries.forget()
        self._course.took(len(chunk.tokens))
        if self._moved is not None:
            self._tell_move(gap_s)
        elif gap_s is not None:
            self.pace.came(len(chunk.tokens), gap_s)
        self._unread.add(self._output.take(chunk, now))

    # --- moves --------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Output tokens so far, resumed tokens of the request included."""
        return self.arbiter.position

    @property
    def migration(self) -> str | None:
        """The id of the move that is under way."""
        return None if self._move is None else self._move.report.id

    def as_it_stands(self) -> GenerationRequest:
        """Return its request with the tokens so far; without any, whatever weights may serve it."""
        if not self._output.tokens:
            return replace(self.request, weights=None)
        return replace(self.request, resumed=(*self.request.resumed, *self._output.tokens))

    def tokens_from(self, position: int) -> TokenIds:
        """Return the output tokens from `position` on."""
        return self.as_it_stands().resumed[position:]

    @property
    def _has_node(self) -> bool:
        """Whether a node generates it: not while it is placed anew."""
        return self.arbiter.has_owner and self._part is not None and not self._part.ended.done()

    @property
    def can_move(self) -> bool:
        """Whether it has a node, and no move is under way, or not told yet."""
        is_moving = self._move is not None or self._moved is not None
        return self._has_node and self.arbiter.can_move and not is_moving

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
        if not self.can_move:
            raise MoveRefusedError(session, "it is moving already")
        asked = self.arbiter.move()
        number = f"{session}.{asked.epoch}"
        prompt = len(self.request.prompt)
        report = MoveReport(number, session, self.node, choice.node, reason, prompt, vacate=vacate)
        self.pace.aim(fit, is_replayed=self.request.resume == "replay")
        try:
            part = self._make(choice, asked, number)
        except SllmError:
            self._parts.carry_out(self.arbiter.lost(asked.epoch))
            raise
        self._move = Move(self, part, report, self._clock)
        return report

    def go_on(self, move: Move) -> Extend:
        """Decide what follows when the destination has all that it was sent; return what it is sent now."""
        if self._output.tokens:
            move.check_weights(self.request)
        *closes, extend = self.arbiter.go_on(is_near=self.pace.is_last(self.arbiter.lacking))
        assert isinstance(extend, Extend)
        if extend.lets_go:
            self._hand_over(move, tuple(closes))
        return extend

    def _hand_over(self, move: Move, closes: tuple[Action, ...]) -> None:
        """Take nothing more from the owner, and the rest from the destination."""
        old, part = self._part, move.part
        assert old is not None
        if self._is_running:
            self._course.left(old.choice.node, "moved", self._clock.now())
        self._course.goes_on(part.choice)
        old.end(part)
        self._parts.carry_out(closes, move.report.id)
        self._part, self.node = part, part.choice.node
        self._is_running = True
        self._computed_with((self.request.weights if self._output.tokens else None) or move.weights)
        move.report.outcome, self._moved = "moved", move.report

    def settled(self, move: Move) -> None:
        """Take note that a move has come to an end, either way."""
        self._move = None
        if move.report.outcome != "moved":
            self._parts.carry_out(self.arbiter.lost(move.part.epoch))
            self._ways.moved(move.report)

    def _tell_move(self, gap_s: float | None) -> None:
        if self._moved is not None:
            report, self._moved = self._moved, None
            report.gap_s = gap_s
            report.bytes_sent = self._part.source.bytes_sent if self._part else 0
            self._ways.moved(report)

    def _end(self, error: SllmError | None) -> None:
        self._unread.end(error)
        if not self.arbiter.is_over:
            self._parts.carry_out(self.arbiter.stop())
        if self._move is not None:
            self._move.stop("ended")
        self._tell_move(None)
        self._ways.ended(self)
