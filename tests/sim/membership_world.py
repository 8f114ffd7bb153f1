"""Nodes that beat over a network that delays, loses, copies and reorders, on clocks that disagree.

One heap of events; every node has a clock of its own (an offset and a rate), crashes, starts anew
with a boot that may even be lower, and is paused with its messages waiting. All of it from one seed.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from sllm_node.cluster.auth import Opener, Sealer
from sllm_node.cluster.membership import (
    BootRaised,
    Event,
    Membership,
    PeerDead,
    StateChanged,
    Timing,
)
from sllm_node.cluster.messages import decode, encode, make_boot
from sllm_node.cluster.peer import PeerState
from sllm_node.core.errors import ReplayError
from sllm_node.core.types import NodeId

TIMING = Timing(heartbeat_s=1.0, suspect_s=3.0, dead_s=10.0, publish_gap_s=0.1)
DELAY_S = 0.8
KEY = bytes(32)
LIMIT = 256
BOUND_S = (TIMING.dead_s + 3 * TIMING.heartbeat_s) * 1.2 + 4 * DELAY_S
"""True time after which all agree once faults stopped; the slowest clock runs at 0.9."""


@dataclass
class Network:
    """How badly messages travel."""

    loss: float = 0.0
    copies: float = 0.0
    delay_s: float = DELAY_S
    cut: set[tuple[NodeId, NodeId]] = field(default_factory=set)
    """(from, to): links that carry nothing."""


@dataclass
class SimNode:
    """A machine: it may be off (no membership) or stopped (paused)."""

    id: NodeId
    offset_s: float
    rate: float
    membership: Membership | None = None
    boots: list[int] = field(default_factory=list)
    paused: bool = False
    waiting: list[bytes] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    document: bytes = b""
    left: bool = False
    sealer: Sealer | None = None
    opener: Opener | None = None


class World:
    """All nodes, the network, and true time."""

    def __init__(self, seed: int, count: int = 5, *, is_sealed: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.network = Network()
        self.ids = [NodeId(f"node-{i}") for i in range(count)]
        self.nodes = {
            name: SimNode(name, self.rng.uniform(-1e6, 1e6), self.rng.uniform(0.9, 1.1))
            for name in self.ids
        }
        self.disturbed = {(a, b): 0.0 for a in self.ids for b in self.ids}
        self.largest = 0
        self.is_sealed = is_sealed
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = itertools.count()
        for name in self.ids:
            self.start(name)

    # --- faults ---------------------------------------------------------------------------------

    def start(self, name: NodeId, boot: int | None = None) -> None:
        node = self.nodes[name]
        if boot is None:
            # The clock may have gone back, or stand still.
            boot = make_boot(self.rng.randint(1, 20), self.rng.getrandbits(20))
        node.boots.append(boot)
        node.membership = Membership(name, boot, self.ids, TIMING, LIMIT, self.local(node))
        node.paused, node.left, node.waiting, node.document = False, False, [], b""
        if self.is_sealed:
            limit = node.membership.message_limit
            node.sealer = Sealer(KEY, name, limit)
            node.opener = Opener(KEY, name, self.ids, limit, window=4)
        node.events.clear()
        self._disturb(name)
        self.publish(name)
        self._arm(node)

    def crash(self, name: NodeId) -> None:
        node = self.nodes[name]
        node.membership, node.paused, node.waiting = None, False, []
        self._disturb(name)

    def pause(self, name: NodeId) -> None:
        self.nodes[name].paused = True

    def wake(self, name: NodeId) -> None:
        node = self.nodes[name]
        node.paused = False
        self._disturb(name)
        waiting, node.waiting = node.waiting, []
        if self.rng.random() < 0.5:
            self._tick(node)
        for data in waiting:
            self._deliver(node, data)
        self._tick(node)
        self._arm(node)

    def cut(self, source: NodeId, destination: NodeId) -> None:
        self.network.cut.add((source, destination))

    def partition(self, names: set[NodeId]) -> None:
        for a in self.ids:
            for b in self.ids:
                if (a in names) != (b in names):
                    self.cut(a, b)

    def heal(self) -> None:
        for a, b in self.network.cut:
            self.disturbed[a, b] = self.disturbed[b, a] = self.now
        self.network.cut.clear()

    def stop_faults(self) -> None:
        self.heal()
        self.network.loss = self.network.copies = 0.0
        for name in self.ids:
            if self.nodes[name].paused:
                self.wake(name)

    def publish(self, name: NodeId) -> None:
        node = self.nodes[name]
        if node.membership is not None and not node.left:
            node.document = self.rng.randbytes(self.rng.randint(1, LIMIT))
            node.membership.publish(node.document)
            if not node.paused:
                self._arm(node)

    def leave(self, name: NodeId) -> None:
        node = self.nodes[name]
        if node.membership is not None:
            node.membership.leave()
            node.left = True
            self._arm(node)

    # --- time -----------------------------------------------------------------------------------

    def local(self, node: SimNode) -> float:
        return node.offset_s + self.now * node.rate

    def run(self, duration_s: float) -> None:
        end = self.now + duration_s
        while self._heap and self._heap[0][0] <= end:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = end

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._ticket), act))

    def _arm(self, node: SimNode) -> None:
        assert node.membership is not None
        when = (node.membership.next_timer() - node.offset_s) / node.rate + 1e-6
        self._at(when, lambda: self._tick(node))

    def _tick(self, node: SimNode) -> None:
        if node.membership is None or node.paused:
            return
        if self.local(node) < node.membership.next_timer():
            return
        node.membership.on_timer(self.local(node))
        self._send(node)
        self._check(node)
        self._arm(node)

    # --- the network ----------------------------------------------------------------------------

    def _send(self, node: SimNode) -> None:
        assert node.membership is not None
        for message in node.membership.to_send():
            data = encode(message, node.membership.message_limit)
            self.largest = max(self.largest, len(data))
            if node.sealer is not None:
                to = NodeId(message.receiver)
                data = node.sealer.seal(data, to, node.membership.edition.boot)
            copies = 1 + (self.rng.random() < self.network.copies)
            for _ in range(copies):
                if (node.id, NodeId(message.receiver)) in self.network.cut:
                    continue
                if self.rng.random() >= self.network.loss:
                    self._post(self.nodes[NodeId(message.receiver)], data)

    def _post(self, to: SimNode, data: bytes) -> None:
        delay_s = self.rng.uniform(0, self.network.delay_s)
        self._at(self.now + delay_s, lambda: self._deliver(to, data))

    def _deliver(self, node: SimNode, data: bytes) -> None:
        if node.membership is None:
            return
        if node.paused:
            node.waiting.append(data)
            return
        if node.opener is not None:
            try:
                data = node.opener.open(data).payload
            except ReplayError:
                return
        timer = node.membership.next_timer()
        node.membership.receive(decode(data, node.membership.message_limit), self.local(node))
        self._check(node)
        if node.membership.next_timer() != timer:
            self._arm(node)

    # --- what must always hold ------------------------------------------------------------------

    def _disturb(self, name: NodeId) -> None:
        for other in self.ids:
            self.disturbed[name, other] = self.disturbed[other, name] = self.now

    def _check(self, node: SimNode) -> None:
        assert node.membership is not None
        for event in node.membership.events():
            self._check_event(node, event)
            node.events.append(event)
        for view in node.membership.peers():
            if view.state is PeerState.DEAD:
                self._check_dead(node, view.id)

    def _check_event(self, node: SimNode, event: Event) -> None:
        if isinstance(event, StateChanged):
            older = [e for e in node.events if isinstance(e, StateChanged) and e.peer == event.peer]
            assert not older or older[-1].edition < event.edition, "an edition went backwards"
        if isinstance(event, BootRaised):
            node.boots.append(event.boot)

    def _check_dead(self, node: SimNode, name: NodeId) -> None:
        """A node that runs, on a link that works, is not dead for longer than the bound."""
        other = self.nodes[name]
        link_is_cut = {(name, node.id), (node.id, name)} & self.network.cut
        if other.membership is None or other.paused or link_is_cut:
            return
        assert self.now - self.disturbed[name, node.id] < BOUND_S, (node.id, name, self.now)

    def check_agreement(self) -> None:
        """All who run see each other alive with the newest document, and the others dead or gone."""
        for node in self.nodes.values():
            if node.membership is None:
                continue
            for view in node.membership.peers():
                other = self.nodes[view.id]
                if other.membership is None:
                    assert view.state in (PeerState.DEAD, PeerState.GONE), (node.id, view)
                else:
                    expected = PeerState.GONE if other.left else PeerState.ALIVE
                    assert view.state is expected, (node.id, view.id, view.state)
                    assert node.left or view.document == other.document, (node.id, view.id)
                    assert node.left or view.edition == other.membership.edition

    def deaths(self) -> list[tuple[NodeId, PeerDead]]:
        return [(n.id, e) for n in self.nodes.values() for e in n.events if isinstance(e, PeerDead)]

    def events(self) -> int:
        return sum(len(node.events) for node in self.nodes.values())
