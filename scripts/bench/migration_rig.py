"""Three slowed nodes that can be stopped, killed, cut off and looked at; used by `migration_matrix`."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.braked import BrakedNode
from scripts.bench.cluster_net import relayed
from scripts.bench.migration import MODEL, read
from tests.e2e import cluster_nodes as nodes
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

TIMING: Final = """
[timing]
heartbeat_s = 0.3
suspect_s = 1.2
dead_s = 3.0
publish_gap_s = 0.02
"""
DEAD_S: Final = 3.0
KV_BYTES: Final = 20 << 20
"""For 64 sessions of 512 tokens, and some."""
LOOK_S: Final = 0.01


class Reader:
    """A stream, what came of it, and when."""

    def __init__(self, node: NodeProcess, body: dict[str, Any], name: str) -> None:
        self.body = body
        self.name = name
        self.found = nodes.Streamed()
        self.times: list[float] = []
        self.error = ""
        self._url = node.url
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            await read(self._url, self.body, self.name, self._at, self.found)
        except (AssertionError, aiohttp.ClientError, OSError) as error:
            self.error = f"{type(error).__name__}: {error}"[:300]
        self._news.set()

    def _at(self, _: int) -> None:
        self.times.append(time.monotonic())
        self._news.set()

    async def events(self, count: int) -> None:
        """Wait until so many have come, or it has ended."""
        while len(self.times) < count and not self.task.done():
            self._news.clear()
            await self._news.wait()

    def gap_s(self, since: float = 0.0) -> float:
        """Return its longest pause that ended after `since`."""
        return self._longest(since)[0]

    def went_on_s(self, since: float) -> float:
        """Return how long after `since` that pause was over."""
        return max(0.0, self._longest(since)[1] - since)

    def _longest(self, since: float) -> tuple[float, float]:
        return max(((b - a, b) for a, b in pairwise(self.times) if b > since), default=(0.0, 0.0))


def compared(reader: Reader, wanted: nodes.Streamed, *, is_cut: bool = False) -> dict[str, Any]:
    """Return tokens lost, doubled and wrong of a stream; `is_cut`: its entry died, so a part of it is right."""
    found = reader.found.tokens
    pairs = zip(found, wanted.tokens, strict=False)
    same = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted.tokens))
    )
    is_beginning = same == len(found)
    if is_cut:
        problem = "" if is_beginning and wanted.text.startswith(reader.found.text) else "not a part"
        return {"lost": 0, "doubled": 0, "problem": problem}
    counts = [
        [stream.usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        for stream in (reader.found, wanted)
    ]
    problem = reader.error
    if same < len(wanted.tokens) or not is_beginning:
        problem = problem or f"{len(found)} tokens of {len(wanted.tokens)}, another one at {same}"
    elif reader.found.text != wanted.text:
        problem = problem or "another text of the same tokens"
    elif counts[0] != counts[1]:
        problem = problem or f"usage {counts[0]}, not {counts[1]}"
    lost, doubled = len(wanted.tokens) - len(found), len(found) - len(wanted.tokens)
    return {"lost": max(0, lost), "doubled": max(0, doubled), "problem": problem}


class Trio:
    """Three nodes and the relays between them; those of `holders` have the model."""

    def __init__(
        self, place: Path, names: tuple[str, ...], holders: tuple[str, ...],
        step_s: float, **settings: Any,
    ) -> None:  # fmt: skip
        self.names = names
        file = nodes.make_cluster(place / "shared", names, timing=TIMING)
        self.network, files = relayed(file, names, is_bad=False)
        for kind in ("all", "none"):
            (place / kind).mkdir()
        make_checkpoint(place / "all", MODEL, seed=3, chunk_bytes=65536)
        self.nodes: dict[str, BrakedNode] = {}
        for name in names:
            store = place / ("all" if name in holders else "none")
            self.nodes[name] = node = self._made(place, name, store, files[name], **settings)
            node.step_s = step_s

    @staticmethod
    def _made(place: Path, name: str, store: Path, file: Path, **settings: Any) -> BrakedNode:
        own = place / name
        own.mkdir()
        given = {
            "memory_bytes": 64 << 20,
            "kv_cache_bytes": KV_BYTES,
            "id": name,
            "braked": True,
            **settings,
        }
        return BrakedNode(own, store, f'\n[cluster]\nfile = "{file}"\n', **given)

    async def start(self) -> None:
        """Start them all."""
        await self.network.start()
        with ThreadPoolExecutor(len(self.names)) as starters:
            starts = [starters.submit(node.__enter__) for node in self.nodes.values()]
            await asyncio.gather(*map(asyncio.wrap_future, starts))
        await self.see()

    async def see(self) -> None:
        """Wait until all see all."""
        for node in self.nodes.values():
            await nodes.sees(node, *self.names)

    async def restart(self, name: str) -> None:
        """Start one again that was killed or has ended."""
        node = self.nodes[name]
        await asyncio.to_thread(node.process.wait)
        node.stop_at()
        await asyncio.to_thread(node.__enter__)
        await self.see()

    async def close(self) -> None:
        """End them all."""
        for node in self.nodes.values():
            node.process.kill()
        await self.network.close()

    async def ask(self, name: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Post to a node."""
        status, told = await nodes.post(self.nodes[name].url, path, body)
        return int(status), told

    async def settle(self, asker: str, loaded: dict[str, bool]) -> None:
        """Load or unload the model at nodes, and wait until `asker` knows."""
        for name, is_loaded in loaded.items():
            act = "load" if is_loaded else "unload"
            status, told = await self.ask(name, f"/admin/models/{MODEL}/{act}", {})
            assert status == 200, told

        def holds(report: dict[str, Any]) -> bool:
            seen = {
                node["id"]: any(m["id"] == MODEL and m["device"] for m in node["models"])
                for node in report["cluster"]["nodes"]
            }
            return all(seen.get(name) == is_loaded for name, is_loaded in loaded.items())

        await nodes.until(self.nodes[asker].url, "/admin/status", holds)

    async def where(self, entry: str, name: str) -> tuple[str, str] | None:
        """Return a session of `entry` by its request's name, and the node that it is at."""
        for session in (await nodes.get(self.nodes[entry].url, "/admin/status"))["sessions"]:
            if session["session"].startswith(name):
                return session["session"], session["node"] or entry
        return None

    async def left(self, name: str) -> str:
        """Return what of sessions, reservations and KV blocks a node has; empty: nothing."""
        url = self.nodes[name].url
        report = await nodes.get(url, "/admin/status")
        async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
            text = await response.text()
        usage = re.findall(r"^sllm_kv_cache_usage_perc\S* (\S+)$", text, re.MULTILINE)
        counts = [model["running"] + model["waiting"] for model in report["models"]]
        found = {
            "sessions": len(report["sessions"]), "running or waiting": sum(counts),
            "on devices": sum(device["sessions"] for device in report["devices"]),
            "kv usage": sum(map(float, usage)),
        }  # fmt: skip
        return ", ".join(f"{key} {value:g}" for key, value in found.items() if value)

    async def leases(self, name: str) -> str:
        """Unload the model without force, which a lease would hinder; return what is left."""
        status, told = await self.ask(name, f"/admin/models/{MODEL}/unload", {})
        report = await nodes.get(self.nodes[name].url, "/admin/status")
        used = sum(device["used"] for device in report["devices"])
        return "" if status == 200 and not used else f"unload: {status} {told}, {used} bytes used"

    async def quiet(self, names: list[str], limit_s: float) -> str:
        """Wait until nothing is left at these nodes; return what is in the end."""
        until = time.monotonic() + limit_s
        while True:
            found = {name: left for name in names if (left := await self.left(name))}
            if not found or time.monotonic() > until:
                return "; ".join(f"{name}: {left}" for name, left in found.items())
            await asyncio.sleep(LOOK_S)

    def events(self, event: str) -> Iterator[dict[str, Any]]:
        """Yield log lines of all lives of all nodes."""
        for node in self.nodes.values():
            for log in node.logs:
                for line in log.read_bytes().splitlines():
                    with contextlib.suppress(orjson.JSONDecodeError):
                        found = orjson.loads(line)
                        if found.get("event") == event:
                            yield found


async def until(holds: Callable[[], bool], limit_s: float) -> bool:
    """Wait until something holds; False: it did not in time."""
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(LOOK_S / 3)
    return True
