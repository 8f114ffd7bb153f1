"""Where in the cluster a request starts soonest: one pure decision, with its reasons.

Ways are looked at by kind: a replica with a place; waiting for one that is full or still loading; a load
where memory is free, or free once idle replicas are evicted, over the quickest path (clone, DRAM, NVMe,
peer, remote); a load after running sessions have moved away (`cluster.moves`). Startup time is the wait
in the queue of the devices (the moves meanwhile) plus the load; one that is overdue under way is late
for as long again (`estimate.coming_s`), and serves nobody yet. The least wins; of equal ones the
kind that disturbs least, the emptier replica, then names, so all nodes decide alike on one state.

`decide` looks only at nodes that can still win, since a node's load time bounds it from below;
`explain` looks at all of them, and its first is what `decide` takes. The search for moves has limits,
and a decision that met one says so (`is_exact`). `decide_moves` is that search alone, for who allows
moves only where they win by enough.
"""

import heapq
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from typing import Final

from sllm_node.cluster.candidate import Candidate, Kind, PlacementRequest
from sllm_node.cluster.estimate import coming_s
from sllm_node.cluster.floors import ROUNDING
from sllm_node.cluster.move_search import cheapest_moves
from sllm_node.cluster.moves import Streams, evictions
from sllm_node.cluster.node_view import DeviceView, NodeView
from sllm_node.cluster.state import NodeId, ReplicaState
from sllm_node.cluster.view import ClusterView

NODES_MAX: Final = 64
"""Nodes on which one decision looks for moves, those first that could be soonest."""


@dataclass(frozen=True, slots=True)
class ServeHere:
    """A replica with a place: send the request there."""

    best: Candidate
    seen: tuple[Candidate, ...]
    """All that were looked at, `best` among them."""
    is_exact: bool = True
    """False: the search for moves met a limit (`NODES_MAX`, those in `moves`); there may be a better way."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Send the request there: its place comes before any other could be made."""

    best: Candidate
    seen: tuple[Candidate, ...]
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class LoadThere:
    """Evict what `best` says, load, serve."""

    best: Candidate
    seen: tuple[Candidate, ...]
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class MigrateThenLoad:
    """Move what `best` says, one after another, then evict, load, serve."""

    best: Candidate
    seen: tuple[Candidate, ...]
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class Reject:
    """There is no way now."""

    reason: str
    is_exact: bool = True


Decision = ServeHere | Wait | LoadThere | MigrateThenLoad | Reject
_KINDS: dict[Kind, type[ServeHere] | type[Wait] | type[LoadThere] | type[MigrateThenLoad]] = {
    Kind.SERVE: ServeHere, Kind.WAIT: Wait, Kind.LOAD: LoadThere, Kind.EVICT: LoadThere,
    Kind.MIGRATE: MigrateThenLoad,
}  # fmt: skip


def decide(
    view: ClusterView, request: PlacementRequest, now: float, *, may_move: bool = True,
    excluded: AbstractSet[NodeId] = frozenset(),
) -> Decision:  # fmt: skip
    """Return where the request starts soonest; only with `may_move` may running sessions go elsewhere.

    `excluded`: nodes that don't get it; sessions may move there.
    """
    seen = [c for c in _resident(view, request, now) if c.node not in excluded]
    best = min(seen, key=attrgetter("key"), default=None)
    least = Kind.LOAD if view.most_free >= request.share_bytes else Kind.EVICT
    for load_s, node in view.paths_with_room(request.model, request.share_bytes):
        if best and (load_s, least, 0.0, node) > best.key:
            break
        there = view.nodes[node]
        is_late = best and max(0.0, there.ready_at - now) + load_s > best.startup_s
        if is_late or node in excluded:
            continue
        for candidate in _loads(view, there, request, load_s, now, best):
            seen.append(candidate)
            if best is None or candidate.key < best.key:
                best = candidate
    is_exact = True
    if may_move and not (best and best.startup_s <= view.least_load_s(request.model)):
        # Moves disturb most: they win by being sooner, and many nodes are often as soon as the best.
        limit_s = math.nextafter(best.startup_s, 0.0) if best else math.inf
        moving, is_exact = _with_moves(view, request, now, limit_s, excluded)
        seen += moving
        best = min([best, *moving] if best else moving, key=attrgetter("key"), default=None)
    if best is None:
        return Reject(_why_not(view, request), is_exact)
    return _KINDS[best.kind](best, tuple(seen), is_exact)


def decide_moves(
    view: ClusterView, request: PlacementRequest, now: float, limit_s: float,
    excluded: AbstractSet[NodeId] = frozenset(),
) -> Candidate | None:  # fmt: skip
    """Return the soonest start within `limit_s` for which sessions move, all of them to other nodes.

    `excluded`: nodes that get neither the request nor sessions. None: there is none. Of a node counts
    its best way alone: where that one is not allowed, the node is passed over.
    """
    if limit_s < view.least_load_s(request.model):
        return None
    found, _ = _with_moves(view, request, now, limit_s, excluded, is_strict=True)
    return min(found, key=attrgetter("key"), default=None)


