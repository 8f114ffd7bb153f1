"""The tasks that keep this node among its peers: heartbeats, the view of the cluster, its file.

`Membership` decides and this carries out: one alarm for its timer, one task for each message on its way
(`heartbeats`; the next round passes over a peer that has not answered yet). What is heard feeds the `ClusterView`: a
peer is in it while it is alive, with the state that it published last. A changed file is looked for at
each round, and read on SIGHUP; a wrong one is refused with a log line, and the old one stays.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sllm_node.cluster.addresses import Addresses
from sllm_node.cluster.agreement import Agreement, Differing, digest_of
from sllm_node.cluster.document import encode_state
from sllm_node.cluster.file import ClusterFile
from sllm_node.cluster.followed_file import FollowedFile
from sllm_node.cluster.heard import Heard
from sllm_node.cluster.heartbeats import Heartbeats
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
from sllm_node.cluster.peer import REACHABLE, PeerState, PeerView
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
        self._agreement, self._differing = Agreement(timing.dead_s), Differing()
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
        self._heard = Heard()
        self._addresses = Addresses(place.cluster.peers(place.me))
        self._heartbeats = Heartbeats(clock, metrics, self._refusals)
        self._failed: set[NodeId] = set()
        """Peers that took no request since they were heard last."""
        self._alarm = Alarm(clock, self._on_timer)
        self._news = Alarm(clock, self._tell_news)
        self._is_closed = False
        self.listens_until = clock.now() + LISTENS_DEAD_S * timing.dead_s
        """Until then, a peer that has not said what it has is waited for."""
        self._client: Client
        self._file = FollowedFile(place.path, place.me, place.cluster)
        snapshot.settle_s = place.cluster.placement.settle_s
        snapshot.cluster_file = digest_of(place.cluster)

    # --- what others of this node ask ---------------------------------------------------------

    @property
    def boot(self) -> int:
        """This node's boot as its peers are to know it: it may be raised."""
        return self._membership.edition.boot

    def address(self, peer: NodeId) -> str | None:
        """Return host:port of a peer; None: neither the cluster file nor the directory has it."""
        return self._addresses.known.get(peer)

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

    def is_listening(self) -> bool:
        """Tell whether a peer may still say for the first time what it has: this node started not long ago."""
        if self._clock.now() >= self.listens_until:
            return False
        return any(
            peer.state is not PeerState.GONE and not self._heard.has(peer.id)
            for peer in self._membership.peers()
        )

    def absent(self) -> list[NodeState]:
        """Return the last states of peers that can't be asked now, or left not long ago."""
        return self._heard.absent(self.view.nodes, self._clock.now())

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
        self._refusals.refused(error, self._addresses.known)

    def status(self) -> list[dict[str, Any]]:
        """Return how each peer stands, for `status --cluster`."""
        now = self._clock.now()
        found = []
        for peer in self._membership.peers():
            seen = self._heard.last(peer.id)
            found.append({
                "id": peer.id, "address": self.address(peer.id), "state": peer.state.value,
                "boot": peer.edition.boot, "version": peer.edition.version,
                "age_s": None if seen is None else round(now - seen[1], 3),
                "heard_s": round(now - peer.heard_at, 3) if peer.was_heard else None,
                "why": why(peer, now, self.cluster.timing, self._refusals.unreachable(peer.id)),
                "problem": self._refusals.problem(peer.id) or self._agreement.problem(peer.id),
            })  # fmt: skip
        return found

    def problem(self) -> str | None:
        """Return what is wrong with this node's own place among its peers; None: nothing that is known."""
        return self._refusals.own_problem()

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
        await self._heartbeats.drop()
        self._send_due()
        await self._heartbeats.answered()

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
        self._differing.look(self.view, self._clock.now())
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
            if not self._heartbeats.is_sending(peer):
                data = encode(message, self._membership.message_limit)
                silence_s = self.cluster.timing.suspect_s
                self._heartbeats.send(self._client, peer, data, silence_s)

    # --- what was heard -----------------------------------------------------------------------

    def _handle_events(self) -> None:
        events = self._membership.events()
        for event in events:
            self._handle(event)
        if events:
            self._metrics.peers_alive.set(len(self.view.nodes) - (self.me in self.view.nodes))
            self.on_change()
        silent = {e.peer for e in events if isinstance(e, PeerDead | PeerGone)}
        if self._addresses.drop_silent(silent):
            self._follow()

    def _handle(self, event: Event) -> None:
        match event:
            case Paused(late_s):
                log.warning("this node did not run", extra={"late_s": round(late_s, 3)})
                return
            case BootRaised(peer, boot):
                self._refusals.knew_later_life(peer, boot)
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
            self._heard.take(peer, document, self._clock.now())
        except MessageError as error:
            log.warning("state of a peer not taken", extra={"peer": peer, "error": str(error)})

    def _show(self, peer: NodeId) -> None:
        """Put into the view what may be placed at `peer` now."""
        found = self._found(peer)
        known = self._heard.last(peer)
        if found is None:
            self._heard.forget(peer)
        elif found.state is PeerState.GONE:
            until = self._clock.now() + LISTENS_DEAD_S * self.cluster.timing.dead_s
            self._heard.leaves(peer, until)
        if found is None or known is None or found.state not in _USABLE:
            self.view.remove(peer)
            return
        state, seen_at = known
        if found.state is PeerState.DRAINING:
            state = replace(state, is_draining=True)
        self.view.refresh(state, seen_at)

    def _found(self, peer: NodeId) -> PeerView | None:
        return next((one for one in self._membership.peers() if one.id == peer), None)

    # --- who there is -------------------------------------------------------------------------

    def list_peer(self, peer: NodeId, address: str) -> None:
        """Take a peer that the directory has; where the file names it, the file counts."""
        if peer != self.me and self._addresses.put(peer, address):
            self._follow()
            self._arm()

    def unlist(self, peer: NodeId, *, has_left: bool) -> None:
        """Take that the directory has a peer no more; one that has not left stays while it speaks."""
        found = self._found(peer)
        may_linger = not has_left and found is not None and found.state in REACHABLE
        if self._addresses.drop(peer, may_linger=may_linger):
            self._follow()

    def _follow(self) -> None:
        """Tell trust and membership who there is."""
        self._addresses.follow(self.cluster.peers(self.me))
        self._trust.set_peers(self._addresses.known)
        self._membership.set_peers(self._addresses.known, self._clock.now())
        self._handle_events()

    # --- the file -----------------------------------------------------------------------------

    def _watch_file(self) -> None:
        if self._file.has_changed():
            self.reload()

    def reload(self) -> bool:
        """Read the cluster file again; a wrong one changes nothing. Return whether it was taken."""
        try:
            found = self._file.read(self.cluster, self._trust.renew)
        except ConfigError as error:
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
        return True
