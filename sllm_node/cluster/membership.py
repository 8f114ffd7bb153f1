"""Who else is there: heartbeats to every peer, and what their coming or missing says.

Theory of operation. Every `heartbeat_s` a node sends each peer of the cluster file one heartbeat
(a full mesh: 64 nodes at one per second are 63 small messages a second from each). A heartbeat says
which edition (boot, version) the sender is at, and which edition of the receiver it has. The state
document goes along only where the receiver is heard and lacks it, so a lost message is made good by
the next one and nothing is sent twice for long. Whoever is dead still gets heartbeats, a few dozen
bytes each: that is how a partition heals.

Three things that go wrong elsewhere:

- *Clocks.* No message carries a time. Silence is measured on the own clock, from arrival to now.
- *Pauses.* A process that was stopped (SIGSTOP, swap, a moved virtual machine) wakes up and has
  heard nobody. Its timer tells it so: the time by which the timer is late was not listened to, and
  is counted as nobody's silence.
- *Restarts.* A message of a greater boot is a new incarnation: the old one is reported dead first.
  A boot that is not greater (the machine's clock went back between two starts) would never be
  heard; but peers tell which boot and sequence they heard last, and a node that has not got so far
  itself takes a greater boot.

A view is this node's own: nothing is passed on about third nodes. Where A is cut off from B and both
see C, A and B hold each other dead and C holds both alive; whoever routes asks its own view.

The object does no I/O: `receive(message, now)`, `to_send()`, `next_timer()`, `on_timer(now)` and
`events()`. `now` is the local monotonic clock's, in seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sllm_node.cluster.messages import (
    LARGEST_BOOT,
    OVERHEAD_BYTES,
    PROTOCOL,
    Edition,
    Heartbeat,
    Phase,
    raise_boot,
)
from sllm_node.cluster.peer import NEWS_OF_PHASE, REACHABLE, News, Peer, PeerState, PeerView
from sllm_node.core.errors import DocumentTooLargeError
from sllm_node.core.types import NodeId


@dataclass(frozen=True, slots=True)
class Timing:
    """How often to speak, and how long a silence means what; the same on all nodes."""

    heartbeat_s: float = 1.0
    suspect_s: float = 3.0
    dead_s: float = 10.0
    publish_gap_s: float = 0.1
    """Least time between two rounds of heartbeats when the state document changes quickly."""

    def __post_init__(self) -> None:
        assert 0 < self.publish_gap_s <= self.heartbeat_s < self.suspect_s < self.dead_s


@dataclass(frozen=True, slots=True)
class PeerAlive:
    """It is heard, after it was not; or its drain was called off."""

    peer: NodeId
    boot: int


@dataclass(frozen=True, slots=True)
class PeerDraining:
    """It is heard, and takes nothing new."""

    peer: NodeId
    boot: int


@dataclass(frozen=True, slots=True)
class PeerSuspect:
    """It is silent for long."""

    peer: NodeId
    boot: int


@dataclass(frozen=True, slots=True)
class PeerDead:
    """Its life `boot` is over, as far as this node can tell; 0: it was never heard."""

    peer: NodeId
    boot: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    """It left, or the cluster file no longer names it."""

    peer: NodeId
    boot: int


@dataclass(frozen=True, slots=True)
class StateChanged:
    """A newer state document of a peer has come."""

    peer: NodeId
    edition: Edition
    document: bytes


@dataclass(frozen=True, slots=True)
class Paused:
    """This node did not run for `late_s`; its peers may hold it dead."""

    late_s: float


@dataclass(frozen=True, slots=True)
class BootRaised:
    """A peer knew a later life of this node: a clock went back, or two processes have its id."""

    peer: NodeId
    boot: int


PeerChange = PeerAlive | PeerDraining | PeerSuspect | PeerDead | PeerGone
Event = PeerChange | StateChanged | Paused | BootRaised

_ENTERED: dict[PeerState, type[PeerChange]] = {
    PeerState.ALIVE: PeerAlive,
    PeerState.DRAINING: PeerDraining,
    PeerState.SUSPECT: PeerSuspect,
    PeerState.DEAD: PeerDead,
    PeerState.GONE: PeerGone,
}


class Membership:
    """This node's view of its peers, and what it tells them of itself."""

    def __init__(
        self, me: NodeId, boot: int, peers: Iterable[NodeId], timing: Timing, limit: int, now: float
    ) -> None:
        assert 0 < boot <= LARGEST_BOOT, "messages.make_boot makes one"
        self._me = me
        self._timing = timing
        self._document_limit = limit
        self._phase = Phase.SERVING
        self._edition = Edition(boot, 0)
        self._document = b""
        self._peers = {
            peer: Peer(id=peer, heard_at=now) for peer in sorted(set(peers)) if peer != me
        }
        self._timer = now
        self._last_round = now - timing.heartbeat_s
        self._is_round_due = False
        self._sequence = 0
        self._events: list[Event] = []

    # --- what this node tells -------------------------------------------------------------------

    @property
    def edition(self) -> Edition:
        """Of what this node has published last."""
        return self._edition

    @property
    def message_limit(self) -> int:
        """The most bytes that an encoded message may have."""
        return self._document_limit + OVERHEAD_BYTES

    def publish(self, document: bytes) -> None:
        """Make `document` this node's state, and tell it soon.

        Raises:
            DocumentTooLargeError: it is above the limit; the one before stays.
        """
        if len(document) > self._document_limit:
            raise DocumentTooLargeError(len(document), self._document_limit)
        if document != self._document:
            self._document = document
            self._announce()

    def drain(self) -> None:
        """Tell that this node takes nothing new."""
        self._enter(Phase.DRAINING)

    def resume(self) -> None:
        """Take the drain back."""
        self._enter(Phase.SERVING)

    def leave(self) -> None:
        """Tell that this node leaves; it stays so until `has_left`, or as long as the shell likes."""
        self._enter(Phase.GONE)

    def has_left(self) -> bool:
        """Return whether all who hear this node know that it leaves."""
        return self._phase is Phase.GONE and all(
            peer.acknowledged == self._edition
            for peer in self._peers.values()
            if peer.state in REACHABLE
        )

    def _enter(self, phase: Phase) -> None:
        if self._phase in (phase, Phase.GONE):
            return
        self._phase = phase
        self._announce()

    def _announce(self) -> None:
        self._edition = Edition(self._edition.boot, self._edition.version + 1)
        self._timer = min(self._timer, self._last_round + self._timing.publish_gap_s)

    # --- the five verbs -------------------------------------------------------------------------

    def receive(self, message: Heartbeat, now: float) -> None:
        """Take what a peer sent; what is late, a copy, or for somebody else changes nothing."""
        peer = self._peers.get(message.sender_id)
        if peer is None or message.receiver != self._me:
            return
        if not peer.is_new(message):
            return
        if message.edition.boot > peer.boot:
            self._restart(peer, message.edition.boot)
        peer.sequence = message.sequence
        peer.heard_at = now
        self._apply(peer, NEWS_OF_PHASE[message.phase])
        self._take_document(peer, message)
        self._take_acknowledgement(peer, message)

    def to_send(self) -> tuple[Heartbeat, ...]:
        """Return the messages that are due, and count them as sent."""
        if not self._is_round_due:
            return ()
        self._is_round_due = False
        self._sequence += 1
        return tuple(self._heartbeat(peer) for peer in self._peers.values())

    def next_timer(self) -> float:
        """Return when to call `on_timer`."""
        return self._timer

    def on_timer(self, now: float) -> None:
        """Judge the silence of the peers, and begin a round of heartbeats."""
        if now < self._timer:
            return
        self._forgive_pause(now)
        for peer in self._peers.values():
            news = peer.silence(now, self._timing.suspect_s, self._timing.dead_s)
            if news is not None:
                self._apply(peer, news)
        self._is_round_due = True
        self._last_round = now
        self._timer = now + self._timing.heartbeat_s

    def events(self) -> tuple[Event, ...]:
        """Return what happened since the last call, in order."""
        events = tuple(self._events)
        self._events.clear()
        return events

    # --- what this node sees --------------------------------------------------------------------

    def peers(self) -> tuple[PeerView, ...]:
        """Return every peer, in the order of their ids."""
        return tuple(peer.view() for peer in self._peers.values())

    def is_dead(self, peer: NodeId) -> bool:
        """Tell whether `peer` is held dead."""
        found = self._peers.get(peer)
        return found is not None and found.state is PeerState.DEAD

    def set_peers(self, peers: Iterable[NodeId], now: float) -> None:
        """Follow a changed cluster file; who stays keeps all that is known of it."""
        named = sorted(set(peers) - {self._me})
        for peer in self._peers.values():
            if peer.id not in named and peer.state is not PeerState.GONE:
                self._events.append(PeerGone(peer.id, peer.boot))
        self._peers = {peer: self._peers.get(peer) or Peer(id=peer, heard_at=now) for peer in named}

    # --- inside ---------------------------------------------------------------------------------

    def _apply(self, peer: Peer, news: News) -> None:
        if peer.apply(news) and (event := _ENTERED.get(peer.state)) is not None:
            self._events.append(event(peer.id, peer.boot))

    def _restart(self, peer: Peer, boot: int) -> None:
        """Begin a new incarnation: what the old one had is lost."""
        self._apply(peer, News.RESTARTED)
        peer.boot = boot

    def _take_document(self, peer: Peer, message: Heartbeat) -> None:
        if message.document is None or message.edition <= peer.edition:
            return
        peer.edition = message.edition
        peer.document = message.document
        self._events.append(StateChanged(peer.id, peer.edition, peer.document))

    def _take_acknowledgement(self, peer: Peer, message: Heartbeat) -> None:
        known = (message.seen.boot, message.heard)
        if known > (self._edition.boot, self._sequence):
            self._raise_boot(peer, message.seen.boot)
        peer.acknowledged = message.seen

    def _raise_boot(self, peer: Peer, known: int) -> None:
        boot = raise_boot(self._edition.boot, known)
        self._edition = Edition(boot, self._edition.version + 1)
        self._timer = min(self._timer, self._last_round + self._timing.publish_gap_s)
        self._events.append(BootRaised(peer.id, boot))

    def _forgive_pause(self, now: float) -> None:
        """Count time in which this node did not listen as nobody's silence."""
        late_s = now - self._timer
        if late_s <= self._timing.heartbeat_s:
            return
        for peer in self._peers.values():
            peer.heard_at = min(now, peer.heard_at + late_s)
        self._events.append(Paused(late_s))

    def _heartbeat(self, peer: Peer) -> Heartbeat:
        wants = peer.state in REACHABLE and peer.acknowledged != self._edition
        has_news = wants and self._edition.version > 0
        return Heartbeat(
            protocol=PROTOCOL,
            sender=self._me,
            receiver=peer.id,
            sequence=self._sequence,
            edition=self._edition,
            phase=self._phase,
            seen=self._seen(peer),
            heard=peer.sequence,
            document=self._document if has_news else None,
        )

    @staticmethod
    def _seen(peer: Peer) -> Edition:
        """Return the edition whose document is here; without one, the boot, which may be to raise."""
        return peer.edition if peer.edition.boot == peer.boot else Edition(peer.boot, 0)