def _with_moves(
    view: ClusterView, request: PlacementRequest, now: float, limit_s: float,
    excluded: AbstractSet[NodeId], *, is_strict: bool = False,
) -> tuple[list[Candidate], bool]:  # fmt: skip
    """Return ways within `limit_s` if sessions move, the best among them, and whether no better one can be.

    With `is_strict` they go to other nodes, and to none that is excluded.
    """
    streams, found = Streams(view, now), list[Candidate]()
    by_floor = _by_floor(view, request, limit_s, excluded)
    for searched, (floor_s, node) in enumerate(by_floor):
        if floor_s > limit_s:
            break
        if searched == NODES_MAX:
            return found, False
        way = _migration(streams, view, view.nodes[node], request, limit_s, now)
        if way and not (is_strict and any(m.to.node in {node, *excluded} for m in way.moves)):
            found.append(way)
            limit_s = min(limit_s, way.startup_s)
    return found, streams.steps_left >= 0 and not streams.is_cut


def _by_floor(
    view: ClusterView, request: PlacementRequest, limit_s: float, excluded: AbstractSet[NodeId]
) -> Iterator[tuple[float, NodeId]]:
    """Yield the least that moves and load can take on each node within `limit_s`, least first."""
    size, shares, floors = request.share_bytes, request.shares, view.floors
    known = floors.on_nodes(size, shares)
    heap: list[tuple[float, NodeId]] = []
    for load_s, node in view.paths_within_reach(request.model, size):
        if load_s > limit_s:
            break
        while heap and heap[0][0] < load_s:
            yield heapq.heappop(heap)
        if node in excluded:
            continue
        floor_s = known.get(node)
        if floor_s is None:
            floor_s = floors.on_node(view.nodes[node], size, shares)
        if floor_s < math.inf and load_s + floor_s <= limit_s:
            heapq.heappush(heap, (load_s + floor_s, node))
    while heap:
        yield heapq.heappop(heap)


def explain(view: ClusterView, request: PlacementRequest, now: float) -> list[Candidate]:
    """Return the best way of each kind on every node, soonest first."""
    found = [*_resident(view, request, now), *loads(view, request, now)]
    streams = Streams(view, now)
    for _, node_id in view.paths(request.model):
        migration = _migration(streams, view, view.nodes[node_id], request, math.inf, now)
        found += [migration] if migration else []
    return sorted(found, key=attrgetter("key"))


def loads(view: ClusterView, request: PlacementRequest, now: float) -> list[Candidate]:
    """Return the best load on every node, and the best one that evicts: what moves nothing, soonest first."""
    found: list[Candidate] = []
    for load_s, node_id in view.paths(request.model):
        found += _loads(view, view.nodes[node_id], request, load_s, now)
    return sorted(found, key=attrgetter("key"))


def ways_on(
    view: ClusterView, request: PlacementRequest, node: NodeId, now: float
) -> list[Candidate]:
    """Return the ways on one node that move nothing, soonest first."""
    found = [c for c in _resident(view, request, now) if c.node == node]
    for load_s, name in view.paths(request.model):
        if name == node:
            found += _loads(view, view.nodes[name], request, load_s, now)
    return sorted(found, key=attrgetter("key"))


def _resident(view: ClusterView, request: PlacementRequest, now: float) -> Iterator[Candidate]:
    for node_id in view.resident(request.model):
        node = view.nodes[node_id]
        if node.state.is_draining:
            continue
        for replica in node.by_model[request.model]:
            age_s = max(0.0, now - node.seen_at)
            startup_s = _startup_s(replica, age_s)
            if startup_s is None:
                continue
            load_s = _away_s(replica, age_s)
            is_open = replica.free_slots > 0 and startup_s <= 0
            yield Candidate(
                Kind.SERVE if is_open else Kind.WAIT,
                startup_s,
                node_id,
                tuple(share.device for share in replica.shares),
                crowding=len(replica.sessions) / max(1, replica.slots),
                replica=replica.replica,
                wait_s=startup_s - load_s,
                load_s=load_s,
            )


def _startup_s(replica: ReplicaState, age_s: float) -> float | None:
    if replica.free_slots > 0:
        return _away_s(replica, age_s)
    if replica.next_free_s is None:
        return None
    return max(_away_s(replica, age_s), replica.next_free_s - age_s)


def _away_s(replica: ReplicaState, age_s: float) -> float:
    """Return how long until it decodes: above 0 as long as its node says that it comes."""
    return coming_s(replica.ready_s, age_s) if replica.ready_s > 0 else 0.0


