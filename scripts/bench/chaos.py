"""Everything at once for minutes: streams, cancels, bad requests, loads, unloads, more models than fit.

    python -m scripts.bench.chaos --minutes 30 [--clients 24] [--device cpu] [--seed 0] [--json FILE]
        [--shape 8b --copies 3]

Starts a node of its own on loopback with tiny models of several families of which about half fit, and
ends it. With `--shape` there are as many copies of a model of this shape beside them (random weights, on
the disk of temporary files): a third of those fit on the device and two thirds into the pool. Each client draws what to do next: a stream to its end, a stream that it leaves in the middle,
a request that is wrong, or an operator's act. That there is no room beside what operators have pinned is an answer as well.
Each minute tells how far it is, and an interrupt ends it early. At the end everything is unloaded, without
force. Exit status 1 if a stream failed, had another number of tokens than asked for or a usage that is not right,
if a wrong request was answered by anything but 4xx, if KV blocks, sessions or device memory did not go
back to zero, or if memory of the process grew by more than `--growth-mib` after the first quarter.
"""

import argparse
import asyncio
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import psutil

from scripts.bench import random_checkpoint
from scripts.bench.figures import commit, describe_machine
from scripts.bench.soak import data_lines, watch
from sllm_node.core.units import MIB, align_up
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

FAMILIES: Final = ("llama", "qwen3", "mistral", "gpt2", "mixtral", "gemma2")
WRONG: Final[tuple[dict[str, Any], ...]] = (
    {"temperature": 9}, {"max_tokens": 0}, {"max_tokens": 10**6}, {"no_such_field": 1},
    {"model": "no-such-model"}, {"prompt": 7}, {"logit_bias": {"x": 1}}, {"top_p": -1}, {"n": 10**6},
)  # fmt: skip
ERRORS_MAX: Final = 20
TOLD_S: Final = 60.0
KV_BYTES: Final = 8 * MIB
LARGE_KV_BYTES: Final = 256 * MIB
LARGE_CHUNK_BYTES: Final = 16 * MIB
STAGING_BYTES: Final = 512 * MIB
"""What decoding has of a device; the default."""
PINNED: Final = "device_memory_pinned"
GPU_GRAIN: Final = 2 * MIB
"""Weights on a GPU take whole pages of this size."""


class Chaos:
    """What all clients share."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, seed: int, models: tuple[str, ...]
    ) -> None:
        self.session = session
        self.url = url
        self.models = models
        self.draw = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.tokens = 0
        self.is_over = False

    def body(self) -> dict[str, Any]:
        """Return a request of any kind."""
        draw = self.draw
        body: dict[str, Any] = {
            "model": draw.choice(self.models), "stream": True, "ignore_eos": True,
            "prompt": "many words " * draw.randint(1, 20), "max_tokens": draw.randint(1, 40),
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if draw.random() < 0.6:
            body |= {"temperature": draw.uniform(0.1, 1.5), "seed": draw.randint(0, 9)}
        if draw.random() < 0.3:
            body |= {"top_p": draw.uniform(0.1, 1.0), "presence_penalty": draw.uniform(-1, 1)}
        if draw.random() < 0.2:
            body |= {"logit_bias": {"5": draw.uniform(-5, 5)}, "frequency_penalty": 0.4}
        return body

    async def stream(self, leave_after: int | None = None) -> str:
        """Run a stream to its end, or leave it after so many events."""
        body, usage, events = self.body(), None, 0
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                text = await response.text()
                return (
                    "pinned out"
                    if PINNED in text
                    else self.fail(f"{response.status} {text} to {body}")
                )
            async for chunk in data_lines(response):
                if "error" in chunk:
                    text = str(chunk["error"])
                    return "pinned out" if PINNED in text else self.fail(f"{text} to {body}")
                events += 1
                usage = chunk.get("usage") or usage
                if events == leave_after:
                    return "left"
        made = usage["completion_tokens"] if isinstance(usage, dict) else None
        if made != body["max_tokens"]:
            return self.fail(f"{made} tokens to {body}")
        self.tokens += body["max_tokens"]
        return "finished"

    async def wrong(self) -> str:
        """Ask for what can't be."""
        body = self.body() | self.draw.choice(WRONG)
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            text = await response.text()
            if not 400 <= response.status < 500 or "error" not in orjson.loads(text):
                return self.fail(f"{response.status} {text} to {body}")
        return "refused"

    async def operate(self) -> str:
        """Load or unload a model, or look; a refusal because it is in use is an answer as well."""
        act, model = (
            self.draw.choice(("load", "unload", "pin", "unpin")),
            self.draw.choice(self.models),
        )
        url = f"{self.url}/admin/models/{model}/{act}"
        async with self.session.post(url, json={}) as response:
            if response.status >= 500 and response.status != 503:
                return self.fail(f"{response.status} {await response.text()} to {act} {model}")
        async with self.session.post(f"{self.url}/admin/models/{model}/unpin", json={}):
            return act

    def fail(self, error: str) -> str:
        """Keep an error."""
        self.errors.append(error[:600])
        print(error[:600], flush=True)
        return "failed"

    async def client(self, until: float) -> None:
        """Do one thing after another."""
        while not self.is_over and time.perf_counter() < until and len(self.errors) < ERRORS_MAX:
            share = self.draw.random()
            if share < 0.6:
                self.done[await self.stream()] += 1
            elif share < 0.8:
                self.done[await self.stream(self.draw.randint(1, 12))] += 1
            elif share < 0.93:
                self.done[await self.wrong()] += 1
            else:
                self.done[await self.operate()] += 1

    def end(self) -> None:
        """Let the clients end what they are doing, and begin nothing more."""
        self.is_over = True

    async def tell(self, until: float) -> None:
        """Say each minute how far it is; return when it is over."""
        begun = time.perf_counter()
        while not self.is_over and (left_s := until - time.perf_counter()) > 0:
            await asyncio.sleep(min(TOLD_S, left_s))
            minutes = (time.perf_counter() - begun) / 60
            told = ", ".join(f"{count} {what}" for what, count in sorted(self.done.items()))
            print(f"{minutes:.1f} min: {told}", flush=True)

    async def settle(self) -> dict[str, Any]:
        """Unload everything and return what is left."""
        for model in self.models:
            async with self.session.post(
                f"{self.url}/admin/models/{model}/unload", json={}
            ) as response:
                if response.status != 200:
                    self.fail(f"{response.status} {await response.text()} to the last unload")
        async with self.session.get(f"{self.url}/admin/status") as response:
            status = await response.json()
        async with self.session.get(f"{self.url}/metrics") as response:
            usage = re.findall(
                r"^sllm_kv_cache_usage_perc\S* (\S+)$", await response.text(), re.MULTILINE
            )
        return {
            "sessions": len(status["sessions"]),
            "device_bytes_used": sum(device["used"] for device in status["devices"]),
            "kv_usage": sum(float(one) for one in usage),
        }


