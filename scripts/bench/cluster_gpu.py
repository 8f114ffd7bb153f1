r"""A cluster on one host, one node a GPU, with large shapes: how soon do models start, how do sessions move?

    python -m scripts.bench.cluster_gpu --nodes 2 --shape 8b --store /dev/shm/s --out DIR
        [--device cuda] [--parts startup,trace,moves] [--limit-s 520] [--models N] [--by-name]
        [--contexts 1024,4096,8192,16384,32768] [--beside 4] [--requests 120] [--speed 0.5]

Nodes share a cluster file with a key and the files of one checkpoint of random weights under several names
(hard links; a tmpfs counts as NVMe). Node b lacks the last model. Each has room for two replicas on its
device and two models in its pool. Every process sees its own GPU only; `--by-name`: all, and its config
names cuda:N. `--device cpu --shape tiny` tries the script itself without a GPU.

- startup: each model in turn from the store, again resident, again after it left the device, and through
  a peer: seconds to the first token as the client sees it, and estimates against what came, by way.
- trace: requests of the Azure code trace to random nodes (scaled as for `scripts.bench.cluster`): none may
  fail, each has as many tokens as were asked for; startup and estimates by way, from the nodes' logs.
- moves: a session with so many tokens of context moves to another node while `--beside` others run at
  both ends: the longest pause that its reader sees less a usual step, bytes on the wire a token, and what
  the source's other streams lose meanwhile.

Exit status 1 if a request failed. Each part ends when its share of `--limit-s` is over, however much was done.
"""

import argparse
import asyncio
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.cluster_gpu_rig import KV_BYTES, NAMES, ROOM, Rig
from scripts.bench.cluster_load import Answer, Request, ask, requests_of_trace, run_trace
from scripts.bench.cluster_logs import Started, errors, started_of, summary
from scripts.bench.cluster_moves import Moves
from scripts.bench.figures import commit, describe_machine

SHARES: Final = {"startup": 0.35, "trace": 0.25, "moves": 0.4}
"""Of the time that is left for parts; what one leaves is the next one's."""
# --- startup ------------------------------------------------------------------------------------


class Startup:
    """One request after the other, each from another tier."""

    def __init__(self, rig: Rig, http: aiohttp.ClientSession) -> None:
        self._rig, self._http = rig, http
        self._answers: dict[str, tuple[str, Answer]] = {}

    async def run(self, until: float) -> dict[str, Any]:
        """Take rounds of all models until the time is over."""
        rounds = 0
        while time.perf_counter() < until and rounds < self._rig.asked.rounds:
            for model in self._rig.models:
                if time.perf_counter() < until:
                    await self._visit(model, f"s{rounds}-{model}")
            rounds += 1
        return {"rounds": rounds, **self._report()}

    async def _visit(self, model: str, name: str) -> None:
        a, b = (self._rig.nodes[node].url for node in ("a", "b"))
        await self._ask(a, model, f"{name}-first")
        await self._ask(a, model, f"{name}-resident")
        for node in self._rig.names[1:]:
            await self._unload(self._rig.nodes[node].url, model)
        await self._unload(a, model)
        await self._ask(a, model, f"{name}-back")
        if model == self._rig.models[-1]:
            await self._ask(b, model, f"{name}-through")
            await self._unload(a, model)
            await self._ask(b, model, f"{name}-throughback")
        for node in self._rig.names:
            await self._unload(self._rig.nodes[node].url, model)

    async def _unload(self, url: str, model: str) -> None:
        """Take it off a device; a node that has no such model says so."""
        async with self._http.post(f"{url}/admin/models/{model}/unload", json={"force": True}):
            pass

    async def _ask(self, url: str, model: str, name: str) -> None:
        request = Request(name, 0.0, model, "How soon will the first token be here?", 8)
        answer = Answer()
        await ask(self._http, url, request, f"{name}-0", answer)
        if answer.error is not None or len(answer.tokens) != request.tokens:
            self._rig.fail(f"{name}: {answer.error or len(answer.tokens)}")
        self._answers[f"{name}-0"] = (name.rpartition("-")[2], answer)

    def _report(self) -> dict[str, Any]:
        """Return first tokens by kind of request, and estimates by way; the first round apart."""
        logs = self._rig.read_logs()
        placed = {line["asked"]: line for line in logs.lines if line["event"] == "request placed"}
        began = {line["asked"]: line for line in logs.lines if line["event"] == "session started"}
        firsts: dict[str, list[float]] = defaultdict(list)
        starts: dict[str, list[Started]] = defaultdict(list)
        for name, (_, answer) in self._answers.items():
            told, start = placed.get(name), began.get(name)
            if told is None or answer.first_s is None:
                continue
            way = way_of(told)
            when = "cold" if name.startswith("s0-") else "warm"
            firsts[f"{way}, {when}"].append(1e3 * answer.first_s)
            if start is not None:
                starts[f"{way}, {when}"].append(started_of(start))
        return {
            "first_token_ms": {way: summary(values) for way, values in sorted(firsts.items())},
            "startup_ms": {
                way: summary([1e3 * one.actual_s for one in found])
                for way, found in sorted(starts.items())
            },
            "expected_ms": {
                way: round(1e3 * statistics.median(one.expected_s for one in found), 2)
                for way, found in sorted(starts.items())
            },
            "estimates": {way: errors(found) for way, found in sorted(starts.items())},
        }


