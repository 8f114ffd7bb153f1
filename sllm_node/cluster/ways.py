"""What a session of this node's readers asks of the node: placement, peers, clock, and who takes note."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.course import Course
from sllm_node.cluster.move import MoveReport
from sllm_node.cluster.part import Asking
from sllm_node.cluster.reservations import Ask
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.wire import Leave
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    ModelStatus,
    NodeId,
    SessionId,
    Startup,
    TokenIds,
    Waited,
)
from sllm_node.schedule.stream import Stream

if TYPE_CHECKING:
    from sllm_node.cluster.forward import RoutedStream


class Ways(Protocol):
    """What a session asks of the router."""

    def choose(self, request: GenerationRequest, excluded: frozenset[NodeId]) -> Choice | None:
        """Place it anew."""

    def ask(self, choice: Choice, request: GenerationRequest) -> Ask:
        """Return what the choice counts on."""

    async def ensure(self, model: str) -> None:
        """Know a model that this node is to load from a peer."""

    def open_local(
        self, request: GenerationRequest, keep_alive_s: float | None, choice: Choice | None
    ) -> Stream:
        """Begin it here."""

    def standing(self, model: ModelId) -> ModelStatus | None:
        """Return how a model stands that a session waits for; None: nobody tells of it any more."""

    def leave(self, session: SessionId, node: NodeId, wish: Leave) -> None:
        """Take that the node that serves it asks to have it moved."""

    def learn(self, state: NodeState) -> None:
        """Take the state that came with a refusal."""

    def lost(self, node: NodeId, error: SllmError) -> None:
        """Take note that a node can't be reached."""

    def started(self, choice: Choice, model: str, seconds: float, waited: Waited | None) -> None:
        """Take note that a session runs, so long after it was placed; `waited`: of it, at its node."""

    def passed_on(self, node: NodeId, seconds: float) -> None:
        """Take note that tokens from a node were with the client so long after they had come."""

    def left(self, choice: Choice, model: str, outcome: str) -> None:
        """Take note of how a node's part in a session ended."""

    def ended(self, stream: "RoutedStream") -> None:
        """Take note that a session has ended."""

    def moved(self, report: MoveReport) -> None:
        """Take note of how a move ended."""

    async def changed(self, timeout_s: float) -> bool:
        """Wait until something is heard of the cluster; False: nothing for so long."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a session is, in seconds."""

    silence_s: float
    """A node that says nothing for so long is given up."""
    patience_s: float
    """How long a session waits for any node that can take it, after one was lost."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all routed sessions of a node share."""

    client: Asking
    clock: Clock
    limits: Limits


@dataclass(frozen=True, slots=True)
class Begun:
    """A session that this node has served until now, without a `RoutedStream`."""

    stream: Stream
    tokens: TokenIds
    cached: int | None
    startup: Startup

    def course(self, lost: "Lost | None", now: float) -> Course:
        """Return its course until now; `lost`: who has failed it."""
        stream = self.stream
        tokens = len(self.tokens)
        course = Course(self.startup, stream.opened, tokens, is_running=stream.is_granted)
        if lost is not None:
            course.left(lost.choice.node, lost.error.code, now)
        return course


@dataclass(frozen=True, slots=True)
class Lost:
    """Who has failed a session that this node served, or was to."""

    choice: Choice
    error: SllmError
    begun: Begun | None = None
    """What it was until then, if it ran."""
