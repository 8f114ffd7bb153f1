"""Sessions with long contexts that move between nodes which have others to serve. Used by `cluster_gpu`."""

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.cluster_logs import summary
from tests.e2e.process import NodeProcess

ENDED: Final = "session move ended"
WARM_TOKENS: Final = 32
"""That the moving session has before its move, and behind it."""
BESIDE_PROMPT: Final = 64
BESIDE_OUTPUT: Final = 12_000
MOVER_OUTPUT: Final = 8_000
"""More than a move takes: all are left before."""
MOVE_LIMIT_S: Final = 60.0
ROOM_BEHIND: Final = 0.4
"""Of a model's context, that outputs may take."""


class Stream:
    """A stream that is read until it is told to stop."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, body: dict[str, Any], name: str
    ) -> None:
        self.name = name
        self.times: list[float] = []
        """When each token came."""
        self.error: str | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read(http, url, body))

    async def _read(self, http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        headers = {"x-request-id": self.name}
        try:
            async with http.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    self.error = f"{response.status} {await response.text()}"
                    return
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self._take(orjson.loads(line[6:]))
        except aiohttp.ClientError as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self._changed.set()

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = str(event["error"])
        now = time.perf_counter()
        for choice in event.get("choices", ()):
            self.times += [now] * len((choice["logprobs"] or {"tokens": []})["tokens"])
        self._changed.set()

    async def reach(self, tokens: int) -> bool:
        """Wait until so many tokens have come; False: it has ended before."""
        while len(self.times) < tokens and not self._task.done():
            self._changed.clear()
            await self._changed.wait()
        return len(self.times) >= tokens

    def rate(self, start: float, end: float) -> float | None:
        """Return tokens a second between two moments; None: the time is too short to tell."""
        if end - start < 0.02 or not self.times:
            return None
        return sum(start <= at < end for at in self.times) / (end - start)

    async def stop(self) -> None:
        """Leave it, as a reader does that goes away."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


