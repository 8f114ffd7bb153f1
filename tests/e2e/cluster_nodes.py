"""Several real nodes on loopback that share a cluster file with a key."""

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from tests.e2e.process import NodeProcess
from tests.ports import free_port

TIMING = """
[timing]
heartbeat_s = 0.2
suspect_s = 3.0
dead_s = 10.0
publish_gap_s = 0.02
"""
"""Nobody is held suspect because the machine is busy."""
QUICK = """
[timing]
heartbeat_s = 0.2
suspect_s = 1.0
dead_s = 5.0
publish_gap_s = 0.02
"""
"""For benchmarks, and where a silence is waited for."""
KV_BYTES = 1 << 20
LOOK_S = 0.02
"""Between two looks at a node, which may need the processor for what is looked for."""


def make_cluster(place: Path, names, trust="key", timing=TIMING) -> Path:
    """Make a cluster file with these nodes; return it."""
    from sllm_node.cluster import folder  # which wants cryptography

    now = datetime.now(UTC)
    folder.init(place, trust, now)
    for name in names:
        folder.join(place, name, f"127.0.0.1:{free_port()}", now)
    file = place / folder.FILE
    file.write_text(file.read_text() + timing)
    return file


def make_listed_cluster(place: Path, endpoint: str) -> Path:
    """Make a cluster file that names no node but a directory; return it."""
    from sllm_node.cluster import folder

    folder.init(place, "key", datetime.now(UTC))
    file = place / folder.FILE
    table = f'[directory]\nendpoints = ["{endpoint}"]\nlease_s = 5\ntimeout_s = 2.0\n'
    file.write_text(file.read_text() + TIMING + table)
    return file


def made(place: Path, name: str, store: Path, file: Path, address="", **settings) -> NodeProcess:
    """Return a node of the cluster, not started yet."""
    own = place / name
    own.mkdir(exist_ok=True)
    extra = f'\n[cluster]\nfile = "{file}"\naddress = "{address}"\n'
    given = {"memory_bytes": 16 << 20, "kv_cache_bytes": KV_BYTES, **settings}
    return NodeProcess(own, store, extra, id=name, **given)


@contextlib.contextmanager
def running(*nodes: NodeProcess):
    """Start the nodes side by side; stop them at the end."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(nodes)) as starters:
        starts = [starters.submit(node.__enter__) for node in nodes]
        for node, started in zip(nodes, starts, strict=True):
            started.result()
            stack.push(node)
        yield list(nodes)


async def get(url: str, path: str):
    async with aiohttp.ClientSession() as http, http.get(url + path) as response:
        return await response.json()


async def post(url: str, path: str, body):
    async with aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
        return response.status, await response.json()


async def until(url: str, path: str, holds):
    """Ask until `holds` of the answer; return it."""
    async with asyncio.timeout(120), aiohttp.ClientSession() as http:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(url + path) as response:
                    found = await response.json()
                    if holds(found):
                        return found
            await asyncio.sleep(LOOK_S)


async def sees(node: NodeProcess, *peers: str):
    """Wait until `node` places requests at `peers`."""

    def holds(report):
        known = {entry["id"] for entry in report["cluster"]["nodes"]}
        return known >= set(peers)

    return await until(node.url, "/admin/status", holds)


async def logged(node: NodeProcess, event: str, holds=lambda line: True):
    """Wait for a log line with this event of which `holds`; return it."""
    async with asyncio.timeout(120):
        while True:
            for line in node.events(event):
                if holds(line):
                    return line
            await asyncio.sleep(LOOK_S)


def brake(*them: NodeProcess) -> None:
    """Let sessions decode slowly at all of these nodes."""
    for node in them:
        node.brake()


def release(*them: NodeProcess) -> None:
    """Let sessions decode as fast as they can."""
    for node in them:
        node.release()


def serving(node: NodeProcess, *others: NodeProcess) -> NodeProcess:
    """Return which of `others` serves the session that `node` placed last."""
    placed = node.events("request placed")[-1]["node"]
    return next(other for other in others if other.config.parent.name == placed)


class Streamed:
    """A streamed completion, read event by event."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[str] = []
        self.finish: str | None = None
        self.usage: dict[str, int] = {}

    async def read(self, url: str, body, on_event=lambda count: None, headers=None) -> "Streamed":
        """Read to the end; tell `on_event` how many events have come."""
        count = 0
        async with aiohttp.ClientSession(headers=headers) as http:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async with http.post(url + "/v1/completions", json={**body, **options}) as response:
                assert response.status == 200, await response.text()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self.take(json.loads(line[6:]))
                        count += 1
                        on_event(count)
        return self

    def take(self, event) -> None:
        assert "error" not in event, event
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.text += choice["text"]
            self.tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
            self.finish = choice["finish_reason"] or self.finish
