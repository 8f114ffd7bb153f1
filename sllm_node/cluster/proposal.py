"""A migration as the entry keeps it: where to, how far the destination is, which round is under way."""

from dataclasses import dataclass, field

from sllm_node.cluster.migration import MigrationOutcome, Report
from sllm_node.cluster.migration_messages import Attempt, Standing
from sllm_node.cluster.state import ResumeFit
from sllm_node.core.types import NodeId, SessionId


@dataclass(frozen=True, slots=True)
class Target:
    """Where a session is to go."""

    node: NodeId
    fit: ResumeFit | None = None
    """How fast it resumes sessions of that model, as it says itself."""
    reservation: str = ""


@dataclass(slots=True)
class Owner:
    """Who generates, in the newest epoch that was granted."""

    node: NodeId
    epoch: int
    attempt: Attempt
    heard_at: float
    said_at: float


@dataclass(slots=True)
class Proposal:
    """A migration under way."""

    target: Target
    epoch: int
    source: NodeId | None
    """None: nobody owned the session when it began."""
    reason: str
    since: float
    heard_at: float
    said_at: float
    attempt: Attempt | None = None
    """None: not heard yet."""
    is_ready: bool = False
    held: int = 0
    computed: int = 0
    round_end: int = 0
    """Position that the round under way goes to; 0: none is."""
    round_at: float = 0.0
    rounds: list[int] = field(default_factory=list)
    """Tokens of each that was begun; those of the grant last."""

    def is_at(self, node: NodeId, epoch: int) -> bool:
        """Tell whether `node` speaks of this one."""
        return (self.target.node, self.epoch) == (node, epoch)

    def hear(self, message: Standing, now: float) -> None:
        """Take how far the destination is; copies and late messages never set it back."""
        self.attempt = message.attempt
        self.heard_at = now
        self.is_ready = self.is_ready or message.is_ready
        self.held = max(self.held, message.held)
        self.computed = max(self.computed, message.computed)

    def begin_round(self, length: int, now: float) -> None:
        """Begin a round with all tokens of a session that has so many."""
        self.round_end = length
        self.round_at = now
        self.rounds.append(length - self.computed)

    def end_round(self) -> bool:
        """End the round if the destination has computed it; return whether."""
        is_done = 0 < self.round_end <= self.computed
        if is_done:
            self.round_end = 0
        return is_done

    def report(
        self, session: SessionId, outcome: MigrationOutcome, reason: str, gap_s: float | None
    ) -> Report:
        """Return what became of it."""
        return Report(
            session, self.epoch, self.source, self.target.node, outcome, reason,
            tuple(self.rounds), gap_s,
        )  # fmt: skip
