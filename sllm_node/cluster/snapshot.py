"""This node's own state, made of what its scheduler, store and engines know (`schedule.outlook`).

Models and tiers are looked up at each heartbeat, since that looks at files; replicas, sessions and
memory are read anew for each decision. A node has one replica of a model at most, so a replica is named
after its model. A model that waits for nothing but evictions is told as a replica that comes: its bytes
are taken, and those of who leaves for it are not free again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sllm_node.cluster.estimate import coming_s
from sllm_node.cluster.state import (
    NO_NODE,
    Bandwidths,
    BootId,
    DeviceShare,
    DeviceState,
    HeldModel,
    NodeState,
    ReplicaId,
    ReplicaState,
    ResumeFit,
    SessionState,
)
from sllm_node.core.types import ModelId, ModelState, NodeId, Tier
from sllm_node.schedule.actions import ReplicaView
from sllm_node.schedule.outlook import ModelFacts, Outlook

_COMING: Final = (ModelState.QUEUED, ModelState.LOADING)
_IDLE_GRAIN_S: Final = 10.0
"""Idle times are told in steps of it, so that a node where nothing happens tells nothing new."""


class Snapshot:
    """Makes the states of one boot of this node, each with the next version."""

    def __init__(
        self,
        me: NodeId,
        boot: BootId,
        outlook: Outlook,
        from_peers: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
    ) -> None:
        """`from_peers`: bytes a second of a load from a peer, and seconds before its first one."""
        self._me = me
        self._from_peers = from_peers
        self._boot = boot
        self._outlook = outlook
        self._models: tuple[HeldModel, ...] = ()
        self._last: NodeState | None = None
        self._version = 0
        self.fit_of: Callable[[ModelId], ResumeFit | None] = lambda _: None
        """How long sessions of a model take to resume here, as far as that was seen."""
        self.settle_s = 0.0
        """A session that came by a move is not moved again for another model for so long."""
        self.cluster_file = ""
        """A digest of the cluster file that this node follows."""
        self.shown: Callable[[NodeState, float], NodeState] = lambda state, _: state
        """Makes of a state what others are to see: less what is promised."""

    def look(self) -> None:
        """Look up models and tiers anew."""
        found = self._outlook.models()
        self._models = tuple(_held(facts, self.fit_of(facts.model)) for facts in found)

    def state(self, now: float) -> NodeState:
        """Return the state as it is now; the same object if nothing has changed."""
        replicas = self._outlook.replicas()
        nvme_done_s, link_done_s = self._queues(replicas, now)
        made = NodeState(
            node=self._me,
            boot=self._boot,
            version=self._version,
            devices=self._devices(replicas, now),
            bandwidths=self._bandwidths(),
            models=self._models,
            replicas=tuple(
                self._replica(view, now)
                for view in replicas
                if view.state is not ModelState.EVICTING
            ),
            is_draining=self._outlook.is_draining,
            nvme_done_s=nvme_done_s,
            link_done_s=link_done_s,
            cluster_file=self.cluster_file,
        )
        made = self.shown(made, now)
        if self._last is None or self._last != made:
            self._version += 1
            self._last = replace(made, version=self._version)
        return self._last

    def _devices(self, replicas: tuple[ReplicaView, ...], now: float) -> tuple[DeviceState, ...]:
        found = []
        for name, total in self._outlook.capacities().items():
            staying = leaving = coming = 0
            loads = []
            for view in replicas:
                here = sum(
                    size for d, size in zip(view.devices, view.sizes, strict=True) if d == name
                )
                if view.state is ModelState.EVICTING:
                    leaving += here
                elif view.state is ModelState.QUEUED:
                    coming += here
                else:
                    staying += here
                if here and view.state in _COMING:
                    loads.append(self._moved_s(view, now))
            free = max(0, total - staying - max(leaving, coming))
            found.append(DeviceState(name, total, free, tuple(sorted(loads))))
        return tuple(found)

    def _queues(self, replicas: tuple[ReplicaView, ...], now: float) -> tuple[float, float]:
        """Return when the loads that read NVMe, and those that come from afar, are expected to be done."""
        held = {one.model: one for one in self._models}
        nvme_s = link_s = 0.0
        for view in replicas:
            model = held.get(view.model)
            if model is None or view.state not in _COMING:
                continue
            done_s = self._moved_s(view, now)
            if model.bytes_nvme > model.bytes_dram:
                nvme_s = max(nvme_s, done_s)
            if model.bytes_stored > max(model.bytes_nvme, model.bytes_dram):
                link_s = max(link_s, done_s)
        return nvme_s, link_s

    def _done_s(self, view: ReplicaView, now: float) -> float:
        """Return how long until a load that comes, or is under way, is expected to be done."""
        if view.state is ModelState.QUEUED:
            return max(view.load_s, view.ready_at + self._outlook.evict_s - now)
        return max(0.0, view.ready_at - now)

    def _ready_s(self, view: ReplicaView, now: float) -> float:
        if view.state is ModelState.QUEUED:
            return coming_s(self._done_s(view, now))
        return coming_s(view.ready_at, now)

    def _moved_s(self, view: ReplicaView, now: float) -> float:
        """Return how long until its bytes are expected to be there; what it takes beside holds up nobody."""
        return max(0.0, self._done_s(view, now) - view.beside_s)

    def _replica(self, view: ReplicaView, now: float) -> ReplicaState:
        tickets = (*view.running, *view.waiting)
        facts = [one for ticket in tickets if (one := self._outlook.session(ticket)) is not None]
        sessions = tuple(
            SessionState(
                one.session,
                one.prompt_tokens,
                one.output_tokens,
                priority=one.priority,
                stays=one.moved_at is not None and now < one.moved_at + self.settle_s,
                entry=one.entry or NO_NODE,
            )
            for one in facts
        )
        slots = self._outlook.slots
        # One that leaves gives its places to nobody: who waits there waits for it to be loaded anew.
        is_full = len(sessions) >= slots and not view.is_leaving
        idle_s = 0.0 if sessions else max(0.0, now - view.last_used)
        return ReplicaState(
            replica=ReplicaId(view.model),
            model=view.model,
            shares=tuple(map(DeviceShare, view.devices, view.sizes)),
            slots=len(sessions) if view.is_leaving else slots,
            sessions=sessions,
            ready_s=self._ready_s(view, now) if view.state in _COMING else 0.0,
            next_free_s=_turn_s(view, slots) if is_full else None,
            idle_s=idle_s // _IDLE_GRAIN_S * _IDLE_GRAIN_S,
            is_pinned=view.pinned,
            is_leaving=view.is_leaving,
        )

    def _bandwidths(self) -> Bandwidths:
        rate = self._outlook.bandwidth
        peer, peer_s = self._from_peers()
        return Bandwidths(
            clone=0.0,
            decode=rate(Tier.DRAM, is_encoded=True),
            dram=rate(Tier.DRAM),
            nvme=rate(Tier.NVME),
            peer=peer,
            remote=rate(Tier.REMOTE) if self._outlook.keeps_remotes else 0.0,
            beside_s=round(self._outlook.beside_s(is_kept=False), 4),
            kept_s=round(self._outlook.beside_s(is_kept=True), 4),
            evict_s=round(self._outlook.evict_s, 4),
            peer_s=peer_s,
        )


def _turn_s(view: ReplicaView, slots: int) -> float:
    """Return about how long until somebody leaves and all who wait already have gone first."""
    return view.service_s * (1 + len(view.waiting)) / max(1, slots)


def _held(facts: ModelFacts, fit: ResumeFit | None) -> HeldModel:
    return HeldModel(
        model=facts.model,
        bytes_decoded=facts.size,
        bytes_stored=facts.stored,
        bytes_dram=facts.by_tier.get(Tier.DRAM, 0),
        bytes_nvme=facts.by_tier.get(Tier.NVME, 0),
        replica_bytes=max(facts.shares),
        replica_shares=len(facts.shares),
        context_tokens=facts.context_tokens,
        created=facts.created,
        waiting=facts.waiting,
        is_kept=facts.is_kept,
        resume=fit,
        digest=facts.digest,
    )
