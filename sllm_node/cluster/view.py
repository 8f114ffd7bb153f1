"""The cluster as one node sees it: the newest state of every node, indexed for placement.

`update` takes a state and marks what depends on it; a model's load paths, quickest first, are brought
up to date when they are next asked for: one entry for each node that has something of the model, and for all
others one for each rate that they can fetch it at. So a decision looks at the few nodes that can win,
and news of a node costs what has changed in it, however many nodes there are
(`scripts/bench/placement.py` measures it). Absolute times are in the viewer's clock.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Final

from sllm_node.cluster.estimate import RESUME_GUESS, LoadPath, Source, load_path, send_rate
from sllm_node.cluster.floors import Floors
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.state import (
    Bandwidths,
    HeldModel,
    NodeId,
    NodeState,
    ResumeFit,
)
from sllm_node.core.types import ModelId, Weights

Slot = tuple[NodeId, str]
"""A device of the cluster: what a decision promises at most once."""

_FEW: Final = 8
"""Nodes: that many are looked up one by one, of more the list is walked."""


class _ModelIndex:
    """What is known of one model over all nodes."""

    __slots__ = (
        "by_node",
        "entries",
        "far",
        "far_of",
        "far_version",
        "free_slots",
        "holders",
        "least_fit",
        "rates",
        "resident",
        "stale",
    )

    def __init__(self) -> None:
        self.entries: list[tuple[float, NodeId]] = []
        """Of nodes that have something of it, quickest first."""
        self.far: list[tuple[float, list[NodeId]]] = []
        """Of all nodes as if they had nothing of it: those of one load time together."""
        self.far_of: dict[NodeId, LoadPath] = {}
        """The paths behind `far`, of nodes for which they were asked."""
        self.far_version = -1
        """Of the nodes' rates when `far` was made; -1: it is to be made anew."""
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
        self._frees: list[tuple[int, NodeId]] = []
        """Nodes by what is free on their device that has most."""
        self._rooms: list[tuple[int, NodeId]] = []
        """Nodes by the room of their roomiest device."""
        self._reaches: list[tuple[int, NodeId]] = []
        """Nodes by the most that moves could free on a device, if all found a place."""
        self.floors = Floors(self)
        """What moves cost at least, as far as it was asked for since the last news."""
        self._rates: dict[Bandwidths, list[NodeId]] = {}
        """Nodes that take requests by their bandwidths, without remotes."""
        self._rates_version = 0

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
        view = NodeView(state, now, old)
        self.nodes[state.node] = view
        self._index(state.node, old, view)

    def remove(self, node: NodeId) -> None:
        """Forget a node that left or died."""
        old = self.nodes.pop(node, None)
        if old:
            self._index(node, old, None)

    def paths(self, model: ModelId) -> Iterator[tuple[float, NodeId]]:
        """Yield (load_s, node) of all nodes that can load it and take requests, quickest first."""
        index = self._fresh(model)
        if index is None:
            return iter(())
        here = index.resident.union(index.holders)
        far = ((load_s, n) for load_s, names in index.far for n in names if n not in here)
        return heapq.merge(index.entries, far)

    def path(self, model: ModelId, node: NodeId) -> LoadPath:
        """Return how `node` would load it; it must be one of `paths`."""
        index = self._models[model]
        return index.by_node.get(node) or self._far_path(index, self.nodes[node])

    def unfit(
        self, model: ModelId, tokens: int, weights: Weights | None = None
    ) -> frozenset[NodeId]:
        """Return the nodes that tell that a session can't have so many tokens there, or of other weights."""
        index = self._models.get(model)
        if index is None or not (tokens or weights):
            return frozenset()
        return frozenset(
            node for node, held in index.holders.items()
            if 0 < held.context_tokens < tokens or (weights and not weights.is_same(held.weights))
        )  # fmt: skip

    @property
    def most_free(self) -> int:
        """Return the bytes that are free on the device that has most."""
        return self._frees[-1][0] if self._frees else 0

    @property
    def most_room(self) -> int:
        """Return the bytes that are free on some device once idle replicas have left, at most."""
        return self._rooms[-1][0] if self._rooms else 0

    def paths_with_room(self, model: ModelId, size: int) -> Iterable[tuple[float, NodeId]]:
        """Return those of `paths` that matter to who needs so many bytes of a device; perhaps more."""
        return self._paths_among(self._rooms, model, size)

    def paths_within_reach(self, model: ModelId, size: int) -> Iterable[tuple[float, NodeId]]:
        """Return those where moves and evictions might free so many bytes of a device; perhaps more."""
        return self._paths_among(self._reaches, model, size)

    def least_load_s(self, model: ModelId) -> float:
        """Return the load time of the quickest path; infinite: there is none."""
        index = self._fresh(model)
        if index is None:
            return math.inf
        near_s = index.entries[0][0] if index.entries else math.inf
        return min(near_s, index.far[0][0] if index.far else math.inf)

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
    ) -> Iterable[tuple[float, NodeId]]:
        first = bisect_left(order, size, key=itemgetter(0))
        if first == len(order):
            return ()
        if len(order) - first > _FEW:
            return self.paths(model)
        index = self._fresh(model)
        if index is None:
            return ()
        found = ((self._load_s(index, model, name), name) for _, name in order[first:])
        return sorted(path for path in found if path[0] < math.inf)

    def _load_s(self, index: _ModelIndex, model: ModelId, name: NodeId) -> float:
        """Return the load time on a node; infinite: it can't, or takes no requests."""
        view = self.nodes[name]
        if view.state.is_draining:
            return math.inf
        if model in view.held or model in view.by_model:
            path = index.by_node.get(name)
            return path.load_s if path else math.inf
        return self._far_path(index, view).load_s

    def most_free_slots(self, model: ModelId) -> int:
        """Return the most places that one replica of it has free; there must be one."""
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
        self._index_room(node, old, new)
        is_same = bool(
            old and new and old.state.bandwidths == new.state.bandwidths
            and old.state.is_draining == new.state.is_draining
        )  # fmt: skip
        if not is_same:
            self._index_rates(node, old, new)
        for model in _touched(old, new, is_same=is_same):
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
            and (model in same.by_model) == (model in new.by_model)
        ):  # fmt: skip
            return
        index.stale.add(node)
        index.least_fit = None
        rate = send_rate(held, new.state.bandwidths) if held and new else 0.0
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
            index.far_version = -1
            index.stale.update(index.holders)
            index.stale.update(index.resident)

    def _index_room(self, node: NodeId, old: NodeView | None, new: NodeView | None) -> None:
        """Keep the nodes in order of what is free on them or could be."""
        self.floors.clear()
        for order, name in (
            (self._frees, "free"), (self._rooms, "room"), (self._reaches, "within_reach"),
        ):  # fmt: skip
            before = getattr(old, name) if old else None
            after = getattr(new, name) if new else None
            if before == after:
                continue
            if before is not None:
                del order[bisect_left(order, (before, node))]
            if after is not None:
                insort(order, (after, node))

    def _index_rates(self, node: NodeId, old: NodeView | None, new: NodeView | None) -> None:
        """Keep the nodes by the rates at which they fetch what they don't have."""
        self._rates_version += 1
        if old and not old.state.is_draining:
            rates = replace(old.state.bandwidths, remote=0.0)
            self._rates[rates].remove(node)
            if not self._rates[rates]:
                del self._rates[rates]
        if new and not new.state.is_draining:
            insort(self._rates.setdefault(replace(new.state.bandwidths, remote=0.0), []), node)

    def _fresh(self, model: ModelId) -> _ModelIndex | None:
        """Return what is known of a model, its paths brought up to date."""
        index = self._models.get(model)
        if index is None:
            return None
        if index.stale:
            self._refresh(model, index)
        if index.far_version != self._rates_version:
            index.far_version = self._rates_version
            self._refresh_far(index)
        return index

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
            if model not in view.held and model not in view.by_model:
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

    def _refresh_far(self, index: _ModelIndex) -> None:
        """Group the nodes by how long they take to load a model of which they have nothing."""
        index.far_of.clear()
        by_time: dict[float, list[NodeId]] = {}
        for names in self._rates.values():
            load_s = self._far_path(index, self.nodes[names[0]]).load_s
            if load_s < math.inf:
                by_time[load_s] = sorted([*by_time.get(load_s, ()), *names])
        index.far = sorted(by_time.items())

    def _far_path(self, index: _ModelIndex, view: NodeView) -> LoadPath:
        """Return how a node would load what it has nothing of."""
        found = index.far_of.get(view.node)
        if found is None:
            sizes = index.sizes
            if sizes is None:
                return LoadPath(math.inf, Source.PEER)
            held, rates = HeldModel(ModelId(""), *sizes), replace(view.state.bandwidths, remote=0.0)
            found = load_path(held, rates, peer_rate=index.peer_rate, has_replica=False)
            index.far_of[view.node] = found
        return found


def _touched(old: NodeView | None, new: NodeView | None, *, is_same: bool) -> list[ModelId]:
    """Return the models that news of a node may matter to."""
    before, after = (old.held if old else {}), (new.held if new else {})
    touched: dict[ModelId, None] = {}
    if before is not after or not is_same:
        for model in {**before, **after}:
            if not is_same or before.get(model) is not after.get(model):
                touched[model] = None
    for view in (old, new):
        if view:
            touched.update(dict.fromkeys(view.by_model))
    return list(touched)


def _bandwidths(view: NodeView, model: ModelId) -> Bandwidths:
    """Return those that count for a model: a remote has only what the node lists."""
    bandwidths = view.state.bandwidths
    return bandwidths if model in view.held else replace(bandwidths, remote=0.0)
