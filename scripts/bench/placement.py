"""Placement decisions a second on one core, on a synthetic cluster that changes while it is asked.

    python -m scripts.bench.placement [--nodes 64] [--devices 8] [--models 200] [--seconds 5]
        [--what choose]

Each mix is a load of the devices: `light` leaves a third of them empty; `busy` has every device with
replicas, half of them idle; `full` has every replica full and no device free: a decision waits or
rejects; `tight` is `full` with a device or so free that takes small models only, so large ones have
to look for moves. Between decisions states arrive as they would at one a second from each node and 10,000
decisions a second. Prints decisions a second of processor time (others may use the machine) with updates
included, percentiles of one decision by the clock, the cost of an update, and which kinds of
decisions there were. `--what choose` asks as an entry node does (`cluster.choice`), which lets moves win by
a gain only; `--what retry` once more with the node excluded that it got. `--record` writes the figure.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from random import Random
from statistics import median

from scripts.bench import figures
from sllm_node.cluster.candidate import PlacementRequest
from sllm_node.cluster.choice import choose
from sllm_node.cluster.placement import Reject, decide
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
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, SessionId
from sllm_node.core.units import GIB

COMMAND = "python -m scripts.bench.placement"
DEVICE_BYTES = 140 * GIB
GAIN_S = 0.2
"""How much sooner a choice with moves has to be."""
MIXES = {
    "light": (0.35, 0.5, 0.4),
    "busy": (0.0, 0.5, 0.7),
    "full": (0.0, 0.0, 1.0),
    "tight": (0.0, 0.0, 1.0),
}
"""Of devices: empty; of replicas: idle; of the places of the others: taken."""


class Bench:
    """A cluster of one mix."""

    def __init__(self, options: argparse.Namespace, mix: str) -> None:
        self.rng = Random(7)
        self.options = options
        self.mix = mix
        self.empty, self.idle, self.taken = MIXES[mix]
        self.sizes = {
            ModelId(f"model-{i}"): (self.rng.choice([16, 16, 28, 65]) * 10**9, 1)
            for i in range(options.models)
        }
        for model in list(self.sizes)[::20]:
            self.sizes[model] = (65 * 10**9, 2)
        self.version = 0
        self.states = [self.node(f"node-{i:02}") for i in range(options.nodes)]

    def node(self, name: str) -> NodeState:
        """Return a node with a random fill."""
        rng = self.rng
        devices: list[DeviceState] = []
        replicas: list[ReplicaState] = []
        held = tuple(self.held(model) for model in self.sizes if rng.random() < 0.5)
        for i in range(self.options.devices):
            free, here = DEVICE_BYTES - 4 * GIB, set[ModelId]()
            while rng.random() >= self.empty and len(here) < 4:
                model = rng.choice(list(self.sizes))
                size = self.memory(model)
                if size > free or model in here or self.sizes[model][1] > 1:
                    break
                here.add(model)
                free -= size
                number = f"{name}-r{len(replicas)}"
                replicas.append(self.replica(number, model, f"cuda:{i}", size))
            queue = (rng.choice([0.5, 2.0]),) if rng.random() < 0.1 else ()
            if self.taken >= 1:
                is_spare = self.mix == "tight" and rng.random() < 0.01
                free = 30 * GIB if is_spare else min(free, 10 * GIB)
            devices.append(DeviceState(f"cuda:{i}", DEVICE_BYTES, free, queue))
        rates = Bandwidths(394e9, 1870e9, 55e9, rng.choice([3e9, 14e9]), 10e9, 1e9)
        self.version += 1
        return NodeState(
            NodeId(name), BootId("b"), self.version, tuple(devices), rates, held, tuple(replicas)
        )

    def memory(self, model: ModelId) -> int:
        """Return what a replica takes of each device: weights and 12 GB of KV."""
        return self.sizes[model][0] + 12 * 10**9

    def held(self, model: ModelId) -> HeldModel:
        """Return a model as a node lists it: on NVMe, every third in DRAM."""
        size, shares = self.sizes[model]
        stored = size * shares * 7 // 10
        dram = stored if self.rng.random() < 0.3 else 0
        fit = ResumeFit(self.rng.uniform(1e-4, 3e-4), 0.05)
        return HeldModel(model, size * shares, stored, dram, stored, fit)

    def replica(self, name: str, model: ModelId, device: str, size: int) -> ReplicaState:
        """Return a replica, idle or with some of its places taken."""
        slots = 8
        running = 0 if self.rng.random() < self.idle else max(1, int(slots * self.taken))
        sessions = tuple(
            SessionState(SessionId(f"{name}-{i}"), self.rng.randint(50, 4000), 200, 60.0)
            for i in range(running)
        )
        shares = (DeviceShare(device, size),)
        free_s = self.rng.uniform(1, 20)
        return ReplicaState(
            ReplicaId(name), model, shares, slots, sessions, next_free_s=free_s, idle_s=1.0
        )

    def run(self, view: ClusterView) -> float:
        """Decide for so many seconds, print what came and return decisions a second, updates included."""
        rng, now, each, kinds = self.rng, 100.0, list[float](), Counter[str]()
        decides_s = updates_s = 0.0
        every = max(1, 10_000 // self.options.nodes)
        models = list(self.sizes)
        while decides_s + updates_s < self.options.seconds:
            news = self.news()
            begun = time.process_time()
            view.update(news, now)
            updated = time.process_time()
            for _ in range(every):
                model = rng.choice(models)
                request = PlacementRequest(model, self.memory(model), self.sizes[model][1])
                before = time.perf_counter()
                kind = self.place(view, request, now)
                each.append(time.perf_counter() - before)
                kinds[kind] += 1
                now += 1e-4
            updates_s += updated - begun
            decides_s += time.process_time() - updated
        each.sort()
        updates = len(each) / every
        rate = len(each) / (decides_s + updates_s)
        print(
            f"  {rate:,.0f} decisions/s with updates, {len(each) / decides_s:,.0f} without; "
            f"one: median {each[len(each) // 2] * 1e6:.0f} us, "
            f"p99 {each[len(each) * 99 // 100] * 1e6:.0f} us, worst {each[-1] * 1e3:.1f} ms; "
            f"an update {updates_s / updates * 1e6:.0f} us"
        )
        print(
            "  " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()), flush=True
        )
        return rate

    def place(self, view: ClusterView, request: PlacementRequest, now: float) -> str:
        """Place a request as the options say, and return what it came to."""
        if self.options.what == "decide":
            decision = decide(view, request, now)
            return "Reject" if isinstance(decision, Reject) else decision.best.kind.name
        me = self.states[0].node
        found = choose(view, request, me, now, gain_s=GAIN_S)
        if found is not None and self.options.what == "retry":
            found = choose(view, request, me, now, frozenset({found.node}), GAIN_S)
        return "None" if found is None else found.way.upper()

    def news(self) -> NodeState:
        """Return news of one node: other replicas, sometimes other bytes in DRAM."""
        old = self.rng.choice(self.states)
        new = self.node(old.node)
        models = list(old.models)
        if models and self.rng.random() < 0.3:
            place = self.rng.randrange(len(models))
            models[place] = self.held(models[place].model)
        return replace(new, models=tuple(models), bandwidths=old.bandwidths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--what", choices=("decide", "choose", "retry"), default="decide")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.record and options.what != "decide":
        parser.error("the figure is of decisions: --record goes with --what decide")
    rates = {mix: [rate(options, mix) for _ in range(options.rounds)] for mix in options.mixes}
    if options.record:
        figures.record(
            "placements_per_s", median(rates["busy"]), rates["busy"],
            note=noted({mix: median(of) for mix, of in rates.items()}),
            command=f"{COMMAND} --rounds {options.rounds} --seconds {options.seconds:g} --record",
        )  # fmt: skip


def rate(options: argparse.Namespace, mix: str) -> float:
    """Return decisions a second on a cluster of one mix."""
    bench, view = Bench(options, mix), ClusterView()
    for state in bench.states:
        view.update(state, 100.0)
    print(f"{mix}: {options.nodes} nodes x {options.devices} devices, {options.models} models")
    return bench.run(view)


def noted(rates: dict[str, float]) -> str:
    others = ", ".join(f"{mix} {rate:,.0f}" for mix, rate in rates.items() if mix != "busy")
    return f"mix busy, half of the replicas idle; {others}; a second of processor time, updates included"


if __name__ == "__main__":
    main()
