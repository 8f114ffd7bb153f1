"""The cluster as one node sees it: the newest state of every node, indexed for placement.

`update` takes a state and marks what depends on it; a model's list of load paths, quickest first, is
brought up to date when it is next asked for. So a decision looks at the few nodes that can win, not
at all of them (`scripts/bench/placement.py` measures it). Absolute times are in the viewer's clock.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Final

from sllm_node.cluster.estimate import RESUME_GUESS, LoadPath, load_path, send_rate
from sllm_node.cluster.state import (
    Bandwidths,
    DeviceState,
    HeldModel,
    NodeId,
    NodeState,
    ReplicaState,
    ResumeFit,
)
from sllm_node.core.types import ModelId

Slot = tuple[NodeId, str]
"""A device of the cluster: what a decision promises at most once."""

_FEW: Final = 8
"""Nodes: that many are looked up one by one, of more the list is walked."""


class DeviceView:
    """One device, with what stands on it added up."""

    __slots__ = ("busy", "bytes_total", "free", "idle", "models", "name", "ready_at", "room")

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


class NodeView:
    """One node's newest state and when it came."""

    __slots__ = ("by_model", "by_name", "devices", "held", "node", "room", "seen_at", "state")

    def __init__(self, state: NodeState, seen_at: float) -> None:
        self.state = state
        self.node = state.node
        self.seen_at = seen_at
        self.devices = tuple(DeviceView(d, state.replicas, seen_at) for d in state.devices)
        self.by_name = {device.name: device for device in self.devices}
        self.held = {held.model: held for held in state.models}
        self.room = max((device.room for device in self.devices), default=0)
        """Of the roomiest device."""
        self.by_model: dict[ModelId, list[ReplicaState]] = {}
        for replica in state.replicas:
            self.by_model.setdefault(replica.model, []).append(replica)

    def has_ready(self, model: ModelId) -> bool:
        """Tell whether a replica is there to clone from."""
        return any(replica.ready_s <= 0 for replica in self.by_model.get(model, ()))


class _ModelIndex:
    """What is known of one model over all nodes."""

    __slots__ = (
        "by_node",
        "entries",
        "free_slots",
        "holders",
        "least_fit",
        "rates",
        "resident",
        "stale",
    )

    def __init__(self) -> None:
        self.entries: list[tuple[float, NodeId]] = []
        self.by_node: dict[NodeId, LoadPath] = {}
        self.stale: set[NodeId] = set()
        """Nodes whose entry is to be made anew."""
        self.rates: dict[NodeId, float] = {}
        """What each node could send at; those that could not are absent."""
        self.holders: dict[NodeId, HeldModel] = {}
        self.resident: set[NodeId] = set()
        """Nodes that have replicas of it, ready or not."""
        self.free_slots: int | None = None
        """Most places that one replica has free; None: to be looked up."""
        self.least_fit: ResumeFit | None = None
        """Not above that of any node; None: to be looked up."""

    @property
    def peer_rate(self) -> float:
        """Return the best rate; a node that sends needs no peer, so it is never its own."""
        return max(self.rates.values(), default=0.0)

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Return decoded and stored bytes as the first node by name lists them, for those that don't."""
        if not self.holders:
            return None
        first = self.holders[min(self.holders)]
        return first.bytes_decoded, first.bytes_stored


