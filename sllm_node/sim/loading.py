"""Loads: which memory they take, which links they wait for, how long they last, what they leave behind.

The loads of one link go one after another: of a device's, of a node's NVMe, of its network, of the
network of the node that sends. A load begins when all its links are free and lasts what the slowest
tier of its path needs (`cluster.estimate.load_path`), times a random factor that nobody knows beforehand.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from sllm_node.cluster.estimate import LoadPath, Source, load_path
from sllm_node.cluster.state import Bandwidths, HeldModel, ReplicaId
from sllm_node.schedule.estimate import MovingAverage
from sllm_node.sim.hardware import Device, Model, Moving, Node, Replica, Session
from sllm_node.sim.policy import Go, Load

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_DRAWN: Final = 4096
_NEWS: Final = 0.15
"""A node publishes an NVMe bandwidth that differs by more than this part from the last one."""


class Loading:
    """The loads of a simulation."""

    def __init__(self, simulation: "Simulation", seed: int) -> None:
        self._simulation = simulation
        rng = np.random.default_rng([seed, 4])
        noise = np.exp(simulation.limits.noise * rng.standard_normal(_DRAWN))
        self._noise = [float(factor) for factor in noise]
        self._begun = 0
        self.holders: list[dict[str, Node]] = [{} for _ in simulation.models]
        """Nodes that have a model on NVMe."""
        for node in simulation.nodes.values():
            for number in node.nvme.models:
                self.holders[number][node.id] = node
        self._tokens_out = MovingAverage(64.0)

    @property
    def mean_tokens_out(self) -> float:
        """Return how many tokens a session puts out, as was observed."""
        return self._tokens_out.value

    def learn(self, session: Session) -> None:
        """Take notice of a session that has ended."""
        self._tokens_out.observe(session.tokens_out)

    def start(self, session: Session, choice: Load) -> None:
        """Make room, give the session a place in a replica on its way, and start the load."""
        for replica in choice.evicts:
            self.drop(replica)
        victims = choice.preempts or tuple(go.victim for go in choice.moves)
        replica = self._make(session.model, choice.node, choice.devices, victims)
        self._simulation.join(session, replica)
        if choice.moves:
            self._simulation.mover.prepare(replica, choice.moves)
            return
        self._stop(victims)
        self.begin(replica)

    def _stop(self, victims: tuple[Replica, ...]) -> None:
        """Stop sessions; they are placed again at once."""
        stopped = [session for victim in victims for session in victim.sessions.values()]
        stopped += [session for victim in victims for session in victim.waiting]
        for victim in victims:
            victim.waiting.clear()
            self._simulation.journal.counts["preemption"] += len(victim.sessions)
            self.leave(victim)
        for session in stopped:
            self._simulation.interrupt(session)
        for session in stopped:
            self._simulation.place(session)

    def destination(self, go: Go) -> Replica:
        """Return the replica that a victim's sessions go to, with places promised to them."""
        if go.joins is not None:
            go.joins.incoming += len(go.victim.sessions)
            self._simulation.changed(go.joins.node)
            return go.joins
        assert go.node is not None
        for replica in go.evicts:
            self.drop(replica)
        made = self._make(go.victim.model, go.node, go.devices, ())
        made.incoming = len(go.victim.sessions)
        self.begin(made)
        return made

    def _make(
        self, model: Model, node: Node, devices: tuple[Device, ...], victims: tuple[Replica, ...]
    ) -> Replica:
        node.made += 1
        name = ReplicaId(f"{node.id}/{node.boot}/{node.made}")
        replica = Replica(name, model, node, devices)
        for device in devices:
            comes = sum(v.model.share for v in victims if device in v.devices)
            device.free -= max(0, model.share - comes)
            assert device.free >= 0, "a device was promised twice"
        replica.leaving = [Moving(victim, victim) for victim in victims]
        node.replicas[name] = replica
        self._simulation.replicas[model.number][name] = replica
        self._simulation.changed(node)
        return replica

    def leave(self, victim: Replica) -> None:
        """Take a replica from those that sessions may join, before it goes."""
        victim.is_leaving = True
        self._simulation.replicas[victim.model.number].pop(victim.name, None)
        self._simulation.changed(victim.node)

    def drop(self, replica: Replica) -> None:
        """Evict an idle replica: its memory is free at once."""
        assert replica.is_idle, "only idle replicas are evicted"
        self.forget(replica)
        for device in replica.devices:
            device.free += replica.model.share
        self._simulation.journal.note(self._simulation.now, "evict", replica.name)

    def forget(self, replica: Replica) -> None:
        """Take a replica off the books, but not its memory."""
        replica.is_gone = True
        replica.node.replicas.pop(replica.name, None)
        self._simulation.replicas[replica.model.number].pop(replica.name, None)
        self._simulation.changed(replica.node)

    def path(self, node: Node, model: Model, rates: Bandwidths) -> LoadPath:
        """Return the quickest path of a load, at the given rates."""
        mechanisms = self._simulation.mechanisms
        dram = model.stored if node.dram.has(model) else 0
        nvme = model.stored if node.nvme.has(model) else 0
        held = HeldModel(model.id, model.decoded, model.stored, dram, nvme)
        is_sent = mechanisms.peers and any(
            other is not node and other.is_up for other in self.holders[model.number].values()
        )
        has_replica = mechanisms.clone and any(
            r.is_ready and r.model is model for r in node.replicas.values()
        )
        rate = rates.peer if is_sent else 0.0
        return load_path(held, rates, peer_rate=rate, has_replica=has_replica)

    def wait_s(self, node: Node, devices: tuple[Device, ...], source: Source) -> float:
        """Return how long a load of such a path waits for its links."""
        until = max(device.link_until for device in devices)
        if source is Source.NVME:
            until = max(until, node.nvme_until)
        if source in (Source.PEER, Source.REMOTE):
            until = max(until, node.link_until)
        return max(0.0, until - self._simulation.now)

    def begin(self, replica: Replica) -> None:
        """Let a load wait for its links and run: its memory is free by now."""
        simulation, node, model = self._simulation, replica.node, replica.model
        for moving in replica.leaving:
            if not moving.victim.is_gone:
                self.forget(moving.victim)
        for device in replica.devices:
            came = sum(m.victim.model.share for m in replica.leaving if device in m.victim.devices)
            device.free += max(0, came - model.share)
        for moving in replica.leaving:
            for device in moving.victim.devices:
                if device not in replica.devices:
                    device.free += moving.victim.model.share
        replica.leaving = []
        path = self.path(node, model, node.rates)
        wait_s = self.wait_s(node, replica.devices, path.source)
        sender = self._sender(node, model) if path.source is Source.PEER else None
        if sender is not None:
            wait_s = max(wait_s, sender.sends_until - simulation.now)
        self._begun += 1
        load_s = path.load_s * self._noise[self._begun % _DRAWN]
        self._occupy(replica, path.source, simulation.now + wait_s + load_s, sender)
        told = self.path(node, model, node.told).load_s
        prepare_s = simulation.limits.prepare_s
        replica.expected_at = simulation.now + wait_s + told + prepare_s
        replica.load_s = load_s + prepare_s
        simulation.journal.note(
            simulation.now, "load", replica.name, model.id, path.source.value, f"{wait_s:.6f}"
        )
        self._count(model, path.source)
        simulation.push(
            simulation.now + wait_s + load_s + prepare_s, self._loaded, replica, path.source
        )

    def _sender(self, node: Node, model: Model) -> Node | None:
        others = self.holders[model.number].values()
        able = [other for other in others if other is not node and other.is_up]
        return min(able, key=lambda other: (other.sends_until, other.id), default=None)

    def _occupy(self, replica: Replica, source: Source, until: float, sender: Node | None) -> None:
        for device in replica.devices:
            device.link_until = until
        if source is Source.NVME:
            replica.node.nvme_until = until
        if source in (Source.PEER, Source.REMOTE):
            replica.node.link_until = until
        if sender is not None:
            sender.sends_until = until

    def _count(self, model: Model, source: Source) -> None:
        journal = self._simulation.journal
        size = model.decoded if source is Source.CLONE else model.stored
        journal.loads[source.value] += 1
        journal.bytes_moved[source.value] += size

    def _loaded(self, replica: Replica, source: Source) -> None:
        if replica.is_gone:
            return
        simulation, node = self._simulation, replica.node
        replica.is_ready = True
        simulation.journal.note(simulation.now, "loaded", replica.name)
        simulation.journal.errors_s.append(simulation.now - replica.expected_at)
        self._keep(node, replica.model, source)
        for session in list(replica.sessions.values()):
            simulation.begin(session)
        followers, replica.followers = replica.followers, []
        for target in followers:
            simulation.mover.go_on(target)
        simulation.left(replica)

    def _keep(self, node: Node, model: Model, source: Source) -> None:
        """Note what a load leaves on the tiers below, and what it tells of the NVMe's rate."""
        if source in (Source.PEER, Source.REMOTE):
            gone = node.nvme.add(model, self._last_copies(node))
            if gone is not None:
                self.holders[model.number][node.id] = node
                for other in gone:
                    self.holders[other.number].pop(node.id, None)
        elif node.nvme.has(model):
            node.nvme.touch(model)
        if source is Source.NVME:
            node.observed_nvme.observe(node.rates.nvme)
            self._tell(node)
        node.dram.add(model)
        self._simulation.changed(node)

    def _last_copies(self, node: Node) -> frozenset[int]:
        return frozenset(n for n in node.nvme.models if len(self.holders[n]) < 2)

    def _tell(self, node: Node) -> None:
        seen, said = node.observed_nvme.value, node.told.nvme
        if abs(seen - said) > _NEWS * said:
            node.told = _with_nvme(node.told, seen)

    def rest(self, replica: Replica) -> None:
        """Note that a replica is idle; without keep-alive it goes after as long as its load lasted."""
        simulation = self._simulation
        replica.idle_since = simulation.now
        replica.idles += 1
        if not simulation.mechanisms.keep_alive:
            simulation.push(simulation.now + replica.load_s, self._expire, replica, replica.idles)

    def _expire(self, replica: Replica, idles: int) -> None:
        if replica.is_idle and replica.idles == idles and not replica.is_gone:
            self.drop(replica)
            self._simulation.retry()


def _with_nvme(rates: Bandwidths, nvme: float) -> Bandwidths:
    return Bandwidths(rates.clone, rates.decode, rates.dram, nvme, rates.peer, rates.remote)
