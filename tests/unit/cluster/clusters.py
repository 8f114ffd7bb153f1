"""Small random clusters, and their placement by trying everything: slow, short, and made differently.

Every figure is a small multiple of a power of two, so sums are exact and ties are real ties.
"""

from dataclasses import dataclass, replace
from itertools import combinations, product
from math import inf
from random import Random

from sllm_node.cluster.candidate import PlacementRequest
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
)  # fmt: skip
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, SessionId

TOTAL = 32


def random_model_sizes(rng: Random) -> dict[ModelId, tuple[int, int, int]]:
    """Return share size, number of shares and stored size of two to five models."""
    sizes = {}
    for i in range(rng.randint(2, 5)):
        shares = 2 if rng.random() < 0.25 else 1
        size = rng.choice([4, 8, 12, 16, 20, 24])
        stored = rng.choice([size * shares, size * shares // 4 * 3])
        sizes[ModelId(f"m{i}")] = (size, shares, stored)
    return sizes


def random_node(rng: Random, name: str, sizes) -> NodeState:
    names = [f"d{i}" for i in range(rng.randint(1, 3))]
    free = dict.fromkeys(names, TOTAL)
    replicas = []
    for number in range(rng.randint(0, 2 * len(names) + 1)):
        model = rng.choice(list(sizes))
        size, shares, _ = sizes[model]
        taken = {s.device for r in replicas if r.model == model for s in r.shares}
        fitting = [d for d in names if free[d] >= size and d not in taken]
        if len(fitting) < shares:
            continue
        devices = sorted(rng.sample(fitting, shares))
        for device in devices:
            free[device] -= size
        replicas.append(random_replica(rng, f"r{number}", model, size, devices))
    states = tuple(
        DeviceState(d, TOTAL, free[d], tuple(rng.choice([(), (), (0.5,), (1.0, 2.0)])))
        for d in names
    )
    held = tuple(
        HeldModel(
            m, size * shares, stored, rng.choice([0, stored // 2, stored, stored]),
            rng.choice([0, stored, stored]),
            rng.choice([ResumeFit(1 / 64, 1 / 8), ResumeFit(1 / 32, 1 / 4), ResumeFit(0.0, 1 / 2)]),
        )
        for m, (size, shares, stored) in sizes.items() if rng.random() < 0.8
    )  # fmt: skip
    bandwidths = Bandwidths(
        rng.choice([16, 32]), rng.choice([8, 16, 32]), rng.choice([4, 8]), rng.choice([1, 2, 4]),
        rng.choice([0, 1, 2]), rng.choice([0, 0, 0.5]), evict_s=(0.0, 0.25, 2.0)[len(replicas) % 3],
    )  # fmt: skip
    return NodeState(
        NodeId(name), BootId("b"), 1, states, bandwidths, held, tuple(replicas),
        is_draining=rng.random() < 0.1,
    )  # fmt: skip


def crowded_node(rng: Random, name: str, sizes) -> NodeState:
    """Return a node whose devices are full of small busy replicas, so that several must move."""
    node = random_node(rng, name, sizes)
    models = [model for model, (size, shares, _) in sizes.items() if size <= 12 and shares == 1]
    replicas = []
    devices = []
    for device in node.devices:
        free = device.bytes_total
        for model in rng.sample(models, len(models)):
            if sizes[model][0] <= free:
                number = f"r{len(replicas)}"
                replica = random_replica(rng, number, model, sizes[model][0], [device.name])
                replicas.append(replica)
                free -= sizes[model][0]
        devices.append(replace(device, bytes_free=free))
    return replace(node, devices=tuple(devices), replicas=tuple(replicas), is_draining=False)


def crowded_cluster(rng: Random) -> tuple[list[NodeState], PlacementRequest]:
    """Return a cluster with a crowded node or two, and a request for a model that is large."""
    sizes = {ModelId(f"m{i}"): (size := rng.choice([8, 12]), 1, size) for i in range(3)}
    shares = rng.choice([1, 1, 2])
    large = rng.choice([20, 24, 28])
    sizes[ModelId("large")] = (large, shares, large * shares)
    nodes = [crowded_node(rng, "n0", sizes)]
    nodes += [
        rng.choice([crowded_node, random_node])(rng, f"n{i}", sizes)
        for i in range(1, rng.randint(2, 3))
    ]
    return nodes, PlacementRequest(ModelId("large"), large, shares, 1)


def tight_cluster(rng: Random) -> tuple[list[NodeState], PlacementRequest]:
    """Return nodes full of busy replicas, with room for few of those on a few devices: all want it."""
    sizes = {ModelId(f"m{i}"): (rng.choice([8, 8, 12]), 1) for i in range(6)}
    if rng.random() < 0.3:
        sizes[ModelId("split")] = (8, 2)
    large, shares = rng.choice([20, 24, 28]), rng.choice([1, 1, 2])
    all_sizes = {
        **{model: (size, count, size * count) for model, (size, count) in sizes.items()},
        ModelId("large"): (large, shares, large * shares),
    }
    nodes = [tight_node(rng, f"n{i}", sizes, all_sizes) for i in range(rng.randint(3, 5))]
    return nodes, PlacementRequest(ModelId("large"), large, shares, 1)


def tight_node(rng: Random, name: str, sizes, all_sizes) -> NodeState:
    node = random_node(rng, name, all_sizes)
    names = [f"d{i}" for i in range(rng.randint(2, 4))]
    spare = [device for device in names if rng.random() < 0.4]
    free = {device: rng.choice([8, 12, 16]) if device in spare else TOTAL for device in names}
    replicas = []
    for device in names:
        if device in spare:
            continue
        for model in rng.sample(list(sizes), len(sizes)):
            size, count = sizes[model]
            able = [
                d for d in names
                if free[d] >= size and d not in spare and not any(
                    r.model == model and r.size_on(d) for r in replicas
                )
            ]  # fmt: skip
            if device not in able or len(able) < count:
                continue
            devices = sorted([device, *[d for d in able if d != device][: count - 1]])
            for used in devices:
                free[used] -= size
            number = f"r{len(replicas)}"
            replica = random_replica(rng, number, model, size, devices)
            if not replica.sessions:
                session = SessionState(SessionId(f"{number}s"), 8, rng.choice([0, 8, 32]))
                replica = replace(replica, sessions=(session,), ready_s=0.0)
            replicas.append(replace(replica, slots=max(1, len(replica.sessions)), is_pinned=False))
    states = tuple(
        DeviceState(d, TOTAL, free[d], tuple(rng.choice([(), (), (0.5,)]))) for d in names
    )
    return replace(node, devices=states, replicas=tuple(replicas), is_draining=False)


def random_replica(rng, name, model, size, devices) -> ReplicaState:
    slots = rng.choice([1, 1, 2, 4])
    is_loading = rng.random() < 0.1
    running = 0 if is_loading else rng.choice([0, slots, slots, rng.randint(0, slots)])
    sessions = tuple(
        SessionState(
            SessionId(f"{name}s{i}"), rng.choice([8, 16]), rng.choice([0, 8, 32]),
            rng.choice([0.0, 4.0]), rng.choice([0, 0, 0, 1]),
        )
        for i in range(running)
    )  # fmt: skip
    return ReplicaState(
        ReplicaId(name), model, tuple(DeviceShare(d, size) for d in devices), slots, sessions,
        rng.choice([1.0, 4.0]) if is_loading else 0.0, rng.choice([None, 2.0, 8.0, 16.0]),
        rng.choice([0.0, 5.0]), is_pinned=rng.random() < 0.1,
    )  # fmt: skip


def random_cluster(rng: Random) -> tuple[list[NodeState], PlacementRequest]:
    sizes = random_model_sizes(rng)
    nodes = [random_node(rng, f"n{i}", sizes) for i in range(rng.randint(2, 4))]
    model = rng.choice(list(sizes))
    size, shares, _ = sizes[model]
    return nodes, PlacementRequest(model, size, shares, rng.choice([0, 0, 1]))


def viewed(nodes, now=0.0):
    view = ClusterView()
    for node in nodes:
        view.update(node, now)
    return view


def one_node(*, total=32, free=0, replicas=(), name="n0", dram=8, is_draining=False):
    held = (HeldModel(ModelId("a"), 8, 8, dram, 8), HeldModel(ModelId("b"), 8, 8, 8, 8))
    return NodeState(
        NodeId(name), BootId("b"), 1, (DeviceState("d0", total, free),), Bandwidths(8, 8, 8, 1),
        held, tuple(replicas), is_draining,
    )  # fmt: skip


def busy(model, size, name="r0", priority=0, **rest):
    sessions = (SessionState(SessionId("s"), 10, 10, priority=priority),)
    shares = (DeviceShare("d0", size),)
    return ReplicaState(ReplicaId(name), ModelId(model), shares, 1, sessions, **rest)


@dataclass
class Brute:
    """Tries everything; states were seen `age` seconds ago."""

    nodes: list[NodeState]
    age: float

    def best(self, request: PlacementRequest):
        """Return (startup, rank, crowding, node, devices, replica) of the best way; None: none."""
        return min(self.ways(request), default=None)

    def best_of_each(self, request: PlacementRequest):
        """Return the best load, load after evictions and load after moves of every node."""
        found = {}
        for way in sorted(self.ways(request), reverse=True):
            if way[1] >= 2:
                found[way[3], way[1]] = way
        return found

    def ways(self, request: PlacementRequest):
        """Return every way."""
        ways = [*self.resident(request)]
        for node in self.nodes:
            load_s = self.load_s(node, request.model)
            if node.is_draining or load_s == inf:
                continue
            for devices in self.targets(node, request.model, request.shares):
                ways += self.on(node, devices, load_s, request)
        return ways

    def resident(self, request):
        for node in self.nodes:
            for r in node.replicas:
                if node.is_draining or r.model != request.model:
                    continue
                is_full = len(r.sessions) >= r.slots
                if is_full and r.next_free_s is None:
                    continue
                late = self.age - r.ready_s
                load = (late if late > 1 else max(0.001, -late)) if r.ready_s else 0
                wait = max(0, load, ((r.next_free_s or 0.0) - self.age) if is_full else 0)
                crowding = len(r.sessions) / r.slots
                devices = tuple(s.device for s in r.shares)
                yield (wait, int(is_full or wait > 0), crowding, node.node, devices, r.replica)

    def on(self, node, devices, load_s, request):
        """Yield the ways to load there, or nothing."""
        queue = self.queue(node, devices)
        free = self.free(node, devices)
        idle = [r for r in node.replicas if r.is_evictable]
        busy = [
            r for r in node.replicas if r.is_movable and self.touches(r, devices)
            and all(s.priority <= request.priority for s in r.sessions)
        ]  # fmt: skip
        need = request.share_bytes
        if all(free[d] >= need for d in devices):
            yield (queue + load_s, 2, 0.0, node.node, devices, "")
            return
        roomy = {d: free[d] + sum(r.size_on(d) for r in idle) for d in devices}
        if all(roomy[d] >= need for d in devices):
            yield (max(queue, node.bandwidths.evict_s) + load_s, 3, 0.0, node.node, devices, "")
            return
        costs = []
        for count in range(1, len(busy) + 1):
            for gone in combinations(busy, count):
                if all(roomy[d] + sum(r.size_on(d) for r in gone) >= need for d in devices):
                    costs.append(self.moves_cost(node, devices, gone))
        cost = min(costs, default=inf)
        if cost < inf:
            cost += node.bandwidths.evict_s
            yield (max(queue, cost) + load_s, 4, 0.0, node.node, devices, "")

    def moves_cost(self, node, devices, gone):
        taken = {(node.node, d) for d in devices}
        best = inf
        for tos in product(*(self.destinations(node, r) for r in gone)):
            slots = [slot for _, where in tos for slot in where]
            if len(set(slots)) == len(slots) and not taken & set(slots):
                best = min(best, sum(cost for cost, _ in tos))
        return best

    def destinations(self, home, replica):
        found = []
        for node in self.nodes:
            if node.is_draining:
                continue
            held = [h for h in node.models if h.model == replica.model]
            fit = (held[0].resume if held else None) or ResumeFit(2e-4, 0.05)
            tokens = [
                s.tokens_in + s.tokens_out + s.tokens_per_s * self.age for s in replica.sessions
            ]
            resume = sum(fit.a_s_per_token * t + fit.b_s for t in tokens)
            for other in node.replicas:
                if other.model == replica.model and (node, other) != (home, replica) \
                        and not other.ready_s \
                        and other.slots - len(other.sessions) >= len(replica.sessions):  # fmt: skip
                    found.append((resume, [(node.node, s.device) for s in other.shares]))
            load_s = self.load_s(node, replica.model)
            size = replica.shares[0].size
            for devices in self.targets(node, replica.model, len(replica.shares)):
                free = self.free(node, devices)
                idle = [r for r in node.replicas if r.is_evictable]
                if load_s < inf and all(
                    free[d] + sum(r.size_on(d) for r in idle) >= size for d in devices
                ):
                    is_free = all(free[d] >= size for d in devices)
                    wait = max(self.queue(node, devices), 0 if is_free else node.bandwidths.evict_s)
                    cost = wait + load_s + resume
                    found.append((cost, [(node.node, d) for d in devices]))
        return found

    def load_s(self, node, model):
        b = node.bandwidths
        lists = [h for n in self.nodes for h in n.models if h.model == model]
        if not lists:
            return inf
        own = [h for h in node.models if h.model == model]
        dram, nvme = (own[0].bytes_dram, own[0].bytes_nvme) if own else (0, 0)
        stored, decoded = lists[0].bytes_stored, lists[0].bytes_decoded
        senders = [0.0]
        for other in self.nodes:
            for h in other.models:
                if other is not node and h.model == model:
                    if h.bytes_dram == stored:
                        senders.append(other.bandwidths.dram)
                    elif h.bytes_nvme == stored:
                        senders.append(other.bandwidths.nvme)
        far = max(min(b.peer, max(senders)), b.remote if own else 0)
        times = [stored / b.dram, max(0, nvme - dram) / b.nvme]
        missing = stored - max(dram, nvme)
        if missing:
            times.append(missing / far if far else inf)
        if stored != decoded:
            times.append(decoded / b.decode)
        if any(r.model == model and not r.ready_s for r in node.replicas):
            return min(max(times), decoded / b.clone)
        return max(times)

    def queue(self, node, devices):
        ends = [max(d.loads_done_s, default=0) for d in node.devices if d.name in devices]
        return max(0, max(ends) - self.age)

    @staticmethod
    def touches(replica, devices):
        return any(s.device in devices for s in replica.shares)

    @staticmethod
    def free(node, devices):
        return {d.name: d.bytes_free for d in node.devices if d.name in devices}

    @staticmethod
    def targets(node, model, count):
        full = {s.device for r in node.replicas if r.model == model for s in r.shares}
        return combinations([d.name for d in node.devices if d.name not in full], count)
