"""The tasks that keep this node among its peers: heartbeats, the view of the cluster, its file.

`Membership` decides and this carries out: one alarm for its timer, one task for each message on its way
(the next round passes over a peer that has not answered yet). What is heard feeds the `ClusterView`: a
peer is in it while it is alive, with the state that it published last. A changed file is looked for at
each round, and read on SIGHUP; a wrong one is refused with a log line, and the old one stays.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from sllm_node.cluster.agreement import Agreement, digest_of
from sllm_node.cluster.document import decode_state, encode_state
from sllm_node.cluster.file import ClusterFile, reload
from sllm_node.cluster.membership import (
    BootRaised,
    Event,
    Membership,
    Paused,
    PeerAlive,
    PeerDead,
    PeerDraining,
    PeerGone,
    PeerSuspect,
    StateChanged,
    Timing,
)
from sllm_node.cluster.messages import decode, encode
from sllm_node.cluster.peer import REACHABLE, PeerState
from sllm_node.cluster.records import Desired
from sllm_node.cluster.refusals import Refusals
from sllm_node.cluster.shown import why
from sllm_node.cluster.snapshot import Snapshot
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.transport import Client
from sllm_node.cluster.trust import Trust
from sllm_node.cluster.view import ClusterView
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import ConfigError, MessageError, MisdirectedError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import NodeId

log = logging.getLogger(__name__)

HEARTBEAT: Final = "heartbeat"
TWICE: Final = "another process runs with its id (node.id), or its clock went back"
TWICE_S: Final = 600.0
"""For so long status tells of it."""
LISTENS_DEAD_S: Final = 6
"""Times `dead_s`: about as long as a node takes to start."""
_USABLE: Final = (PeerState.ALIVE, PeerState.DRAINING)
_WORDS: Final[dict[type[Event], str]] = {
    PeerAlive: "peer alive", PeerDraining: "peer draining", PeerSuspect: "peer silent",
    PeerDead: "peer dead", PeerGone: "peer gone",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Who this node is, and the file that says who else there is."""

    me: NodeId
    boot: int
    path: Path
    cluster: ClusterFile