def way_of(told: dict[str, Any]) -> str:
    """Return by which way a request started: kind, where its bytes were, here or at a peer."""
    source = told["why"].rpartition(" from ")[2].rstrip(")") if " from " in told["why"] else ""
    where = "here" if told["node"] == told["on"] else "peer"
    return " ".join(part for part in (told["way"], source, where) if part)


# --- the trace ----------------------------------------------------------------------------------


async def trace(rig: Rig, http: aiohttp.ClientSession, until: float) -> dict[str, Any]:
    """Send the trace to random nodes; all must be answered."""
    del http  # the trace has connections of its own
    asked = rig.asked
    requests = requests_of_trace(asked.requests, rig.models, asked.seed, asked.speed)
    requests = [replace(one, name=f"t{one.name}") for one in requests]
    draw = random.Random(asked.seed + 1)
    urls = [node.url for node in rig.nodes.values()]
    left_s, since = until - time.perf_counter(), time.time()
    answers = await run_trace(requests, lambda: draw.choice(urls), "trace", left_s)
    wanted = {request.name: request.tokens for request in requests}
    for name, answer in answers.items():
        if answer.error is not None or answer.usage.get("completion_tokens") != wanted[name]:
            rig.fail(f"{name}: {answer.error or answer.usage}")
    firsts = [1e3 * answer.first_s for answer in answers.values() if answer.first_s is not None]
    sent = {f"trace-{name}-0": answer.sent_at for name, answer in answers.items()}
    logs = rig.read_logs()
    logs.lines = [
        line for line in logs.lines if line["at"] >= since or line["event"] == "load finished"
    ]  # loads before it warm estimates
    report = logs.report(sent)
    return {
        "requests": len(answers), "first_token_ms": summary(firsts) if firsts else None,
        "worst_gap_s": round(max((a.worst_gap_s for a in answers.values()), default=0.0), 3),
        **report,
    }  # fmt: skip


# --- all together -------------------------------------------------------------------------------


async def startup(rig: Rig, http: aiohttp.ClientSession, until: float) -> dict[str, Any]:
    """Measure startups by tier."""
    return await Startup(rig, http).run(until)


async def moves(rig: Rig, http: aiohttp.ClientSession, until: float) -> dict[str, Any]:
    """Measure sessions that move."""
    made = Moves(rig.nodes, http, rig.models[0], rig.asked, rig.fail)
    return await made.run(until)


Part = Callable[[Rig, aiohttp.ClientSession, float], Awaitable[dict[str, Any]]]
PARTS: Final[dict[str, Part]] = {"startup": startup, "trace": trace, "moves": moves}