class Tail:
    """The moves that a node's log tells of, as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size
        self.ended: dict[str, dict[str, Any]] = {}

    def look(self) -> None:
        """Read what is new."""
        with self._path.open("rb") as file:
            file.seek(self._at)
            *lines, _ = file.read().split(b"\n")
        self._at += sum(len(line) + 1 for line in lines)
        for line in lines:
            if ENDED.encode() in line:
                told = orjson.loads(line)
                self.ended[told["migration"]] = told


class Moves:
    """Moves by length of context."""

    def __init__(
        self,
        nodes: Mapping[str, NodeProcess],
        http: aiohttp.ClientSession,
        model: str,
        asked: argparse.Namespace,
        fail: Callable[[str], None],
    ) -> None:
        self._nodes, self._http, self._model, self._fail = nodes, http, model, fail
        self._asked = asked
        self._draw = random.Random(asked.seed)
        self._samples: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._count = 0
        self._context = 0

    async def run(self, until: float) -> dict[str, Any]:
        """Take all contexts in turn until the time is over."""
        for node in self._nodes.values():
            async with self._http.post(
                f"{node.url}/admin/models/{self._model}/load", json={}
            ) as response:
                self._context = (await response.json())["context_tokens"]
        names = list(self._nodes)
        rounds = 0
        while time.perf_counter() < until:
            for context in self._asked.contexts:
                if time.perf_counter() < until:
                    await self._sample(context, names[rounds % len(names)], is_counted=rounds > 0)
            rounds += 1
        rows = [self._row(context) for context in self._asked.contexts]
        return {"rounds": rounds, "rows": rows, "samples": dict(self._samples)}

    def _stream(self, node: str, prompt: int, output: int) -> Stream:
        self._count += 1
        ids = [self._draw.randrange(4, 300) for _ in range(prompt)]
        body = {
            "model": self._model, "prompt": ids, "max_tokens": output, "temperature": 0,
            "ignore_eos": True, "logprobs": 1, "stream": True,
        }  # fmt: skip
        return Stream(self._http, self._nodes[node].url, body, f"m{self._count}x")

    async def _sample(self, context: int, entry: str, *, is_counted: bool) -> None:
        """Move one session once, with others beside it at all nodes."""
        prompt = min(context, int((1 - ROOM_BEHIND) * self._context))
        output = min(MOVER_OUTPUT, self._context - prompt - 2)
        beside_output = min(BESIDE_OUTPUT, self._context - BESIDE_PROMPT - 2)
        beside = {
            name: [
                self._stream(name, BESIDE_PROMPT, beside_output) for _ in range(self._asked.beside)
            ]
            for name in self._nodes
        }
        every = [stream for streams in beside.values() for stream in streams]
        mover = self._stream(entry, prompt, output)
        try:
            for stream in (*every, mover):
                if not await stream.reach(WARM_TOKENS):
                    self._fail(f"move of {context}: {stream.name} ended early: {stream.error}")
                    return
            found = await self._moved(mover, entry, beside)
            if found is not None and is_counted:
                self._samples[context].append(found)
        finally:
            await asyncio.gather(*(stream.stop() for stream in (*every, mover)))
        broken = [stream.error for stream in (*every, mover) if stream.error is not None]
        for error in broken:
            self._fail(f"move of {context}: {error}")

    async def _session_of(self, entry: str, name: str) -> dict[str, Any] | None:
        async with self._http.get(f"{self._nodes[entry].url}/admin/status") as response:
            report = await response.json()
        for session in report["sessions"]:
            if session["session"].startswith(name):
                return dict(session)
        return None

    async def _moved(
        self, mover: Stream, entry: str, beside: Mapping[str, list[Stream]]
    ) -> dict[str, Any] | None:
        session = await self._session_of(entry, mover.name)
        if session is None:
            self._fail(f"{mover.name} is not in the status of {entry}")
            return None
        source = session["node"] or entry
        to = self._draw.choice([name for name in self._nodes if name != source])
        tail = Tail(self._nodes[entry].log)
        ready = len(mover.times)
        begun = time.perf_counter()
        url = f"{self._nodes[entry].url}/admin/sessions/{session['session']}/move"
        async with self._http.post(url, json={"to": to}) as response:
            told = await response.json()
            if response.status != 200:
                self._fail(f"move to {to} refused: {told}")
                return None
        end = await self._ended(tail, told["migration"], begun)
        over = time.perf_counter()
        if end is None or end["outcome"] != "moved":
            self._fail(f"move {source} to {to} ended: {end}")
            return None
        if not await mover.reach(len(mover.times) + WARM_TOKENS):
            self._fail(f"{mover.name} ended behind its move: {mover.error}")
            return None
        return self._figures(mover, ready, (begun, over), beside[source], end)

    async def _ended(self, tail: Tail, number: str, begun: float) -> dict[str, Any] | None:
        while number not in tail.ended and time.perf_counter() < begun + MOVE_LIMIT_S:
            await asyncio.sleep(0.005)
            tail.look()
        return tail.ended.get(number)

    def _figures(
        self,
        mover: Stream,
        ready: int,
        during: tuple[float, float],
        others: list[Stream],
        end: dict[str, Any],
    ) -> dict[str, Any]:
        before = [late - early for early, late in pairwise(mover.times[:ready])][4:]
        behind = [late - early for early, late in pairwise(mover.times[ready - 1 :])]
        step_s = statistics.median(before)
        begun, over = during
        quiet = begun - min(1.0, begun - mover.times[0])
        shares = []
        for stream in others:
            usual, meanwhile = stream.rate(quiet, begun), stream.rate(begun, over)
            if usual and meanwhile is not None:
                shares.append(1 - meanwhile / usual)
        tokens = end["tokens"] + end["prompt_tokens"]
        return {
            "step_ms": 1e3 * step_s, "pause_ms": 1e3 * max(behind),
            "beyond_a_step_ms": 1e3 * (max(behind) - step_s), "move_s": over - begun,
            "told_gap_s": end["gap_s"], "bytes_a_token": end["bytes"] / tokens,
            "rounds": end["rounds"] + 1, "last_round": end["last_round"], "tokens": tokens,
            "others_slower": statistics.fmean(shares) if shares else None,
        }  # fmt: skip

    def _row(self, context: int) -> dict[str, Any]:
        found = self._samples.get(context, [])
        if not found:
            return {"context": context, "moves": 0}
        slower = [one["others_slower"] for one in found if one["others_slower"] is not None]
        beyond = summary([one["beyond_a_step_ms"] for one in found])
        return {
            "context": context, "moves": len(found),
            "step_ms": round(statistics.median(one["step_ms"] for one in found), 2),
            "beyond_p50_ms": beyond["median"], "beyond_p99_ms": beyond["p99"],
            "move_s": round(statistics.median(one["move_s"] for one in found), 3),
            "bytes_a_token": round(statistics.fmean(one["bytes_a_token"] for one in found), 2),
            "others_slower": round(statistics.fmean(slower), 3) if slower else None,
        }  # fmt: skip
