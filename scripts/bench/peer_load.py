"""How fast a checkpoint comes from a peer, beside a plain remote, and what a stream notices of it.

    python -m scripts.bench.peer_load [--rounds 5] [--layers 8] [--json FILE]

Real nodes on loopback: `a` has a model of random numbers (67 MB a layer) and a tiny one; `b` has nothing
and pulls the large one, from its peer under a key, then under TLS; `c` is in no cluster and pulls it from
`a` as a remote over plain HTTP. Rounds of the three take turns, each with nothing of the model on disk, so
what else the machine does hits all alike. A pull writes to disk and ends when the checkpoint is complete.
In each round a stream of the tiny model is read at `a`, before and during the pull: its gaps between
tokens are compared. Sender, receiver and reader share the machine's cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp

from scripts.bench.figures import commit, describe_machine
from tests.e2e import cluster_nodes
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

LARGE: Final = "large"
SMALL: Final = "small"
TOKENS: Final = 450
WAYS: Final = ("peer, key", "peer, TLS", "remote, HTTP")


def node_of(place: Path, name: str, store: Path, file: Path | None, remote: str) -> NodeProcess:
    """Return a node whose pool has room for chunks of the large model."""
    own = place / name
    own.mkdir(exist_ok=True)
    extra = f'\n[cluster]\nfile = "{file}"\n' if file else ""
    extra += f'[remotes.a]\nurl = "{remote}/peer/v1/checkpoints"\n' if remote else ""
    memory: Any = {"memory_bytes": 64 << 20, "kv_cache_bytes": 4 << 20, "pool_bytes": 256 << 20}
    node = NodeProcess(own, store, extra, id=name.rsplit("-", 1)[-1], **memory)
    text = node.config.read_text().replace('chunk_bytes = "64KiB"', 'chunk_bytes = "16MiB"')
    node.config.write_text(text.replace('"debug"', '"info"'))
    return node


async def gaps_of(url: str, ended: asyncio.Event | None = None) -> list[float]:
    """Read streams of the tiny model one after another, one at least; return the gaps between tokens."""
    body = {
        "model": SMALL, "prompt": "Hello", "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    gaps: list[float] = []
    async with aiohttp.ClientSession() as http:
        while True:
            last = 0.0
            async with http.post(url + "/v1/completions", json=body) as response:
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    gaps += [now - last] if last else []
                    last = now
                    if ended is not None and ended.is_set():
                        return gaps
            if ended is None or ended.is_set():
                return gaps


async def pulled(node: NodeProcess, store: Path) -> float:
    """Pull the large model with nothing of it here; return the seconds."""
    for folder in (store / LARGE, store / ".remote" / LARGE):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    status, found = await cluster_nodes.post(node.url, f"/admin/models/{LARGE}/pull", {})
    elapsed_s = time.perf_counter() - began
    assert status == 200, found
    return elapsed_s


def cpu_s(node: NodeProcess) -> float:
    """Return the processor time that a node has taken."""
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measured(sender: NodeProcess, node: NodeProcess, store: Path) -> dict[str, Any]:
    """Pull once while a stream runs at the sender, and once while none does."""
    before = cpu_s(sender), cpu_s(node)
    alone_s = await pulled(node, store)
    cpu = cpu_s(sender) - before[0], cpu_s(node) - before[1]
    calm = await gaps_of(sender.url)
    ended = asyncio.Event()
    reading = asyncio.create_task(gaps_of(sender.url, ended))
    beside_s = await pulled(node, store)
    ended.set()
    return {
        "alone_s": alone_s, "beside_s": beside_s, "calm": calm, "busy": await reading, "cpu": cpu,
    }  # fmt: skip


def summed(rounds: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Return rates in GB/s and gaps in ms."""
    calm = sorted(gap for one in rounds for gap in one["calm"])
    busy = sorted(gap for one in rounds for gap in one["busy"])
    return {
        "gb_per_s": size / 1e9 / statistics.median(one["alone_s"] for one in rounds),
        "gb_per_s_best": size / 1e9 / min(one["alone_s"] for one in rounds),
        "gb_per_s_beside_a_stream": size / 1e9 / statistics.median(o["beside_s"] for o in rounds),
        "cpu_s_per_gb_sender": 1e9 / size * statistics.median(one["cpu"][0] for one in rounds),
        "cpu_s_per_gb_receiver": 1e9 / size * statistics.median(one["cpu"][1] for one in rounds),
        "gap_ms_p50_calm": 1e3 * statistics.median(calm),
        "gap_ms_p99_calm": 1e3 * calm[int(0.99 * len(calm))],
        "gap_ms_p50_pull": 1e3 * statistics.median(busy),
        "gap_ms_p99_pull": 1e3 * busy[int(0.99 * len(busy))],
        "gap_ms_worst_pull": 1e3 * busy[-1],
    }


async def run(place: Path, rounds: int, layers: int) -> dict[str, Any]:
    """Start the nodes, measure, stop them."""
    stores = {name: place / f"store-{name}" for name in ("a", "key-a", "tls-a", "key", "tls", "c")}
    for store in stores.values():
        store.mkdir()
    make_checkpoint(stores["a"], SMALL, chunk_bytes=65536)
    size = make_checkpoint(
        stores["a"], LARGE, chunk_bytes=16 << 20, shard_bytes=1 << 30, codec="raw",
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, head_dim=128,
    ).index.file_size  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        ways: dict[str, tuple[NodeProcess, NodeProcess, Path]] = {}
        for way, trust in zip(WAYS[:2], ("key", "tls"), strict=True):
            file = cluster_nodes.make_cluster(place / f"shared-{trust}", ["a", "b"], trust)
            for model in (SMALL, LARGE):
                (stores[f"{trust}-a"] / model).symlink_to(stores["a"] / model)
            sender = stack.enter_context(
                node_of(place, f"{trust}-a", stores[f"{trust}-a"], file, "")
            )
            taker = stack.enter_context(node_of(place, f"{trust}-b", stores[trust], file, ""))
            await cluster_nodes.sees(taker, "a")
            ways[way] = (sender, taker, stores[trust])
        sender = ways[WAYS[0]][0]
        taker = stack.enter_context(node_of(place, "c", stores["c"], None, sender.url))
        ways[WAYS[2]] = (sender, taker, stores["c"])
        await asyncio.gather(*(gaps_of(one[0].url) for one in ways.values()))  # warm
        for number in range(rounds):
            for way, (sender, taker, store) in ways.items():
                found[way].append(await measured(sender, taker, store))
            print(f"round {number + 1} of {rounds}", flush=True)
    return {"bytes": size, **{way: summed(found[way], size) for way in WAYS}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        report = asyncio.run(run(Path(place), options.rounds, options.layers))
    report = {
        "machine": describe_machine(), "load_before": load, "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(), **report,
    }  # fmt: skip
    text = json.dumps(report, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
