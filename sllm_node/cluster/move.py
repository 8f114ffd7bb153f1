"""One move of a running session to another node, driven by the node that has its reader.

The destination loads the model and computes what is known, while the source goes on; each round brings
it the tokens that came meanwhile, until it lacks so few that the reader would not notice (`pace`). Then,
in one turn of the event loop, nothing more is taken from the source, and the destination is let go
behind the last token that was. What fails before leaves the source alone, and so does a destination with
other weights than gave the tokens: of a session that waits, nobody knows when it is asked. A source that
fails before is handed over from as soon as the destination is there, unless another node would be sooner
(`Retries.outlast`). What follows from what, `arbiter` says; here it is sent and waited for.
"""

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Final, Protocol

from sllm_node.cluster.arbiter import Arbiter, Extend
from sllm_node.cluster.pace import Pace
from sllm_node.cluster.part import Part
from sllm_node.cluster.wire import Granted, Record, Standing, Waiting
from sllm_node.core.clock import Clock
from sllm_node.core.errors import OtherWeightsError, PeerUnreachableError
from sllm_node.core.types import GenerationRequest, NodeId, SessionId, TokenIds, Weights

log = logging.getLogger(__name__)

MOVE_S: Final = 300.0
"""A move may take so long, the load of the model included."""


@dataclass(slots=True)
class MoveReport:
    """What a move did, for log and metrics."""

    id: str
    session: SessionId
    origin: NodeId
    to: NodeId
    reason: str
    prompt_tokens: int = 0
    outcome: str = "moving"
    """Or `moved`; `failed`: the session stays where it was; `ended`: it did meanwhile."""
    rounds: int = 0
    tokens: int = 0
    """That were sent, those known at its begin included."""
    last: int = 0
    """Of these: in the last round."""
    bytes_sent: int = 0
    gap_s: float | None = None
    """Between the last token of the source and the first of the destination."""
    error: str = ""
    vacate: str = ""
    """With the reason `placement`: which model's start it is for, by the session that waits."""

    def fields(self) -> dict[str, object]:
        """Return what the log says."""
        return {
            "migration": self.id, "session": self.session, "node": self.origin, "to": self.to,
            "reason": self.reason, "rounds": self.rounds, "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "last_round": self.last, "bytes": self.bytes_sent,
            **({"vacate": self.vacate} if self.vacate else {}),
        }  # fmt: skip


class Moving(Protocol):
    """What a move asks of its session."""

    pace: Pace
    arbiter: Arbiter

    def tokens_from(self, position: int) -> TokenIds:
        """Return its output tokens from `position` on."""

    def take(self, part: Part, record: Record) -> bool:
        """Take a record of any of its parts."""

    def go_on(self, move: "Move") -> Extend:
        """Decide what follows when the destination has all that it was sent; return what it is sent now.

        Raises:
            OtherWeightsError: the session has tokens, of other weights than the destination's.
        """

    def settled(self, move: "Move") -> None:
        """Take note that a move has come to an end, either way."""


class Move:
    """Runs from its making."""

    def __init__(self, session: Moving, part: Part, report: MoveReport, clock: Clock) -> None:
        self.part = part
        self.report = report
        self._session = session
        self._clock = clock
        self.weights: Weights | None = None
        """What the destination computes with; None: it has not told."""
        self._bytes = 0
        self._asked_at = self._nearer_at = clock.now()
        self._is_granted = False
        self._news = asyncio.Event()
        log.info("session moves", extra=report.fields())
        report.tokens = session.arbiter.position
        part.start(session.take)
        part.ended.add_done_callback(lambda _: self._news.set())
        self.task = asyncio.create_task(self._run(), name=f"move {report.id}")

    def take(self, record: Record) -> None:
        """Take the word of the destination: how far its load is, that it computes, or how far it is."""
        if isinstance(record, Granted):
            self._is_granted, self._nearer_at = True, self._clock.now()
            self.weights = record.weights
        elif isinstance(record, Standing):
            if self._session.arbiter.stands(self.part.epoch, record.position):
                self._nearer_at = self._clock.now()
                self._news.set()
        elif isinstance(record, Waiting) and (done := _loaded(record)) > self._bytes:
            self._bytes, self._nearer_at = done, self._clock.now()

    def check_weights(self, request: GenerationRequest) -> None:
        """Raise if the tokens that `request` has are of other weights than the destination's."""
        if self.weights and request.weights and not request.weights.is_same(self.weights):
            raise OtherWeightsError(request.session, request.model)

    def stands_s(self) -> float:
        """Return for how long nothing has come of it: no byte of a load, no grant, no token."""
        return self._clock.now() - self._nearer_at

    def needs_s(self, patience_s: float) -> float:
        """Return how long the destination is expected to take still.

        One that is later than was estimated takes as long again. One that computes is soon there, unless
        nothing came of it for `patience_s`.
        """
        if self._is_granted:
            return 0.0 if self.stands_s() < patience_s else math.inf
        expected_s = self.part.choice.startup_s
        if expected_s is None:
            return math.inf
        return abs(expected_s - (self._clock.now() - self._asked_at))

    def stop(self, outcome: str, why: str = "") -> None:
        """Give it up, since the session has ended or goes elsewhere; does nothing after the handover."""
        if self.report.outcome == "moving":
            self.task.cancel()
            self._settle(outcome, why)

    def _settle(self, outcome: str, why: str) -> None:
        self.report.outcome, self.report.error = outcome, why
        self._session.settled(self)

    async def _run(self) -> None:
        report = self.report
        try:
            async with asyncio.timeout(MOVE_S):
                last = await self._approach()
        except Exception as error:  # noqa: BLE001 - whatever it is, the session goes on where it was
            if report.outcome == "moving":
                self._settle("failed", str(error) or type(error).__name__)
            return
        rest = self._session.tokens_from(last.start)
        report.last = len(rest)
        try:
            await self._send(last, rest)
        except Exception as error:  # noqa: BLE001 - whatever it is, the destination may not be let go
            lost = PeerUnreachableError(report.to, str(error) or type(error).__name__)
            self.part.end(lost)  # the owner, by now: the session is placed again
        self._session.settled(self)

    async def _approach(self) -> Extend:
        """Let the destination come near; return what lets it go, as the owner that it is then."""
        session, report, now = self._session, self.report, self._clock.now
        count, began = report.tokens, now()
        while True:
            await self._reached()
            session.pace.resumed(count, now() - began)
            extend = session.go_on(self)
            if extend.lets_go:
                return extend
            report.rounds += 1
            fresh, began = session.tokens_from(extend.start), now()
            count = len(fresh)
            await self._send(extend, fresh)

    async def _reached(self) -> None:
        """Wait until the destination has computed what it was sent; raise if it failed."""
        while not self.part.ended.done():
            if self._session.arbiter.is_reached:
                return
            self._news.clear()
            await self._news.wait()
        end = self.part.ended.result()
        if isinstance(end, Exception):
            raise end
        raise PeerUnreachableError(self.report.to, "it ended a session that it was to hold")

    async def _send(self, extend: Extend, tokens: TokenIds) -> None:
        self.report.tokens += len(tokens)
        try:
            await self.part.source.extend(extend.start, tokens, lets_go=extend.lets_go)
        finally:
            self.report.bytes_sent = self.part.source.bytes_sent


def _loaded(waiting: Waiting) -> int:
    """Return how many bytes of a load have come."""
    progress = waiting.status.progress if waiting.status else None
    return progress.bytes_done if progress else 0