async def measure(rig: Rig, deadline: float) -> dict[str, Any]:
    """Run the parts, each within its share of what is left; one that fails does not end the rest."""
    found: dict[str, Any] = {}
    parts = rig.asked.parts
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        rig.running(),
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
    ):
        for number, part in enumerate(parts):
            now = time.perf_counter()
            share = SHARES[part] / sum(SHARES[one] for one in parts[number:])
            until = now + share * (deadline - now)
            try:
                found[part] = await asyncio.wait_for(
                    PARTS[part](rig, http, until), until - now + 60
                )
            except Exception as error:  # noqa: BLE001 - told, and the next part is measured
                rig.fail(f"{part}: {type(error).__name__}: {error}")
            found[part] = {**found.get(part, {}), "took_s": round(time.perf_counter() - now, 1)}
            write(rig, found)
    return found


def write(rig: Rig, found: dict[str, Any]) -> None:
    """Write what is known so far."""
    asked = rig.asked
    about = {
        "machine": describe_machine(), "commit": commit(), "date": datetime.now(UTC).isoformat(),
        "device": asked.device, "shape": asked.shape, "bytes": rig.size, "nodes": len(rig.nodes),
        "models": len(rig.models), "replicas_a_device": ROOM, "models_a_pool": ROOM,
        "command": " ".join(["python -m scripts.bench.cluster_gpu", *sys.argv[1:]]),
    }  # fmt: skip
    data = {"about": about, "failed": rig.failed, **found}
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    path = asked.out / f"cluster_gpu_x{asked.nodes}.json"
    path.write_bytes(orjson.dumps(data, option=options) + b"\n")


def table(rig: Rig, found: dict[str, Any]) -> None:
    """Print the short table."""
    told = found.get("startup", {})
    for way, first in told.get("first_token_ms", {}).items():
        expected = told["expected_ms"].get(way)
        startup_ms, good = told["startup_ms"].get(way, {}), told["estimates"].get(way, {})
        print(
            f"start {way:34} n {first['count']:3}  first token {first['median']:8.1f} ms (p99 "
            f"{first['p99']:8.1f})  startup {startup_ms.get('median')} expected {expected} ms, "
            f"good {good.get('share_good')}"
        )
    told = found.get("trace", {})
    if told.get("requests"):
        print(f"trace {told['requests']} requests, first token {told['first_token_ms']} ms")
        for way, startup_ms in told["startup_ms_by_way"].items():
            print(f"trace {way:34} {startup_ms} {told['estimates'].get(way, {}).get('share_good')}")
    for row in found.get("moves", {}).get("rows", []):
        print("move ", orjson.dumps(row).decode())
    parts = {part: one.get("took_s") for part, one in found.items()}
    print(f"{rig.asked.nodes} nodes, failed {len(rig.failed)}, seconds by part {parts}")
    for failure in rig.failed[:8]:
        print(f"FAILED {failure}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, choices=range(2, len(NAMES) + 1))
    parser.add_argument("--shape", default="8b", choices=tuple(KV_BYTES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--by-name", action="store_true", help="configs name cuda:N")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--work", type=Path, help="work here and keep the logs")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit-s", type=float, default=520.0)
    parser.add_argument("--models", type=int, help="default: two more than all pools hold")
    parser.add_argument("--rounds", type=int, default=6, help="of startup, at most")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--speed", type=float, default=0.5)
    parser.add_argument("--contexts", default="1024,4096,8192,16384,32768")
    parser.add_argument("--beside", type=int, default=4, help="streams at each node")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.parts = asked.parts.split(",")
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")
    asked.models = asked.models or ROOM * asked.nodes + 2
    asked.contexts = [int(one) for one in asked.contexts.split(",")]
    return asked


def main() -> int:
    """Run, print, write."""
    begun = time.perf_counter()
    asked = parsed()
    place = asked.work or asked.out / "work"
    shutil.rmtree(place, ignore_errors=True)
    for folder in (asked.store, asked.out, place):
        folder.mkdir(parents=True, exist_ok=True)
    rig = Rig(place.resolve(), asked)
    try:
        found = asyncio.run(measure(rig, begun + asked.limit_s - 20))
    finally:
        if asked.work is None:
            shutil.rmtree(place, ignore_errors=True)
    write(rig, found)
    table(rig, found)
    return 1 if rig.failed else 0


if __name__ == "__main__":
    sys.exit(main())