def _loads(
    view: ClusterView, node: NodeView, request: PlacementRequest, load_s: float, now: float,
    best: Candidate | None = None,
) -> Iterator[Candidate]:  # fmt: skip
    """Yield the best load without evictions, and the best one if that evicts; only what beats `best`."""
    size, model = request.share_bytes, request.model
    if node.room < size:
        return
    source = view.path(model, node.node).source
    path_at = node.path_ready_at(source)
    fitting = [d for d in node.devices if d.room >= size and model not in d.models]
    free = [d for d in fitting if d.free >= size]
    evict_s = node.state.bandwidths.evict_s
    for devices, least_s in ((free, 0.0), (fitting, evict_s)):
        chosen = _soonest(devices, request.shares, now + least_s)
        if not chosen:
            continue
        is_free = all(d.free >= size for d in chosen)
        if is_free and devices is not free:
            continue
        names = tuple(d.name for d in chosen)
        wait_s = max(0.0, path_at - now, max(d.ready_at for d in chosen) - now)
        kind = Kind.LOAD if is_free else Kind.EVICT
        if not is_free:
            wait_s = max(wait_s, evict_s)
        if best and (wait_s + load_s, kind, 0.0, node.node, names) >= best.key:
            continue
        evicts = () if is_free else evictions(node, dict.fromkeys(names, size))
        yield Candidate(
            kind, wait_s + load_s, node.node, names,
            wait_s=wait_s, load_s=load_s, source=source, evicts=evicts,
        )  # fmt: skip


def _soonest(devices: list[DeviceView], count: int, now: float) -> list[DeviceView]:
    """Return the devices whose queues end soonest, first by name among equals; empty: too few."""
    if len(devices) < count:
        return []
    if count == 1:
        return [min(devices, key=lambda d: (max(d.ready_at, now), d.name))]
    last = sorted(max(d.ready_at, now) for d in devices)[count - 1]
    in_time = [d for d in devices if d.ready_at <= last]
    return sorted(in_time, key=lambda d: d.name)[:count]


def _migration(
    streams: Streams, view: ClusterView, node: NodeView, request: PlacementRequest,
    limit_s: float, now: float,
) -> Candidate | None:  # fmt: skip
    """Return the best load after moves on this node; None: there is none that starts within `limit_s`."""
    size, best = request.share_bytes, None
    path = view.path(request.model, node.node)
    path_at = node.path_ready_at(path.source)
    evict_s = node.state.bandwidths.evict_s
    after_s = evict_s + path.load_s
    for floor_s, names in _sets(view, node, request):
        chosen = [node.by_name[name] for name in names]
        queue_s = max(0.0, path_at - now, max(d.ready_at for d in chosen) - now)
        if floor_s > limit_s - after_s or queue_s > limit_s - path.load_s:
            continue
        needs = dict.fromkeys(names, size)
        found = cheapest_moves(streams, node, needs, request.priority, limit_s - after_s)
        if found is None:
            continue
        cost_s, moves = found
        wait_s = max(queue_s, cost_s + evict_s)
        evicts = evictions(node, needs, leaving=[move.replica for move in moves])
        candidate = Candidate(
            Kind.MIGRATE, wait_s + path.load_s, node.node, names,
            wait_s=wait_s, load_s=path.load_s, source=path.source, evicts=evicts, moves=moves,
        )  # fmt: skip
        if best is None or candidate.key < best.key:
            best, limit_s = candidate, candidate.startup_s
    return best


def _sets(
    view: ClusterView, node: NodeView, request: PlacementRequest
) -> list[tuple[float, tuple[str, ...]]]:
    """Return the sets of devices on which moves could make room, with what they cost at least."""
    size, model = request.share_bytes, request.model
    floors = view.floors.on_devices(node, size, is_split=request.shares > 1)
    usable = [d for d in node.devices if floors[d.name] < math.inf and model not in d.models]
    if request.shares == 1:
        return sorted((floors[d.name], (d.name,)) for d in usable if d.room < size)
    return sorted(
        (ROUNDING * sum(floors[d.name] for d in chosen), tuple(d.name for d in chosen))
        for chosen in combinations(sorted(usable, key=attrgetter("name")), request.shares)
        if any(d.room < size for d in chosen)
    )


def _why_not(view: ClusterView, request: PlacementRequest) -> str:
    model = request.model
    if not view.is_known(model):
        return f"no node has or can fetch model {model!r}"
    if not any(True for _ in view.paths(model)):
        return f"no node that takes requests can load model {model!r}"
    nodes = (view.nodes[node] for _, node in view.paths(model))
    if not any(
        sum(d.bytes_total >= request.share_bytes for d in node.devices) >= request.shares
        for node in nodes
    ):
        what = f"{request.shares} devices with {request.share_bytes} bytes each"
        return f"no node has {what} for model {model!r}"
    return f"all devices that model {model!r} fits on are taken by sessions that can't move now"
