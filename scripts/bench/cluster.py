"""Real nodes on one machine: does every request come through, right to the token, whatever dies?

    python -m scripts.bench.cluster [--requests 500] [--minutes 8] [--speed 0.6] [--kill-every 20]
        [--seed 0] [--phases calm,tight,killed,cut,latency] [--json FILE]

Starts four nodes on loopback that share a cluster file with a key, with twelve tiny fp32 models: each
lies in the stores of one to three nodes, and a node's device holds about four of them. Requests with
arrivals and lengths of the Azure code trace (an excerpt, scaled down to what tiny models take, long pauses cut,
`--speed` times as fast) go to a random node each. What comes must equal, token by token, what a single
node answers that has all models. Phases, none longer than `--minutes` (requests that would arrive
later are left out):

- (always first) the single node answers all requests.
- calm: the cluster does. From its logs: arrival to load begun, startup time by way, estimates' errors in all
  and by part; and how many are good but for what nodes' event loops waited for a processor (`cluster_noise`).
- tight: the same with room for two models on a device, so models come and go.
- killed: again, while a node is killed with -9 every `--kill-every` seconds and started again. A client
  whose own entry node dies loses its connection, which nobody can help; it asks another node, and what
  it had must be the beginning of the right answer. These are counted apart.
- cut: again, with relays between the nodes (`cluster_net`) that delay, stall as loss does, and cut one node
  off from the others for 8 s of every `--kill-every`, while clients reach all of them. Network namespaces
  with netem would do the same with privileges and a kernel that has it; where this was made it does not.
- latency: one stream at a time on the quiet cluster, at the node that serves it and through another.

Exit status 1 if a request failed or an answer was wrong. Timings are those of as many processes as nodes
on the cores there are, so the result has the machine, its load before the run, and the cores.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.cluster_load import Answer, Request, ask, compared, requests_of_trace, run_trace
from scripts.bench.cluster_logs import Logs
from scripts.bench.cluster_net import relayed
from scripts.bench.cluster_noise import RunDelays
from scripts.bench.figures import commit, describe_machine
from tests.e2e import cluster_nodes
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

NAMES: Final = ("a", "b", "c", "d")
FAMILIES: Final = ("llama", "qwen3", "mistral", "gpt2", "phi", "olmo2")
MODELS: Final = 12
ROOM: Final = {
    "calm": MODELS / 3,
    "tight": 2,
    "killed": MODELS / 3,
    "cut": MODELS / 3,
    "latency": MODELS / 3,
}
"""Models that a node's device holds, by phase."""
RESULT: Final = Path(__file__).parent / "results" / "cluster.json"
LATENCY_ROUNDS: Final = 20
RESTART_GRACE_S: Final = 1.0
CUT_S: Final = 8.0
"""More than the cluster file's `dead_s`."""