class ClusterView:
    """All nodes; feed it with `update` and `remove`, then ask."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, NodeView] = {}
        self._models: dict[ModelId, _ModelIndex] = {}
        self._rooms: list[tuple[int, NodeId]] | None = None
        """Nodes by the room of their roomiest device; None: to be made anew, as are the next two."""
        self._reachable: dict[NodeId, dict[str, int]] = {}
        self._reaches: list[tuple[int, NodeId]] | None = None
        """Nodes by the most that moves could free on a device."""

    def update(self, state: NodeState, now: float) -> bool:
        """Take a state that came at `now`; tell whether it was newer than the one known."""
        old = self.nodes.get(state.node)
        if old and old.state.boot == state.boot and old.state.version >= state.version:
            return False
        self.refresh(state, now)
        return True

    def refresh(self, state: NodeState, now: float) -> None:
        """Take a state as it is: one that came with a refusal, less what its node has promised."""
        old = self.nodes.get(state.node)
        view = NodeView(state, now)
        self.nodes[state.node] = view
        self._index(state.node, old, view)

    def remove(self, node: NodeId) -> None:
        """Forget a node that left or died."""
        old = self.nodes.pop(node, None)
        if old:
            self._index(node, old, None)

    def paths(self, model: ModelId) -> list[tuple[float, NodeId]]:
        """Return (load_s, node) of all nodes that can load it and take requests, quickest first."""
        index = self._models.get(model)
        if index is None:
            return []
        if index.stale:
            self._refresh(model, index)
        return index.entries

    def path(self, model: ModelId, node: NodeId) -> LoadPath:
        """Return how `node` would load it; it must be one of `paths`."""
        return self._models[model].by_node[node]

    def paths_with_room(self, model: ModelId, size: int) -> list[tuple[float, NodeId]]:
        """Return those of `paths` that matter to who needs so many bytes of a device; perhaps more."""
        if self._rooms is None:
            self._rooms = sorted((node.room, name) for name, node in self.nodes.items())
        return self._paths_among(self._rooms, model, size)

    def paths_within_reach(self, model: ModelId, size: int) -> list[tuple[float, NodeId]]:
        """Return those where moves and evictions might free so many bytes of a device; perhaps more."""
        return self._paths_among(self._reach_order(), model, size)

    def reachable(self, node: NodeId) -> dict[str, int]:
        """Return for each device the bytes that are free once all has left that might find a place."""
        self._reach_order()
        return self._reachable[node]

    def least_move_s(self, replica: ReplicaState) -> float:
        """Return a time that moving it takes at least, without its resume times; infinite: no place."""
        if self._most_free_slots(replica.model) >= len(replica.sessions):
            return 0.0
        paths = self.paths_with_room(replica.model, replica.shares[0].size)
        return paths[0][0] if paths else math.inf

    def least_resume(self, model: ModelId) -> ResumeFit:
        """Return what no node resumes sessions of the model quicker than."""
        index = self._models[model]
        if index.least_fit is None:
            fits = [held.resume or RESUME_GUESS for held in index.holders.values()]
            fits.append(RESUME_GUESS)
            least_a = min(fit.a_s_per_token for fit in fits)
            index.least_fit = ResumeFit(least_a, min(fit.b_s for fit in fits))
        return index.least_fit

    def _paths_among(
        self, order: list[tuple[int, NodeId]], model: ModelId, size: int
    ) -> list[tuple[float, NodeId]]:
        first = bisect_left(order, size, key=itemgetter(0))
        if first == len(order):
            return []
        paths = self.paths(model)
        if len(order) - first > _FEW or not paths:
            return paths
        by_node = self._models[model].by_node
        return sorted((by_node[name].load_s, name) for _, name in order[first:] if name in by_node)

    def _reach_order(self) -> list[tuple[int, NodeId]]:
        if self._reaches is None:
            self._reachable = {name: self._reach(view) for name, view in self.nodes.items()}
            most = (
                (max(sizes.values(), default=0), name) for name, sizes in self._reachable.items()
            )
            self._reaches = sorted(most)
        return self._reaches

    def _reach(self, node: NodeView) -> dict[str, int]:
        return {
            device.name: device.room
            + sum(r.size_on(device.name) for r in device.busy if self.least_move_s(r) < math.inf)
            for device in node.devices
        }

    def _most_free_slots(self, model: ModelId) -> int:
        index = self._models[model]
        if index.free_slots is None:
            index.free_slots = max(
                replica.free_slots
                for name in index.resident
                for replica in self.nodes[name].by_model[model]
            )
        return index.free_slots

    def resident(self, model: ModelId) -> Sequence[NodeId]:
        """Return the nodes that have replicas of it, in order."""
        index = self._models.get(model)
        return sorted(index.resident) if index else ()

    def is_known(self, model: ModelId) -> bool:
        """Tell whether any node lists it or serves it."""
        index = self._models.get(model)
        return bool(index and (index.holders or index.resident))

    def _index(self, node: NodeId, old: NodeView | None, new: NodeView | None) -> None:
        self._rooms = self._reaches = None
        models: set[ModelId] = set()
        for view in (old, new):
            if view:
                models.update(view.held)
                models.update(view.by_model)
        is_same = bool(
            old and new and old.state.bandwidths == new.state.bandwidths
            and old.state.is_draining == new.state.is_draining
        )  # fmt: skip
        if old is None or new is None or not is_same:
            models.update(self._models)
        for model in models:
            index = self._models.setdefault(model, _ModelIndex())
            self._index_model(model, index, old if is_same else None, new, node)
            if not (index.holders or index.resident):
                del self._models[model]

    def _index_model(
        self, model: ModelId, index: _ModelIndex, same: NodeView | None, new: NodeView | None,
        node: NodeId,
    ) -> None:  # fmt: skip
        index.free_slots = None
        held = new.held.get(model) if new else None
        if new and model in new.by_model:
            index.resident.add(node)
        else:
            index.resident.discard(node)
        if (
            same and new and same.held.get(model) == held
            and same.has_ready(model) == new.has_ready(model)
        ):  # fmt: skip
            return
        index.stale.add(node)
        rate = send_rate(held, new.state.bandwidths) if held and new else 0.0
        index.least_fit = None
        before = index.peer_rate, index.sizes
        if held:
            index.holders[node] = held
        else:
            index.holders.pop(node, None)
        if rate > 0:
            index.rates[node] = rate
        else:
            index.rates.pop(node, None)
        if before != (index.peer_rate, index.sizes):
            index.stale.update(self.nodes)

    def _refresh(self, model: ModelId, index: _ModelIndex) -> None:
        peer_rate = index.peer_rate
        sizes = index.sizes
        for node in index.stale:
            old = index.by_node.pop(node, None)
            if old:
                del index.entries[bisect_left(index.entries, (old.load_s, node))]
            view = self.nodes.get(node)
            if view is None or view.state.is_draining or sizes is None:
                continue
            held = view.held.get(model) or HeldModel(model, *sizes)
            path = load_path(
                held, _bandwidths(view, model), peer_rate=peer_rate,
                has_replica=view.has_ready(model),
            )  # fmt: skip
            if path.load_s < math.inf:
                index.by_node[node] = path
                insort(index.entries, (path.load_s, node))
        index.stale.clear()


def _bandwidths(view: NodeView, model: ModelId) -> Bandwidths:
    """Return those that count for a model: a remote has only what the node lists."""
    bandwidths = view.state.bandwidths
    return bandwidths if model in view.held else replace(bandwidths, remote=0.0)
