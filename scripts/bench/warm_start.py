"""From a request to the first byte moving, for a model that lies in DRAM and not on the device.

python -m scripts.bench.warm_start --requests 300
A whole node and its client run in one process, so one clock times both: from just before the client
sends its HTTP request to the call that enqueues the first chunk's copy. Every request asks for
keep_alive 0, so the model leaves the device after it; DRAM keeps its bytes.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import uvloop

from scripts.bench.figures import record
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import Config, parse_config
from sllm_node.core.types import ModelId
from sllm_node.device import cpu
from sllm_node.node.node import Node
from sllm_node.node.systemd import Notifier
from tests.models import make_checkpoint

CONFIG = """
[store]
path = "{store}"
pool_bytes = "64MiB"
chunk_bytes = "1MiB"
[device]
memory_bytes = "256MiB"
[engine]
kv_cache_bytes = "8MiB"
torch_threads = 1
[server]
port = 0
"""
BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "keep_alive": 0}


class FirstCopy:
    """Notes when the first copy after `reset` is enqueued."""

    def __init__(self) -> None:
        self.at: float | None = None
        enqueue = cpu.CpuStream.copy_in

        def copy_in(stream: cpu.CpuStream, *values: object) -> None:
            if self.at is None:
                self.at = time.perf_counter()
            enqueue(stream, *values)  # type: ignore[arg-type]

        cpu.CpuStream.copy_in = copy_in  # type: ignore[method-assign,assignment]

    def reset(self) -> None:
        self.at = None


async def measure(config: Config, requests: int) -> list[float]:
    first = FirstCopy()
    node = Node(config, Notifier({}), MonotonicClock())
    await node.start()
    waits_ms = []
    try:
        async with aiohttp.ClientSession() as http:
            for number in range(requests + 5):  # the first ones warm up
                while node.is_on_device(ModelId("tiny")):  # noqa: ASYNC110 - a benchmark may wait so
                    await asyncio.sleep(0)
                first.reset()
                start = time.perf_counter()
                async with http.post(f"{node.url}/v1/completions", json=BODY) as response:
                    assert response.status == 200, await response.text()
                    await response.read()
                assert first.at is not None
                if number >= 5:
                    waits_ms.append(1e3 * (first.at - start))
    finally:
        await node.stop(asyncio.Event())
    return waits_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), "tiny", hidden_size=512, intermediate_size=2048)
        config = parse_config(CONFIG.format(store=folder))
        waits_ms = sorted(uvloop.run(measure(config, arguments.requests)))
    p99 = waits_ms[int(0.99 * (len(waits_ms) - 1))]
    print(
        f"request to first byte moving: median {statistics.median(waits_ms):.2f} ms, p99 {p99:.2f} ms"
    )
    record(
        "warm_request_to_first_byte_ms", p99, [round(wait, 4) for wait in waits_ms],
        command=f"python -m scripts.bench.warm_start --requests {arguments.requests}",
        note=f"p99 of {len(waits_ms)} HTTP requests; client and node share the process and its clock",
    )  # fmt: skip


if __name__ == "__main__":
    main()
