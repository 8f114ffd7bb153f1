"""What a request waits for before anything moves: from DRAM, and between resident models.

    python -m scripts.bench.warm_start --requests 300
    python -m scripts.bench.warm_start --device cuda:0 --shape 8b --store /dev/shm/s --out F

A whole node and its client run in one process, so one clock times both, from just before the client
sends its HTTP request: to the call that enqueues the first chunk's copy, for a model that lies in
DRAM and not on the device (it left with keep_alive 0); and to the first step's launch, for requests
that go to two resident models by turns.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from scripts.bench import random_checkpoint
from scripts.bench.figures import record
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import Config, parse_config
from sllm_node.core.types import ModelId
from sllm_node.device.cpu import CpuStream
from sllm_node.engine.runner import Runner
from sllm_node.node.node import Node
from sllm_node.node.systemd import Notifier
from tests.models import make_checkpoint

WARM_UP: Final = 5
PAUSE_S: Final = 0.03
"""After a model has left, so that its memory has been given back to the system."""
CONFIG = """
[store]
path = "{store}"
pool_bytes = {pool}
chunk_bytes = "{chunk}"
[device]
names = ["{device}"]
memory_bytes = {memory}
[engine]
kv_cache_bytes = "{kv}"
torch_threads = 1
[server]
port = 0
"""
MODELS = ("one", "two")


class First:
    """Notes when the first call of a method after `reset` begins."""

    def __init__(self, owner: type, method: str) -> None:
        self.at: float | None = None
        original = getattr(owner, method)

        def noted(*values: Any, **options: Any) -> Any:
            if self.at is None:
                self.at = time.perf_counter()
            return original(*values, **options)

        setattr(owner, method, noted)

    def reset(self) -> None:
        """Forget the call."""
        self.at = None


async def ask(http: aiohttp.ClientSession, url: str, model: str, **options: object) -> float:
    """Send one request, read its answer; return when it was sent."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1, **options}
    start = time.perf_counter()
    async with http.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
        assert response.status == 200, text
    return start


async def measure(config: Config, stream: type, requests: int) -> dict[str, list[float]]:
    """Return milliseconds to the first copy from DRAM, and to the first step between residents."""
    copied, stepped = First(stream, "copy_in"), First(Runner, "step")
    node = Node(config, Notifier({}), MonotonicClock())
    await node.start()
    found: dict[str, list[float]] = {"copy": [], "step": [], "switch": []}
    try:
        async with aiohttp.ClientSession() as http:
            for number in range(requests + WARM_UP):
                while node.is_on_device(ModelId("one")):  # noqa: ASYNC110 - a benchmark may wait so
                    await asyncio.sleep(0)
                await asyncio.sleep(PAUSE_S)
                copied.reset()
                stepped.reset()
                start = await ask(http, node.url, "one", keep_alive=0)
                if number >= WARM_UP:
                    found["copy"].append(_since(start, copied))
                    found["step"].append(_since(start, stepped))
            for number in range(requests + 2 * WARM_UP):
                stepped.reset()
                start = await ask(http, node.url, MODELS[number % 2], keep_alive=-1)
                if number >= 2 * WARM_UP:
                    found["switch"].append(_since(start, stepped))
    finally:
        await node.stop(asyncio.Event())
    return found


def _since(start: float, first: First) -> float:
    assert first.at is not None
    return 1e3 * (first.at - start)


def prepare(arguments: argparse.Namespace, store: Path) -> Config:
    """Write the two models and return the node's config."""
    values = {"store": store, "device": arguments.device}
    if arguments.shape is None:
        for name in MODELS:
            make_checkpoint(store, name, hidden_size=512, intermediate_size=2048)
        sizes = {"pool": 128 << 20, "chunk": "1MiB", "memory": 256 << 20, "kv": "8MiB"}
        return parse_config(CONFIG.format(**values, **sizes))
    size = 0
    for seed, name in enumerate(MODELS):
        size += random_checkpoint.write(store, arguments.shape, name, seed)
        random_checkpoint.make_servable(store / name, arguments.shape)
    pool = size // (32 << 20) * (32 << 20) + (2 << 30)
    sizes = {"pool": pool, "chunk": "32MiB", "memory": 0, "kv": "1GiB"}
    return parse_config(CONFIG.format(**values, **sizes))


def stream_of(device: str) -> type:
    """Return the class whose `copy_in` moves bytes to such a device."""
    if not device.startswith("cuda"):
        return CpuStream
    from sllm_node.device.cuda_stream import CudaStream

    return CudaStream


def p99(samples: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(samples)[int(0.99 * (len(samples) - 1))]


def main() -> None:
    """Measure and print; the CPU's figures are recorded, a GPU's are written to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.store) as folder:
        config = prepare(arguments, Path(folder))
        stream = stream_of(arguments.device)
        found = uvloop.run(measure(config, stream, arguments.requests))
    for name, samples in found.items():
        middle = statistics.median(samples)
        print(f"request to {name}: median {middle:.2f} ms, p99 {p99(samples):.2f} ms")
    if arguments.out:
        arguments.out.write_text(json.dumps(found))
        return
    record(
        "warm_request_to_first_byte_ms", p99(found["copy"]),
        [round(wait, 4) for wait in found["copy"]],
        command=f"python -m scripts.bench.warm_start --requests {arguments.requests}",
        note=f"p99 of {arguments.requests} HTTP requests; client and node share the process and its clock",
    )  # fmt: skip


if __name__ == "__main__":
    main()
