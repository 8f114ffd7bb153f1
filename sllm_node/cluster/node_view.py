"""One node as another one sees it: its newest state, with what stands on each device added up."""

import math
from collections.abc import Sequence
from typing import Final

from sllm_node.cluster.estimate import Source
from sllm_node.cluster.state import DeviceState, HeldModel, NodeState, ReplicaState
from sllm_node.core.types import ModelId

_BY_LINK: Final = (Source.PEER, Source.REMOTE)


class DeviceView:
    """One device, with what stands on it added up."""

    __slots__ = (
        "busy", "bytes_total", "free", "idle", "models", "name", "ready_at", "room", "within_reach",
    )  # fmt: skip

    def __init__(
        self, state: DeviceState, replicas: Sequence[ReplicaState], seen_at: float
    ) -> None:
        here = [replica for replica in replicas if replica.size_on(state.name)]
        self.name = state.name
        self.bytes_total = state.bytes_total
        self.free = state.bytes_free
        self.ready_at = seen_at + max(state.loads_done_s, default=0.0)
        """When all queued loads are done."""
        self.idle = [replica for replica in here if replica.is_evictable]
        self.busy = [replica for replica in here if replica.is_movable]
        self.models = frozenset(replica.model for replica in here)
        self.room = self.free + sum(replica.size_on(self.name) for replica in self.idle)
        """Free now or by evicting idle replicas."""
        self.within_reach = self.room + sum(replica.size_on(self.name) for replica in self.busy)
        """Free if all running sessions moved; perhaps more than can be had."""


class NodeView:
    """One node's newest state and when it came."""

    __slots__ = (
        "by_model", "by_name", "devices", "free", "held", "is_busy", "link_ready_at", "node", "nvme_ready_at", "ready_at", "room", "seen_at", "state", "within_reach",
    )  # fmt: skip

    def __init__(self, state: NodeState, seen_at: float, old: "NodeView | None" = None) -> None:
        self.state = state
        self.node = state.node
        self.seen_at = seen_at
        self.nvme_ready_at = seen_at + state.nvme_done_s
        self.link_ready_at = seen_at + state.link_done_s
        self.devices = tuple(DeviceView(d, state.replicas, seen_at) for d in state.devices)
        self.by_name = {device.name: device for device in self.devices}
        self.held: dict[ModelId, HeldModel] = (
            old.held
            if old is not None and old.state.models is state.models
            else {held.model: held for held in state.models}
        )
        self.room = max((device.room for device in self.devices), default=0)
        """Of the roomiest device."""
        self.ready_at = min((device.ready_at for device in self.devices), default=math.inf)
        """When the first of the devices has no load queued."""
        self.free = max((device.free for device in self.devices), default=0)
        self.within_reach = max((device.within_reach for device in self.devices), default=0)
        self.is_busy = any(replica.sessions or replica.ready_s > 0 for replica in state.replicas)
        """It computes or loads."""
        self.by_model: dict[ModelId, list[ReplicaState]] = {}
        for replica in state.replicas:
            self.by_model.setdefault(replica.model, []).append(replica)

    def path_ready_at(self, source: Source) -> float:
        """Return when what all devices share of a path has no load queued."""
        if source is Source.NVME:
            return self.nvme_ready_at
        return self.link_ready_at if source in _BY_LINK else 0.0

    def has_ready(self, model: ModelId) -> bool:
        """Tell whether a replica is there to clone from."""
        return any(replica.ready_s <= 0 for replica in self.by_model.get(model, ()))
