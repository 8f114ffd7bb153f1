"""Several real nodes on loopback that share a cluster file with a key."""

import asyncio
import contextlib
import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from sllm_node.cluster import folder
from tests.e2e.process import NodeProcess

TIMING = """
[timing]
heartbeat_s = 0.2
suspect_s = 1.0
dead_s = 5.0
publish_gap_s = 0.02
"""
KV_BYTES = 1 << 20


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_cluster(place: Path, names, trust="key") -> Path:
    """Make a cluster file with these nodes; return it."""
    now = datetime.now(UTC)
    folder.init(place, trust, now)
    for name in names:
        folder.join(place, name, f"127.0.0.1:{free_port()}", now)
    file = place / folder.FILE
    file.write_text(file.read_text() + TIMING)
    return file


def start(stack, place: Path, name: str, store: Path, file: Path, **settings) -> NodeProcess:
    """Start a node that `stack` stops."""
    own = place / name
    own.mkdir(exist_ok=True)
    extra = f'\n[cluster]\nfile = "{file}"\n'
    given = {"memory_bytes": 16 << 20, "kv_cache_bytes": KV_BYTES, **settings}
    return stack.enter_context(NodeProcess(own, store, extra, id=name, **given))


async def get(url: str, path: str):
    async with aiohttp.ClientSession() as http, http.get(url + path) as response:
        return await response.json()


async def post(url: str, path: str, body):
    async with aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
        return response.status, await response.json()


async def until(url: str, path: str, holds):
    """Ask until `holds` of the answer; return it."""
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(url + path) as response:
                    found = await response.json()
                    if holds(found):
                        return found


async def sees(node: NodeProcess, *peers: str):
    """Wait until `node` places requests at `peers`."""

    def holds(report):
        known = {entry["id"] for entry in report["cluster"]["nodes"]}
        return known >= set(peers)

    return await until(node.url, "/admin/status", holds)


def events(node: NodeProcess, event: str) -> list[dict]:
    """Return the log lines of a node with this event."""
    lines = node.log.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line["event"] == event]
