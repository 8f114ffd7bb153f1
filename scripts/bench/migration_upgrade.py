"""A rolling upgrade under load: each node in turn gets SIGTERM, hands its sessions on, ends, and starts again.

Three nodes with the model, `--streams` readers at once spread over all of them, sampled and greedy. A
reader whose stream has ended begins another at a node that takes some, as behind a load balancer: so there
are as many open streams all the time. A node that drains gives its sessions to the others, and stays for its
own readers until their streams have ended. No stream may fail, none may differ from the unmoved one.
Used by `scripts.bench.migration_matrix`.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from scripts.bench.migration import bodies
from scripts.bench.migration_rig import Reader, Trio, compared
from tests.e2e import cluster_nodes as nodes

NAMES: Final = ("a", "b", "c")
BODIES: Final = 24
STEP_S: Final = 0.1
"""Of a batch of 21 to 32 sessions: what a large model takes, and what the cores of the bench bear."""
TOKENS: Final = (60, 110)


class Upgrade:
    """What all readers share."""

    def __init__(self, trio: Trio, seed: int) -> None:
        self.trio = trio
        self.draw = random.Random(seed)
        self.bodies = bodies(self.draw, BODIES, TOKENS)
        self.unmoved: list[nodes.Streamed] = []
        self.open_at = list(NAMES)
        """Nodes that take requests."""
        self.is_over = False
        self.readers: list[Reader] = []
        self.problems: list[str] = []
        self.refused = 0

    async def begin(self) -> None:
        """Start, and run all requests unmoved."""
        await self.trio.start()
        await self.trio.settle("a", dict.fromkeys(NAMES, True))
        urls = [self.trio.nodes[name].url for name in NAMES]
        work = (nodes.Streamed().read(urls[i % 3], body) for i, body in enumerate(self.bodies))
        self.unmoved = list(await asyncio.gather(*work))

    async def client(self, number: int) -> None:
        """Read one stream after another."""
        while not self.is_over:
            index = self.draw.randrange(BODIES)
            entry = self.open_at[number % len(self.open_at)]
            name = f"up{self.draw.getrandbits(40):x}"
            reader = Reader(self.trio.nodes[entry], self.bodies[index], name)
            await reader.task
            if not reader.times and "draining" in reader.error:  # it was no stream yet
                self.refused += 1
                continue
            self.readers.append(reader)
            if problem := compared(reader, self.unmoved[index])["problem"]:
                self.problems.append(f"{name} at {entry}: {problem}")

    async def roll(self) -> list[dict[str, Any]]:
        """Drain and restart each node."""
        rows = []
        for name in NAMES:
            node, at = self.trio.nodes[name], time.monotonic()
            self.open_at.remove(name)
            node.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(node.process.wait)
            drained = node.events("drained")
            row = {"node": name, "drained_s": round(time.monotonic() - at, 2)}
            row["sessions_ended"] = drained[0]["sessions_ended"] if drained else "no clean end"
            if row["sessions_ended"] != 0 or not node.events("stopped"):
                self.problems.append(f"{name} did not drain: {row}")
            await self.trio.restart(name)
            await self.trio.ask(name, "/admin/models/m/load", {})
            self.open_at.append(name)
            rows.append(row)
            sys.stderr.write(f"{row}\n")
        return rows


def ranks(values: list[float]) -> dict[str, float]:
    """Return p50, p99 and the greatest."""
    found = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {k: round(found[min(len(found) - 1, int(p * len(found)))], 4) for k, p in at.items()}


async def upgrade(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run it; return the report."""
    trio = Trio(place, NAMES, NAMES, STEP_S, drain_s=240.0)
    run = Upgrade(trio, asked.seed)
    try:
        await run.begin()
        clients = [asyncio.create_task(run.client(number)) for number in range(asked.streams)]
        await asyncio.sleep(20 * STEP_S)
        rows = await run.roll()
        run.is_over = True
        await asyncio.gather(*clients)
        left = await trio.quiet(list(NAMES), 30.0)
        moves = list(trio.events("session move ended"))
    finally:
        await trio.close()
    gaps = [move["gap_s"] for move in moves if move["outcome"] == "moved" and move["gap_s"]]
    moved = {move["session"].partition("-")[0] for move in moves if move["outcome"] == "moved"}
    pauses = [
        [r.gap_s() for r in run.readers if (r.name in moved) == is_so] for is_so in (True, False)
    ]
    outcomes: dict[str, int] = {}
    for move in moves:
        outcomes[move["outcome"]] = outcomes.get(move["outcome"], 0) + 1
    return {
        "open_streams": asked.streams, "streams": len(run.readers), "step_s": STEP_S,
        "failed_or_wrong": len(run.problems), "problems": [*run.problems[:20], *([left] if left else [])],
        "refused_and_sent_elsewhere": run.refused, "nodes": rows, "moves": outcomes,
        "gap_of_a_move_s": ranks(gaps) if gaps else {},
        "longest_pause_of_moved_streams_s": ranks(pauses[0]) if pauses[0] else {},
        "longest_pause_of_others_s": ranks(pauses[1]) if pauses[1] else {},
    }  # fmt: skip