async def measure(
    node: NodeProcess, arguments: argparse.Namespace, models: tuple[str, ...]
) -> tuple[Chaos, list[float], dict[str, Any]]:
    """Let the clients loose."""
    memory_mib: list[float] = []
    until = time.perf_counter() + 60 * arguments.minutes
    timeout = aiohttp.ClientTimeout(total=None, sock_read=180)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        chaos = Chaos(session, node.url, arguments.seed, models)
        watching = asyncio.create_task(watch(psutil.Process(node.process.pid), until, memory_mib))
        telling = asyncio.create_task(chaos.tell(until))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, chaos.end)
        async with asyncio.TaskGroup() as group:
            for _ in range(arguments.clients):
                group.create_task(chaos.client(until))
        for task in (watching, telling):
            task.cancel()
        return chaos, memory_mib, await chaos.settle()


def beside_large(size: int, half: int, copies: int) -> dict[str, Any]:
    """Return what the node is given when models of `size` bytes are there as well."""
    each = align_up(size, GPU_GRAIN) + LARGE_KV_BYTES
    return {
        "chunk_bytes": LARGE_CHUNK_BYTES, "kv_cache_bytes": LARGE_KV_BYTES,
        "memory_bytes": STAGING_BYTES
        + max(copies // 3, 1) * each
        + half
        + len(FAMILIES) // 2 * LARGE_KV_BYTES,
        "pool_bytes": align_up(2 * copies * size // 3, LARGE_CHUNK_BYTES) + 16 * LARGE_CHUNK_BYTES,
    }  # fmt: skip


def main() -> int:
    """Run, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mib", type=int, default=0, help="of the device")
    parser.add_argument("--shape", default="", help="of larger models beside the tiny ones")
    parser.add_argument("--copies", type=int, default=3, help="of these")
    parser.add_argument("--growth-mib", type=float, default=96.0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        store.mkdir()
        sizes = [make_checkpoint(store, family, family).index.size for family in FAMILIES]
        taken = sum(KV_BYTES + align_up(size, GPU_GRAIN) for size in sizes) // 2
        half = (28 << 20) + sum(sizes) // 2 if arguments.device == "cpu" else taken * 4 // 3
        settings: dict[str, Any] = {
            "kv_cache_bytes": KV_BYTES,
            "memory_bytes": (arguments.memory_mib << 20) or half,
            "device": arguments.device,
        }
        large = tuple(f"{arguments.shape}-{number}" for number in range(arguments.copies))
        if arguments.shape:
            size = random_checkpoint.write_served(store, arguments.shape, large)
            settings |= beside_large(size, settings["memory_bytes"], len(large))
        models = (*FAMILIES, *large) if arguments.shape else FAMILIES
        begun = time.perf_counter()
        with NodeProcess(Path(name), store, **settings) as node:
            chaos, memory_mib, left = asyncio.run(measure(node, arguments, models))
            minutes = (time.perf_counter() - begun) / 60
            faults = [line for line in node.log.read_text().splitlines() if "Traceback" in line]
    quarter = memory_mib[len(memory_mib) // 4 :]
    half = len(quarter) // 2
    growth = statistics.median(quarter[half:]) - statistics.median(quarter[:half])
    result = {
        "minutes": round(minutes, 2), "clients": arguments.clients, "device": arguments.device,
        "seed": arguments.seed, "models": models, "done": dict(chaos.done), "tokens": chaos.tokens,
        "errors": len(chaos.errors), "left": left, "memory_last_mib": quarter[-1],
        "memory_growth_mib": growth, "machine": describe_machine(),
        "command": f"python -m scripts.bench.chaos --minutes {arguments.minutes:g} --seed {arguments.seed} "
        f"--clients {arguments.clients} --device {arguments.device}"
        + f" --shape {arguments.shape} --copies {arguments.copies}" * bool(arguments.shape),
        "commit": commit(), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key:20} {value}")
    for line in faults[:3]:
        print(line)
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    healthy = not chaos.errors and not any(left.values()) and growth <= arguments.growth_mib
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
