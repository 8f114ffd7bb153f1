"""What is known of one peer, and the table that says what news makes of it.

Silence is counted on this node's clock alone; clocks of others are never looked at. Words:

- A *boot* is one life of a node's process, a number greater than that of the life before; the state
  of a peer belongs to a boot. A greater boot is a new incarnation: the old one is dead for good.
- An *edition* is (boot, version): which state document, and phase, a node published.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from sllm_node.cluster.messages import Edition, Heartbeat, Phase
from sllm_node.core.types import NodeId


class PeerState(Enum):
    """What a peer is to this node."""

    UNKNOWN = "unknown"
    """Not heard of since this node knows of it, and not for long."""
    ALIVE = "alive"
    DRAINING = "draining"
    """Alive; it takes nothing new."""
    SUSPECT = "suspect"
    """Silent for `suspect_s`: give it nothing new, but don't mourn what it has."""
    DEAD = "dead"
    """Silent for `dead_s`, or its process was started anew: what it had is lost."""
    GONE = "gone"
    """It said that it leaves."""


class News(Enum):
    """What can happen to a peer."""

    SERVING = auto()
    DRAINING = auto()
    GONE = auto()
    RESTARTED = auto()
    """It is heard with a greater boot; what it says of itself follows as news of its own."""
    SILENT = auto()
    """For `suspect_s`."""
    LOST = auto()
    """Silent for `dead_s`."""


_HEARD: Final = {
    News.SERVING: PeerState.ALIVE,
    News.DRAINING: PeerState.DRAINING,
    News.GONE: PeerState.GONE,
}
_LOST: Final = {News.RESTARTED: PeerState.DEAD, News.LOST: PeerState.DEAD}
_SILENT: Final = {News.SILENT: PeerState.SUSPECT, **_LOST}

TRANSITIONS: Final[dict[PeerState, dict[News, PeerState]]] = {
    PeerState.UNKNOWN: {**_HEARD, News.LOST: PeerState.DEAD},
    PeerState.ALIVE: {**_HEARD, **_SILENT},
    PeerState.DRAINING: {**_HEARD, **_SILENT},
    PeerState.SUSPECT: {**_HEARD, **_LOST},
    PeerState.DEAD: {**_HEARD},
    PeerState.GONE: {News.RESTARTED: PeerState.UNKNOWN},
}
"""News that is not in a state's row changes nothing: a peer that is gone stays so in this boot."""

NEWS_OF_PHASE: Final = {
    Phase.SERVING: News.SERVING,
    Phase.DRAINING: News.DRAINING,
    Phase.GONE: News.GONE,
}
REACHABLE: Final = frozenset({PeerState.ALIVE, PeerState.DRAINING, PeerState.SUSPECT})


@dataclass(frozen=True, slots=True)
class PeerView:
    """A peer as others of this node see it."""

    id: NodeId
    state: PeerState
    edition: Edition
    """Of `document`; (0, 0) where none has come yet."""
    document: bytes | None
    heard_at: float = 0.0
    """Local time of the last news from it, or since when it is listened for."""
    was_heard: bool = False
    """Whether anything ever came from it."""


@dataclass(slots=True, kw_only=True)
class Peer:
    """A peer as membership keeps it."""

    id: NodeId
    heard_at: float
    """Local time of the last news from it; of a peer never heard, when this node began to listen."""
    state: PeerState = PeerState.UNKNOWN
    boot: int = 0
    sequence: int = 0
    """Of the last message from this boot; what is not greater is late or a copy."""
    edition: Edition = field(default_factory=Edition)
    document: bytes | None = None
    acknowledged: Edition = field(default_factory=Edition)
    """This node's edition that the peer says it has."""

    def apply(self, news: News) -> bool:
        """Take `news`; return whether the state changed."""
        state = TRANSITIONS[self.state].get(news, self.state)
        is_change = state is not self.state
        self.state = state
        return is_change

    def is_new(self, message: Heartbeat) -> bool:
        """Return whether `message` was sent after all that was heard before."""
        return (message.edition.boot, message.sequence) > (self.boot, self.sequence)

    def silence(self, now: float, suspect_s: float, dead_s: float) -> News | None:
        """Return what the time since the last message means."""
        silent_s = now - self.heard_at
        if silent_s >= dead_s:
            return News.LOST
        return News.SILENT if silent_s >= suspect_s else None

    def view(self) -> PeerView:
        return PeerView(
            self.id, self.state, self.edition, self.document, self.heard_at, self.boot > 0
        )
