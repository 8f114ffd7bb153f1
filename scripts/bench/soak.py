"""Many streams of a tiny model for minutes: does each one move, does the loop, does memory stay flat?

python -m scripts.bench.soak --streams 256 --minutes 10
Starts a node of its own on loopback and ends it. Prints a table; exit status 1 if a stream failed,
starved (`--starve-s` without a token) or memory grew by more than `--growth-mib` after the first
quarter.
"""

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import orjson
import psutil

from scripts.bench.figures import commit, describe_machine
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint


class Tally:
    """What the streams saw."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finished = 0
        self.errors: list[str] = []
        self.worst_gap_s = 0.0
        self.first_s: list[float] = []


async def one_stream(session: aiohttp.ClientSession, url: str, seed: int, tally: Tally) -> None:
    body = {
        "model": "tiny", "prompt": f"stream {seed} says", "max_tokens": 64, "stream": True,
        "seed": seed, "ignore_eos": True,
    }  # fmt: skip
    start = last = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            tally.errors.append(f"{response.status} {await response.text()}")
            return
        got_first = False
        async for chunk in data_lines(response):
            now = time.perf_counter()
            if "error" in chunk:
                tally.errors.append(str(chunk["error"]))
                return
            if not got_first:
                got_first = True
                tally.first_s.append(now - start)
            tally.worst_gap_s = max(tally.worst_gap_s, now - last)
            tally.tokens += 1
            last = now
    tally.finished += 1


async def data_lines(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, object]]:
    """Yield the decoded events of one stream."""
    async for raw in response.content:
        if raw.startswith(b"data: ") and b"[DONE]" not in raw:
            yield orjson.loads(raw[6:])


async def client(
    session: aiohttp.ClientSession, url: str, first: int, until: float, tally: Tally
) -> None:
    seed = first
    while time.perf_counter() < until and len(tally.errors) < 10:
        await one_stream(session, url, seed, tally)
        seed += 10_000


async def watch(process: psutil.Process, until: float, memory_mib: list[float]) -> None:
    while time.perf_counter() < until:
        memory_mib.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(1.0)


def quantile(metrics: str, name: str, share: float) -> float:
    """Return the upper bound of the bucket that holds the `share` quantile of a histogram."""
    buckets = [
        (float(b), float(c))
        for b, c in re.findall(rf'^{name}_bucket{{le="([^"]+)"}} (\S+)$', metrics, re.MULTILINE)
    ]
    total = max((count for _, count in buckets), default=0.0)
    return next((bound for bound, count in sorted(buckets) if count >= share * total), float("nan"))


async def measure(
    node: NodeProcess, streams: int, minutes: float
) -> tuple[Tally, list[float], str]:
    tally, memory_mib = Tally(), list[float]()
    until = time.perf_counter() + 60 * minutes
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        async with asyncio.TaskGroup() as group:
            group.create_task(watch(psutil.Process(node.process.pid), until, memory_mib))
            for number in range(streams):
                group.create_task(client(session, node.url, number, until, tally))
        async with session.get(f"{node.url}/metrics") as response:
            return tally, memory_mib, await response.text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--growth-mib", type=float, default=64.0)
    parser.add_argument("--starve-s", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        store.mkdir()
        make_checkpoint(store, "tiny")
        with NodeProcess(
            Path(folder), store, kv_cache_bytes=64 << 20, memory_bytes=256 << 20
        ) as node:
            tally, memory_mib, metrics = asyncio.run(
                measure(node, arguments.streams, arguments.minutes)
            )
    quarter = memory_mib[len(memory_mib) // 4 :]
    half = len(quarter) // 2
    growth = statistics.median(quarter[half:]) - statistics.median(quarter[:half])
    result = {
        "streams": arguments.streams,
        "minutes": arguments.minutes,
        "finished": tally.finished,
        "errors": len(tally.errors),
        "tokens_per_s": tally.tokens / (60 * arguments.minutes),
        "first_event_median_s": statistics.median(tally.first_s) if tally.first_s else None,
        "worst_gap_s": tally.worst_gap_s,
        "loop_lag_p99_s": quantile(metrics, "sllm_event_loop_lag_seconds", 0.99),
        "memory_first_mib": quarter[0],
        "memory_last_mib": quarter[-1],
        "memory_growth_mib": growth,
        "machine": describe_machine(),
        "command": f"python -m scripts.bench.soak --streams {arguments.streams} "
        f"--minutes {arguments.minutes:g}",
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    for name, value in result.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    for error in tally.errors[:3]:
        print(error)
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    healthy = (
        not tally.errors
        and growth <= arguments.growth_mib
        and tally.worst_gap_s <= arguments.starve_s
    )
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