class Peers:
    """This node among the others, from `start` to `close`."""

    def __init__(
        self, place: Place, trust: Trust, snapshot: Snapshot, clock: Clock, metrics: Metrics
    ) -> None:
        self.me = place.me
        self.cluster = place.cluster
        self.view = ClusterView()
        self.on_change: Callable[[], None] = lambda: None
        """Called when the view has changed."""
        self._refusals = Refusals(clock)
        timing = place.cluster.timing
        self._agreement = Agreement(timing.dead_s)
        self._path = place.path
        self._trust = trust
        self._snapshot = snapshot
        self._clock = clock
        self._metrics = metrics
        self._membership = Membership(
            place.me, place.boot, place.cluster.peers(place.me),
            Timing(timing.heartbeat_s, timing.suspect_s, timing.dead_s, timing.publish_gap_s),
            place.cluster.limits.document_bytes, clock.now(),
        )  # fmt: skip
        self._limit = int(place.cluster.limits.document_bytes)
        self._states: dict[NodeId, tuple[NodeState, float]] = {}
        """The last that each peer published, and when it came; of dead ones too: they may come back."""
        self._left: dict[NodeId, tuple[NodeState, float]] = {}
        """The last of peers that said that they leave, and until when: most are started again soon."""
        self._known = place.cluster.peers(place.me)
        """Where each peer is: those of the file, and those that are listed."""
        self._listed: dict[NodeId, str] = {}
        self._lingering: set[NodeId] = set()
        """Peers that are listed no more and still speak."""
        self._sending: dict[NodeId, asyncio.Task[None]] = {}
        self._failed: set[NodeId] = set()
        """Peers that took no request since they were heard last."""
        self._alarm = Alarm(clock, self._on_timer)
        self._news = Alarm(clock, self._tell_news)
        self._is_closed = False
        self._raised: tuple[NodeId, float] | None = None
        """Which peer knew a later life of this node last, and when."""
        self.listens_until = clock.now() + LISTENS_DEAD_S * timing.dead_s
        """Until then, a peer that has not said what it has is waited for."""
        self._client: Client
        self._stamp = _stamp(place.path)
        snapshot.settle_s = place.cluster.placement.settle_s
        snapshot.cluster_file = digest_of(place.cluster)

    # --- what others of this node ask ---------------------------------------------------------

    @property
    def boot(self) -> int:
        """This node's boot as its peers are to know it: it may be raised."""
        return self._membership.edition.boot

    def address(self, peer: NodeId) -> str | None:
        """Return host:port of a peer; None: neither the cluster file nor the directory has it."""
        return self._known.get(peer)

    def desired(self) -> tuple[Desired, ...]:
        """Return the replicas that the cluster file wishes for."""
        return self.cluster.desired()

    def known(self) -> tuple[NodeId, ...]:
        """Return all peers, alive or not; those that said that they leave not."""
        peers = self._membership.peers()
        return tuple(NodeId(peer.id) for peer in peers if peer.state is not PeerState.GONE)

    async def tell(self, peer: NodeId, what: str, payload: bytes) -> bytes:
        """Ask a peer for one answer.

        Raises:
            SllmError: it can't be reached, or its answer is not to be believed.
        """
        return await self._client.ask(peer, what, payload, self.cluster.timing.suspect_s)

    def refresh(self) -> NodeState:
        """Bring this node's own state in the view up to date and return it."""
        now = self._clock.now()
        state = self._snapshot.state(now)
        self.view.update(state, now)
        return state

    def show_as(self, shown: Callable[[NodeState, float], NodeState]) -> None:
        """Have this node's states told as `shown` makes them."""
        self._snapshot.shown = shown

    def has_peers(self) -> bool:
        """Tell whether anybody else can be asked now."""
        return len(self.view.nodes) > (self.me in self.view.nodes)

    def is_listening(self) -> bool:
        """Tell whether a peer may still say for the first time what it has: this node started not long ago."""
        if self._clock.now() >= self.listens_until:
            return False
        return any(
            peer.state is not PeerState.GONE and peer.id not in self._states
            for peer in self._membership.peers()
        )

    def absent(self) -> list[NodeState]:
        """Return the last states of peers that can't be asked now, or left not long ago."""
        away = [state for peer, (state, _) in self._states.items() if peer not in self.view.nodes]
        now = self._clock.now()
        left = [(peer, state) for peer, (state, until) in self._left.items() if now < until]
        return away + [state for peer, state in left if peer not in self._states]

    def learn(self, state: NodeState) -> None:
        """Take the state that came with a refusal."""
        if state.node in self.view.nodes and state.node != self.me:
            self.view.refresh(state, self._clock.now())

    def lost(self, peer: NodeId) -> None:
        """Give `peer` nothing new until it is heard again: a request to it just failed."""
        if peer != self.me and peer in self.view.nodes:
            self._failed.add(peer)
            self.view.remove(peer)

    def is_dead(self, peer: NodeId) -> bool:
        """Tell whether `peer` has been silent for too long."""
        return self._membership.is_dead(peer)

    def refused(self, error: MessageError) -> None:
        """Take note that a message to this node was not taken."""
        self._refusals.refused(error, self._known)

    def status(self) -> list[dict[str, Any]]:
        """Return how each peer stands, for `status --cluster`."""
        now = self._clock.now()
        found = []
        for peer in self._membership.peers():
            seen = self._states.get(peer.id)
            found.append({
                "id": peer.id, "address": self.address(peer.id), "state": peer.state.value,
                "boot": peer.edition.boot, "version": peer.edition.version,
                "age_s": None if seen is None else round(now - seen[1], 3),
                "heard_s": round(now - peer.heard_at, 3) if peer.was_heard else None,
                "why": why(peer, now, self.cluster.timing, self._refusals.unreachable(peer.id)),
                "problem": self._refusals.problem(peer.id) or self._disagreement(peer.id),
            })  # fmt: skip
        return found

    def problem(self) -> str | None:
        """Return what is wrong with this node's own place among its peers; None: nothing that is known."""
        now = self._clock.now()
        if self._raised is None or now - self._raised[1] > TWICE_S:
            return None
        peer, at = self._raised
        return f"node {peer!r} knew a later life of this node {now - at:.0f} s ago: {TWICE}"

    def _disagreement(self, peer: NodeId) -> str | None:
        return "has another cluster file" if self._agreement.differs(peer) else None

    # --- life ---------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Begin to speak."""
        self._client = client
        self._snapshot.look()
        self.refresh()
        self._on_timer()

    def drain(self) -> None:
        """Tell that this node takes nothing new."""
        self._membership.drain()
        self._arm()

    def undrain(self) -> None:
        """Tell that this node takes requests again."""
        self._membership.resume()
        self._arm()

    async def close(self) -> None:
        """Tell everybody who listens that this node leaves, once; then say nothing more."""
        self._is_closed = True
        self._membership.leave()
        self._membership.on_timer(max(self._clock.now(), self._membership.next_timer()))
        self._alarm.set(None)
        self._news.set(None)
        for task in list(self._sending.values()):
            task.cancel()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)
        self._sending.clear()
        self._send_due()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    def changed(self) -> None:
        """Take note that something has changed here, which peers are told soon."""
        if not self._news.is_set and not self._is_closed:
            self._news.set(self._clock.now() + self.cluster.timing.publish_gap_s)

    def look(self) -> None:
        """Take note of a checkpoint that is here, or known, since now."""
        self._snapshot.look()
        self.changed()

    def _tell_news(self) -> None:
        self._publish()
        self._arm()

    async def receive(self, sender: NodeId, payload: bytes) -> None:
        """Take a heartbeat.

        Raises:
            MessageError: it is none, or in another's name.
        """
        message = decode(payload, self._membership.message_limit)
        if message.sender != sender:
            raise MisdirectedError(sender, message.receiver, self.me)
        self._metrics.heartbeats.labels("received").inc()
        self._refusals.heard(sender)
        self._membership.receive(message, self._clock.now())
        self._handle_events()
        if sender in self._failed:
            self._failed.discard(sender)
            self._show(sender)
            self.on_change()
        self._arm()

    # --- rounds -------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        self._watch_file()
        self._snapshot.look()
        self._publish()
        self._membership.on_timer(self._clock.now())
        self._send_due()
        self._handle_events()
        nodes = self.view.nodes.items()
        theirs = {name: node.state.cluster_file for name, node in nodes if name != self.me}
        self._agreement.look(self._snapshot.cluster_file, theirs, self._clock.now())
        self._arm()

    def _arm(self) -> None:
        if not self._is_closed:
            self._alarm.set(self._membership.next_timer())

    def _publish(self) -> None:
        try:
            self._membership.publish(encode_state(self.refresh(), self._limit))
        except SllmError as error:
            log.error("state not published", extra={"error": str(error)})  # noqa: TRY400 - the sentence says it

    def _send_due(self) -> None:
        for message in self._membership.to_send():
            peer = NodeId(message.receiver)
            if peer in self._sending:
                continue
            data = encode(message, self._membership.message_limit)
            task = asyncio.create_task(self._send(peer, data), name=f"heartbeat {peer}")
            self._sending[peer] = task
            task.add_done_callback(partial(self._sent, peer))

    def _sent(self, peer: NodeId, _: asyncio.Task[None]) -> None:
        self._sending.pop(peer, None)

    async def _send(self, peer: NodeId, data: bytes) -> None:
        silence_s, asked = self.cluster.timing.suspect_s, self._clock.now()
        try:
            await self._client.ask(peer, HEARTBEAT, data, silence_s)
        except SllmError as error:
            self._metrics.heartbeats.labels("failed").inc()
            log.debug("heartbeat failed", extra={"peer": peer, "error": str(error)})
            self._refusals.failed(peer, error)
        else:
            self._refusals.taken(peer)
            self._metrics.heartbeats.labels("sent").inc()
            self._metrics.peer_round_trip_seconds.labels(peer).observe(self._clock.now() - asked)

    # --- what was heard -----------------------------------------------------------------------

    def _handle_events(self) -> None:
        events = self._membership.events()
        for event in events:
            self._handle(event)
        if events:
            self._metrics.peers_alive.set(len(self.view.nodes) - (self.me in self.view.nodes))
            self.on_change()
        if (
            silent := {e.peer for e in events if isinstance(e, PeerDead | PeerGone)}
            & self._lingering
        ):
            self._forget(silent)

    def _handle(self, event: Event) -> None:
        match event:
            case Paused(late_s):
                log.warning("this node did not run", extra={"late_s": round(late_s, 3)})
                return
            case BootRaised(peer, boot):
                self._raised = (peer, self._clock.now())
                log.warning("a peer knew a later life of this node", extra={
                    "peer": peer, "boot": boot, "problem": TWICE,
                })  # fmt: skip
                return
            case StateChanged(peer, _, document):
                self._take(peer, document)
            case _:
                peer = event.peer
                fields = {"peer": peer, "boot": event.boot}
                log.info(_WORDS[type(event)], extra=fields)
        self._show(peer)

    def _take(self, peer: NodeId, document: bytes) -> None:
        try:
            state = decode_state(document)
        except MessageError as error:
            log.warning("state of a peer not taken", extra={"peer": peer, "error": str(error)})
            return
        if state.node == peer:
            self._states[peer] = (state, self._clock.now())
            self._left.pop(peer, None)

    def _show(self, peer: NodeId) -> None:
        """Put into the view what may be placed at `peer` now."""
        found = next((one for one in self._membership.peers() if one.id == peer), None)
        known = self._states.get(peer)
        if found is None or found.state is PeerState.GONE:
            self._states.pop(peer, None)
        if found is not None and found.state is PeerState.GONE and known is not None:
            until = self._clock.now() + LISTENS_DEAD_S * self.cluster.timing.dead_s
            self._left[peer] = (known[0], until)
        if found is None or known is None or found.state not in _USABLE:
            self.view.remove(peer)
            return
        state, seen_at = known
        if found.state is PeerState.DRAINING:
            state = replace(state, is_draining=True)
        self.view.refresh(state, seen_at)

    # --- who there is -------------------------------------------------------------------------

    def list_peer(self, peer: NodeId, address: str) -> None:
        """Take a peer that the directory has; where the file names it, the file counts."""
        self._lingering.discard(peer)
        if peer != self.me and self._listed.get(peer) != address:
            self._listed[peer] = address
            self._follow()
            self._arm()

    def unlist(self, peer: NodeId, *, has_left: bool) -> None:
        """Take that the directory has a peer no more; one that has not left stays while it speaks."""
        if peer not in self._listed:
            return
        found = next((one for one in self._membership.peers() if one.id == peer), None)
        if not has_left and found is not None and found.state in REACHABLE:
            self._lingering.add(peer)
            return
        self._forget({peer})

    def _forget(self, peers: set[NodeId]) -> None:
        self._lingering -= peers
        for peer in peers:
            self._listed.pop(peer, None)
        self._follow()

    def _follow(self) -> None:
        """Tell trust and membership who there is."""
        self._known = {**self._listed, **self.cluster.peers(self.me)}
        self._trust.set_peers(self._known)
        self._membership.set_peers(self._known, self._clock.now())
        self._handle_events()

    # --- the file -----------------------------------------------------------------------------

    def _watch_file(self) -> None:
        if (stamp := _stamp(self._path)) != self._stamp:
            self._stamp = stamp
            self.reload()

    def reload(self) -> bool:
        """Read the cluster file again; a wrong one changes nothing. Return whether it was taken."""
        self._stamp = _stamp(self._path)
        try:
            text = self._path.read_text(encoding="utf-8")
            found = reload(self.cluster, text, str(self._path), self.me)
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            self._metrics.cluster_reloads.labels("refused").inc()
            log.error(  # noqa: TRY400 - the sentence says it
                "cluster file refused, the old one stays", extra={"error": str(error)}
            )
            return False
        self.cluster = found.cluster
        self._snapshot.settle_s = found.cluster.placement.settle_s
        self._snapshot.cluster_file = digest_of(found.cluster)
        self._follow()
        self._metrics.cluster_reloads.labels("ok").inc()
        log.info("cluster file read", extra={
            "added": list(found.added), "removed": list(found.removed),
            "moved": list(found.moved), "needs_restart": list(found.needs_restart),
        })  # fmt: skip
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