class Rig:
    """The models, the stores, and the nodes on them."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.models = [f"model-{number:02}" for number in range(MODELS)]
        self.all = place / "all"
        self.all.mkdir()
        sizes = [
            make_checkpoint(
                self.all, model, family=FAMILIES[i % len(FAMILIES)], seed=i, chunk_bytes=65536
            ).index.size
            for i, model in enumerate(self.models)
        ]
        self.replica_bytes = cluster_nodes.KV_BYTES + statistics.mean(sizes)
        draw = random.Random(seed)
        self.holders = {model: draw.sample(NAMES, draw.randint(1, 3)) for model in self.models}
        for name in NAMES:
            self._store(name)
        self.file = cluster_nodes.make_cluster(place / "shared", NAMES, timing=cluster_nodes.QUICK)
        self.network, self.relayed = relayed(self.file, NAMES)
        self.nodes: dict[str, NodeProcess] = {}
        self.alive: dict[str, str] = {}
        """Node -> its URL, while it runs."""
        self.processes: dict[str, int] = {}
        """Node -> its process, of its last life."""
        self.logs = Logs()

    def _store(self, name: str) -> None:
        (self.place / f"store-{name}").mkdir()
        for model, holders in self.holders.items():
            if name in holders:
                (self.place / f"store-{name}" / model).symlink_to(self.all / model)

    def set_up(self, models: float, *, network: bool) -> None:
        """Let the nodes that start from now on hold so many models, and speak over relays or not."""
        memory_bytes = int((models + 0.5) * self.replica_bytes)
        self.nodes = {
            name: cluster_nodes.made(
                self.place, name, self.place / f"store-{name}",
                self.relayed[name] if network else self.file, memory_bytes=memory_bytes,
                braked=False,
            )
            for name in NAMES
        }  # fmt: skip

    def single(self) -> NodeProcess:
        """Return a node of its own that has all models, and room for them."""
        place = self.place / "single"
        place.mkdir(exist_ok=True)
        return NodeProcess(
            place, self.all, id="single", memory_bytes=int(2 * MODELS * self.replica_bytes),
            kv_cache_bytes=cluster_nodes.KV_BYTES, pool_bytes=16 << 20,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all nodes, wait until they see each other, stop them at the end."""
        try:
            with ThreadPoolExecutor(len(NAMES)) as starters:
                list(starters.map(self.start, NAMES))
            for node in self.nodes.values():
                await cluster_nodes.sees(node, *NAMES)
            yield
        finally:
            for name in list(self.alive):
                self.stop(name)

    def start(self, name: str) -> None:
        """Start a node."""
        self.alive[name] = self.nodes[name].__enter__().url
        self.processes[name] = self.nodes[name].process.pid

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Stop a node and keep its log, which its next life begins anew."""
        node = self.nodes[name]
        del self.alive[name]
        if kill:
            node.process.kill()
        node.__exit__(None, None, None)
        self.logs.read(name, node.log)

    async def trouble(self, every_s: float, is_done: asyncio.Event) -> int:
        """Kill one node after another, and start it again; return how often."""
        kills = 0
        while not is_done.is_set():
            begun = time.perf_counter()
            name = NAMES[kills % len(NAMES)]
            await asyncio.to_thread(self.stop, name, kill=True)
            kills += 1
            await asyncio.sleep(RESTART_GRACE_S)
            await asyncio.to_thread(self.start, name)
            with contextlib.suppress(TimeoutError):
                left_s = max(0.0, begun + every_s - time.perf_counter())
                await asyncio.wait_for(is_done.wait(), left_s)
        return kills


async def reference(rig: Rig, requests: list[Request]) -> dict[str, Answer]:
    """Return what a single node answers, eight requests at a time."""
    wanted = {request.name: Answer() for request in requests}
    turns = asyncio.Semaphore(8)

    async def one(http: aiohttp.ClientSession, request: Request) -> None:
        async with turns:
            await ask(http, node.url, request, request.name, wanted[request.name])

    with rig.single() as node:
        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(one(http, request) for request in requests))
    broken = [f"{name}: {answer.error}" for name, answer in wanted.items() if answer.error]
    assert not broken, broken[:3]
    return wanted


async def trace_phase(
    rig: Rig, requests: list[Request], wanted: dict[str, Answer], tag: str, arguments: Any
) -> dict[str, Any]:
    """Run the trace against the cluster; `killed`: while nodes die."""
    draw = random.Random(arguments.seed + 1)

    def entry() -> str | None:
        return draw.choice(sorted(rig.alive.values())) if rig.alive else None

    rig.logs = Logs()
    begun = time.perf_counter()
    is_done = asyncio.Event()
    delays = RunDelays()
    delays.watch(rig.processes)
    async with rig.running():
        trouble = asyncio.create_task(troubled(rig, tag, arguments.kill_every, is_done))
        with delays:
            answers = await run_trace(requests, entry, tag, 60 * arguments.minutes)
        is_done.set()
        troubles = await trouble
    wall_s = time.perf_counter() - begun
    firsts = sorted(a.first_s for a in answers.values() if a.first_s is not None)
    return {
        **compared(requests, answers, wanted), "nodes_killed_or_cut_off": troubles, "wall_s": round(wall_s, 1),
        "first_token_median_s": round(statistics.median(firsts), 4),
        "first_token_p99_s": round(firsts[int(0.99 * (len(firsts) - 1))], 4),
        "worst_gap_s": round(max(a.worst_gap_s for a in answers.values()), 3),
        **rig.logs.report(
            {f"{tag}-{name}-0": a.sent_at for name, a in answers.items()}, delays.between
        ),
    }  # fmt: skip


async def troubled(rig: Rig, tag: str, every_s: float, is_done: asyncio.Event) -> int:
    """Do to the cluster what the phase is about; return how often."""
    if tag == "killed":
        return await rig.trouble(every_s, is_done)
    if tag == "cut":
        return await rig.network.trouble(NAMES, every_s, CUT_S, is_done)
    return 0


async def latency_phase(rig: Rig) -> dict[str, Any]:
    """Compare streams at the node that serves with streams through a node that forwards them."""
    model = next(m for m, holders in rig.holders.items() if len(holders) == 1)
    (server,) = rig.holders[model]
    other = next(name for name in NAMES if name != server)
    request = Request("latency", 0.0, model, "How long does it take?", 200)
    found: dict[str, list[Answer]] = {server: [], other: []}
    async with rig.running(), aiohttp.ClientSession() as http:
        for number in range(LATENCY_ROUNDS + 2):
            for name, kept in found.items():
                answer = Answer()
                await ask(http, rig.alive[name], request, f"l-{name}-{number}", answer)
                assert len(answer.tokens) == request.tokens, answer.error
                kept += [answer] if number >= 2 else []  # noqa: PLW2901
    direct, through = (
        {
            "first_token_ms": 1e3 * statistics.median(a.first_s or 0.0 for a in answers),
            "per_token_ms": 1e3 * statistics.median(
                (a.last_s - (a.first_s or 0.0)) / (len(a.tokens) - 1) for a in answers
            ),
        }
        for answers in (found[server], found[other])
    )  # fmt: skip
    return {
        "rounds": LATENCY_ROUNDS, "direct": direct, "through_a_peer": through,
        "added": {key: through[key] - direct[key] for key in direct},
    }  # fmt: skip


async def measure(rig: Rig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the phases that were asked for."""
    requests = requests_of_trace(arguments.requests, rig.models, arguments.seed, arguments.speed)
    found: dict[str, Any] = {}
    wanted = {} if arguments.phases == ["latency"] else await reference(rig, requests)
    for phase in arguments.phases:
        about = described(arguments, phase)
        rig.set_up(ROOM[phase], network=phase == "cut")
        if phase == "cut":
            await rig.network.start()
        if phase == "latency":
            came = await latency_phase(rig)
        else:
            came = await trace_phase(rig, requests, wanted, phase, arguments)
        if phase == "cut":
            await rig.network.close()
        found[phase] = {**came, "about": about}
        known = orjson.loads(arguments.json.read_bytes()) if arguments.json.exists() else {}
        known[phase] = found[phase]
        arguments.json.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2) + b"\n")
        print(phase, orjson.dumps(came, option=orjson.OPT_INDENT_2).decode(), flush=True)
    return found


