"""What a simulated node tells of itself: the state document that real nodes publish.

Only what a node can know goes in: loads are expected to last what its observed rates say, and a place is
expected to come free when its session has put out as many tokens as sessions do on average.
"""

import heapq
from typing import TYPE_CHECKING

from sllm_node.cluster.estimate import coming_s
from sllm_node.cluster.state import (
    Bandwidths,
    BootId,
    DeviceShare,
    DeviceState,
    HeldModel,
    NodeId,
    NodeState,
    ReplicaId,
    ReplicaState,
    ResumeFit,
    SessionState,
)
from sllm_node.core.types import SessionId
from sllm_node.sim.hardware import Device, Model, Node, Replica, Session

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation


class Publishing:
    """Makes the states of nodes."""

    def __init__(self, simulation: "Simulation", *, guards_stopped: bool = False) -> None:
        self._simulation = simulation
        self._guards_stopped = guards_stopped
        """Whether sessions that were stopped once have a priority that keeps them from it."""
        self._held: dict[NodeId, tuple[tuple[int, int], tuple[HeldModel, ...]]] = {}
        self._fits = [ResumeFit(m.prefill_s_per_token, m.prefill_s) for m in simulation.models]
        self._told: dict[Bandwidths, Bandwidths] = {}

    def state(self, node: Node, only: tuple[ReplicaId, ...] | None = None) -> NodeState:
        """Return the node's state as it is now; of its replicas, all or `only` these."""
        now, replicas = self._simulation.now, list(node.replicas.values())
        if only is not None:
            replicas = [node.replicas[name] for name in only if name in node.replicas]
        return NodeState(
            node=node.id,
            boot=BootId(str(node.boot)),
            version=node.version,
            devices=tuple([self._device(device, now) for device in node.devices]),
            bandwidths=self._bandwidths(node.told),
            models=self._models(node),
            replicas=tuple([self._replica(r, now) for r in replicas if not r.is_leaving]),
            is_draining=not node.is_up,
            nvme_done_s=max(0.0, node.nvme_until - now),
            link_done_s=max(0.0, node.link_until - now),
        )

    def _bandwidths(self, told: Bandwidths) -> Bandwidths:
        """Return the observed rates less the paths that the nodes of this run don't have."""
        found = self._told.get(told)
        if found is None:
            mechanisms = self._simulation.mechanisms
            found = Bandwidths(
                clone=told.clone if mechanisms.clone else 0.0,
                decode=told.decode,
                dram=told.dram,
                nvme=told.nvme,
                peer=told.peer if mechanisms.peers else told.remote,
            )
            self._told[told] = found
        return found

    def _device(self, device: Device, now: float) -> DeviceState:
        left_s = device.link_until - now
        loads = (left_s,) if left_s > 0 else ()
        return DeviceState(device.name, device.total, device.free, loads)

    def _models(self, node: Node) -> tuple[HeldModel, ...]:
        """Return what lies on the node's tiers; the same object as long as nothing changed."""
        stamp = node.dram.version, node.nvme.version
        known = self._held.get(node.id)
        if known is None or known[0] != stamp:
            before = {held.model: held for held in known[1]} if known else {}
            numbers = {**node.nvme.models, **node.dram.models}
            made = (self._model(node, model) for model in numbers.values())
            kept = tuple(held if (old := before.get(held.model)) != held else old for held in made)
            known = self._held[node.id] = (stamp, kept)
        return known[1]

    def _model(self, node: Node, model: Model) -> HeldModel:
        dram = model.stored if node.dram.has(model) else 0
        nvme = model.stored if node.nvme.has(model) else dram
        fit = self._fits[model.number]
        return HeldModel(model.id, model.decoded, model.stored, dram, nvme, fit)

    def _replica(self, replica: Replica, now: float) -> ReplicaState:
        model = replica.model
        shares = tuple([DeviceShare(device.name, model.share) for device in replica.devices])
        if replica.is_idle:
            idle_s = now - replica.idle_since
            return ReplicaState(replica.name, model.id, shares, model.slots, idle_s=idle_s)
        is_full = replica.free_slots <= 0
        return ReplicaState(
            replica.name,
            model.id,
            shares,
            model.slots - replica.incoming,
            tuple([self._session(session, now) for session in replica.sessions.values()]),
            ready_s=0.0 if replica.is_ready else coming_s(replica.expected_at, now),
            next_free_s=self._next_free_s(replica, now) if is_full else None,
            is_pinned=bool(replica.incoming or replica.waiting),
        )

    def _session(self, session: Session, now: float) -> SessionState:
        rate = 1 / session.model.token_s if session.replica and session.replica.is_ready else 0.0
        out, priority = session.out_at(now), int(self._guards_stopped and session.preempted > 0)
        return SessionState(SessionId(str(session.number)), session.tokens_in, out, rate, priority)

    def _next_free_s(self, replica: Replica, now: float) -> float:
        """Guess when one more session would have a place, behind those that wait already."""
        ends = [self._left_s(replica, session, now) for session in replica.sessions.values()]
        heapq.heapify(ends)
        if not ends:
            return 1.0
        model = replica.model
        whole_s = model.prefill_s + self._simulation.loading.mean_tokens_out * model.token_s
        for _ in replica.waiting:
            heapq.heappush(ends, heapq.heappop(ends) + whole_s)
        return ends[0]

    def _left_s(self, replica: Replica, session: Session, now: float) -> float:
        """Guess how long a session will go on: half its mean at least, since nobody knows its end."""
        mean = self._simulation.loading.mean_tokens_out
        left = max(mean / 2, mean - session.out_at(now))
        begins_s = max(0.0, session.decode_from - now) if replica.is_ready else 0.0
        if not replica.is_ready:
            begins_s = max(0.0, replica.expected_at - now)
        return begins_s + left * session.model.token_s
