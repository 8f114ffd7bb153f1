"""Sessions that move between real nodes while they run.

    python -m scripts.bench.migration [--sessions 200] [--minutes 15] [--seed 0] [--json FILE]

Three nodes on loopback with one tiny fp32 model. Every session of mixed sampling is run unmoved first, then
by a reader of a random node and moved 1 to 5 times at random tokens: tokens, text and usage must be equal.
Exit status 1 if a token was lost, added or repeated, or a session stayed on a node. Moves that come too late
are told. Who dies when in a move: `scripts.bench.migration_matrix`.
"""

import argparse
import asyncio
import contextlib
import os
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.figures import commit, describe_machine
from tests.e2e import cluster_nodes as nodes
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

MODEL: Final = "m"
NAMES: Final = ("a", "b", "c")
BODIES: Final = 24
ENDED: Final = "session move ended"


def bodies(
    draw: random.Random, count: int = BODIES, tokens: tuple[int, int] = (200, 360)
) -> list[dict[str, Any]]:
    """Return requests of mixed sampling."""
    found = []
    for index in range(count):
        body: dict[str, Any] = {
            "model": MODEL, "prompt": f"Question {index} " + "words " * draw.randint(1, 12),
            "max_tokens": draw.randint(*tokens), "ignore_eos": True, "logprobs": 1,
            "temperature": draw.choice((0, 0.7, 1.2)), "seed": index,
        }  # fmt: skip
        if index % 3 == 1:
            body |= {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        if index % 4 == 2:
            body |= {"top_k": 20, "logit_bias": {"5": 2.0}}
        found.append(body)
    return found


class Bench:
    """The nodes, and what was found."""

    def __init__(self, trio: list[NodeProcess], draw: random.Random, deadline: float) -> None:
        self.nodes = dict(zip(NAMES, trio, strict=True))
        self.draw = draw
        self.deadline = deadline
        self.bodies = bodies(draw)
        self.wanted: list[nodes.Streamed] = []
        self.wrong: list[str] = []
        self.refused: Counter[str] = Counter()
        self.done = 0

    @property
    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline

    async def references(self) -> None:
        """Run all requests unmoved."""
        node = self.nodes["b"]
        self.wanted = [await nodes.Streamed().read(node.url, body) for body in self.bodies]

    def check(self, index: int, found: nodes.Streamed, what: str) -> None:
        """Compare a stream with the unmoved one."""
        wanted = self.wanted[index]
        pairs = zip(found.tokens, wanted.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted.tokens))
        counts = [
            [stream.usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            for stream in (found, wanted)
        ]
        where = f"{what}: request {index}"
        if at < len(wanted.tokens) or len(found.tokens) != len(wanted.tokens):
            lengths = f"{len(found.tokens)} tokens of {len(wanted.tokens)}"
            self.wrong.append(f"{where}: {lengths}, the first other one at {at}")
        elif found.text != wanted.text:
            self.wrong.append(f"{where}: another text of the same tokens")
        elif counts[0] != counts[1]:
            self.wrong.append(f"{where}: usage {counts[0]}, not {counts[1]}")

    async def sessions(self, count: int, at_once: int) -> None:
        """Run `count` sessions with moves."""
        left = iter(range(count))

        async def worker(number: int) -> None:
            for run in left:
                if self.is_over:
                    return
                await self.moved(run % BODIES, NAMES[(number + run) % 3])

        await asyncio.gather(*(worker(number) for number in range(at_once)))

    async def moved(self, index: int, entry: str) -> None:
        """Run one session with a reader at `entry` and 1 to 5 moves."""
        body = self.bodies[index]
        points = set(self.draw.sample(range(3, body["max_tokens"] - 20), self.draw.randint(1, 5)))
        moving: list[asyncio.Task[Any]] = []
        name = f"run{self.done}x{index}{entry}{self.draw.randint(0, 10**9)}"

        def at(event: int) -> None:
            if event in points:
                moving.append(asyncio.create_task(self.move(entry, name)))

        try:
            found = await read(self.nodes[entry].url, body, name, at)
            self.check(index, found, name)
        except (AssertionError, aiohttp.ClientError) as error:
            self.wrong.append(f"{name}: {error}"[:300])
        await asyncio.gather(*moving)
        self.done += 1

    async def move(self, entry: str, name: str) -> None:
        """Move a session of `entry` to another node than it is at."""
        url = self.nodes[entry].url
        with contextlib.suppress(aiohttp.ClientError):
            for session in (await nodes.get(url, "/admin/status"))["sessions"]:
                if session["session"].startswith(name):
                    at = session["node"] or entry
                    to = self.draw.choice([n for n in NAMES if n != at])
                    path = f"/admin/sessions/{session['session']}/move"
                    status, told = await nodes.post(url, path, {"to": to})
                    if status == 200:
                        return
                    self.refused[told["error"]["message"].rpartition(": ")[2]] += 1

    async def rest(self) -> None:
        """See that no session stayed anywhere."""
        for name, node in self.nodes.items():
            report = await nodes.get(node.url, "/admin/status")
            if report["sessions"] or any(model["running"] for model in report["models"]):
                self.wrong.append(f"node {name} has sessions left")


async def read(
    url: str, body: dict[str, Any], name: str, at: Any, found: nodes.Streamed | None = None
) -> nodes.Streamed:
    """Read a stream under a request id of ours, into `found`, which keeps what came if it breaks."""
    found = nodes.Streamed() if found is None else found
    return await found.read(url, body, at, {"x-request-id": name})


def summary(moves: list[dict[str, Any]]) -> dict[str, Any]:
    """Return figures of moves, as the readers' nodes logged them."""
    done = [move for move in moves if move["outcome"] == "moved"]
    gaps = sorted(move["gap_s"] for move in done if move["gap_s"] is not None)
    sent = [m["bytes"] / (m["tokens"] + m["prompt_tokens"]) for m in done if m["bytes"]]

    def rank(part: float) -> float | None:
        return gaps[min(len(gaps) - 1, int(part * len(gaps)))] if gaps else None

    return {
        "outcomes": dict(Counter(move["outcome"] for move in moves)),
        "gap_s": {"p50": rank(0.5), "p99": rank(0.99), "max": rank(1.0)},
        "bytes_a_token": round(sum(sent) / len(sent), 2) if sent else None,
        "rounds": dict(sorted(Counter(move["rounds"] + 1 for move in done).items())),
        "last_round_tokens": dict(sorted(Counter(move["last_round"] for move in done).items())),
    }


async def measure(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run it all; return the report."""
    file = nodes.make_cluster(place / "shared", NAMES, timing=nodes.QUICK)
    (place / "store").mkdir()
    make_checkpoint(place / "store", MODEL, seed=3, chunk_bytes=65536)
    made = [nodes.made(place, name, place / "store", file) for name in NAMES]
    with nodes.running(*made) as trio:
        for node in trio:
            await nodes.sees(node, *NAMES)
        bench = Bench(trio, random.Random(asked.seed), time.monotonic() + 60 * asked.minutes)
        await bench.references()
        await bench.sessions(asked.sessions, asked.at_once)
        moves = [move for node in trio for move in node.events(ENDED)]
        await bench.rest()
    return {
        "sessions": bench.done, "wrong": bench.wrong, "moves": summary(moves),
        "refused": dict(bench.refused),
    }  # fmt: skip


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=15.0, help="begin nothing new after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        found = asyncio.run(measure(asked, Path(place)))
    head = {
        "date": datetime.now(UTC).isoformat(),
        "commit": commit(),
        "machine": describe_machine(),
        "load_before": round(load, 2),
        "command": shlex.join(["python", "-m", "scripts.bench.migration", *sys.argv[1:]]),
    }
    report = {**head, "seed": asked.seed, **found}
    if asked.json is not None:
        asked.json.write_bytes(
            orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
        )
    print(f"{found['sessions']} sessions, {found['moves']}, refused {found['refused']}")
    for problem in found["wrong"]:
        print(f"WRONG: {problem}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