def described(arguments: argparse.Namespace, phase: str) -> dict[str, Any]:
    """Return under what a phase was run."""
    return {
        "machine": describe_machine(), "load_average_before": os.getloadavg(),
        "note": "the machine is shared with other programs, and nodes and clients share its cores",
        "nodes": len(NAMES), "models": MODELS, "models_a_device_holds": ROOM[phase],
        "speed": arguments.speed, "kill_every_s": arguments.kill_every, "seed": arguments.seed,
        "command": f"python -m scripts.bench.cluster --requests {arguments.requests} "
        f"--speed {arguments.speed:g} --phases {phase}",
        "commit": commit(), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--speed", type=float, default=0.6)
    parser.add_argument("--kill-every", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default=",".join(ROOM), help="comma-separated")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="work here and keep the logs")
    arguments = parser.parse_args()
    arguments.phases = arguments.phases.split(",")
    if unknown := set(arguments.phases) - set(ROOM):
        parser.error(f"no such phases: {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    """Run, print and write what was seen."""
    arguments = parsed()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) if arguments.keep is None else arguments.keep
        place.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(measure(Rig(place, arguments.seed), arguments))
    bad = sum(
        phase.get(key, 0)
        for phase in found.values()
        for key in ("failed", "wrong_tokens", "of_them_wrong_up_to_there")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
