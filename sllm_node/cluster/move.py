"""One move of a running session to another node, driven by the node that has its reader.

    approaching -> handed over | failed

The destination loads the model and computes what is known, while the source goes on; each round brings
it the tokens that came meanwhile, until it lacks so few that the reader would not notice (`pace`). Then,
in one turn of the event loop, nothing more is taken from the source, and the destination is let go
behind the last token that was. What fails before leaves the source alone. A source that fails before is
handed over from as soon as the destination is there, unless another node would be sooner (`Retries.outlast`).
"""

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Final, Protocol

from sllm_node.cluster.pace import Pace
from sllm_node.cluster.part import Part
from sllm_node.cluster.wire import Granted, Record, Standing, Waiting
from sllm_node.core.clock import Clock
from sllm_node.core.errors import PeerUnreachableError
from sllm_node.core.types import NodeId, SessionId, TokenIds

log = logging.getLogger(__name__)

ROUNDS_MAX: Final = 8
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

    @property
    def position(self) -> int:
        """Output tokens so far."""

    @property
    def is_orphaned(self) -> bool:
        """Whether its node failed while it moves: it only waits for the destination."""

    def tokens_from(self, position: int) -> TokenIds:
        """Return its output tokens from `position` on."""

    def take(self, part: Part, record: Record) -> bool:
        """Take a record of any of its parts."""

    def hand_over(self, part: Part) -> bool:
        """Take nothing more from the owner, and the rest from `part`; False: it has ended."""

    def settled(self, move: "Move") -> None:
        """Take note that a move has come to an end, either way."""


class Move:
    """Runs from its making."""

    def __init__(self, session: Moving, part: Part, report: MoveReport, clock: Clock) -> None:
        self.part = part
        self.report = report
        self._session = session
        self._clock = clock
        self._standing = -1
        self._bytes = 0
        self._asked_at = self._nearer_at = clock.now()
        self._is_granted = False
        self._news = asyncio.Event()
        log.info("session moves", extra=report.fields())
        part.start(session.take)
        part.ended.add_done_callback(lambda _: self._news.set())
        self.task = asyncio.create_task(self._run(), name=f"move {report.id}")

    def take(self, record: Record) -> None:
        """Take the word of the destination: how far its load is, that it computes, or how far it is."""
        if isinstance(record, Granted):
            self._is_granted, self._nearer_at = True, self._clock.now()
        elif isinstance(record, Standing) and record.position > self._standing:
            self._standing, self._nearer_at = record.position, self._clock.now()
            self._news.set()
        elif isinstance(record, Waiting) and (done := _loaded(record)) > self._bytes:
            self._bytes, self._nearer_at = done, self._clock.now()

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
            self.report.outcome, self.report.error = outcome, why
            self.task.cancel()
            self.part.close()
            self._session.settled(self)

    async def _run(self) -> None:
        report = self.report
        try:
            async with asyncio.timeout(MOVE_S):
                sent = await self._approach()
        except Exception as error:  # noqa: BLE001 - whatever it is, the session goes on where it was
            if report.outcome == "moving":
                report.outcome = "failed"
                report.error = str(error) or type(error).__name__
                self.part.close()
                self._session.settled(self)
            return
        if not self._session.hand_over(self.part):
            self.stop("ended")
            return
        report.outcome = "moved"
        rest = self._session.tokens_from(sent)
        report.last = len(rest)
        try:
            await self._send(sent, rest, lets_go=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the destination may not be let go
            lost = PeerUnreachableError(report.to, str(error) or type(error).__name__)
            self.part.end(lost)  # the owner, by now: the session is placed again
        self._session.settled(self)

    async def _approach(self) -> int:
        """Let the destination come near; return the output tokens that it has."""
        session, report, now = self._session, self.report, self._clock.now
        sent, began = session.position, now()
        report.tokens = count = sent
        while True:
            standing = await self._reached(sent)
            session.pace.resumed(count, now() - began)
            lacking = session.position - standing
            is_enough = session.pace.is_last(lacking) or report.rounds >= ROUNDS_MAX
            if session.is_orphaned or is_enough:
                return standing
            report.rounds += 1
            fresh, began = session.tokens_from(standing), now()
            await self._send(standing, fresh, lets_go=False)
            sent, count = standing + len(fresh), len(fresh)

    async def _reached(self, position: int) -> int:
        """Wait until the destination has computed so many tokens; raise if it failed."""
        while self._standing < position:
            if self.part.ended.done():
                end = self.part.ended.result()
                raise (
                    end
                    if isinstance(end, Exception)
                    else PeerUnreachableError(
                        self.report.to, "it ended a session that it was to hold"
                    )
                )
            self._news.clear()
            await self._news.wait()
        return self._standing

    async def _send(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        self.report.tokens += len(tokens)
        try:
            await self.part.source.extend(position, tokens, lets_go=lets_go)
        finally:
            self.report.bytes_sent = self.part.source.bytes_sent


def _loaded(waiting: Waiting) -> int:
    """Return how many bytes of a load have come."""
    progress = waiting.status.progress if waiting.status else None
    return progress.bytes_done if progress else 0
