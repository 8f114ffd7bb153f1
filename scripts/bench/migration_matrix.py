"""Who dies when, in a move of a session between real nodes: every cell of the matrix, hit on purpose.

    python -m scripts.bench.migration_matrix [--runs 20] [--groups 2] [--seed 0] [--minutes 60]
        [--phases matrix,upgrade] [--each FILE] [--json FILE]

matrix: three nodes (`migration_rig`), an entry without the model and two with it. A session runs at one, the
source, and is moved to the other. The destination stops at a brake (`braked`) while it loads, while it
resumes, with the last round on its way (the session is handed over, the destination not let go), or after
the handover (half of the runs: before its first token, half: after it). There the source, the destination or
the entry is killed with -9, or the link between the entry and one of them is cut: half of the runs to the
source, and half of these so that nobody is told, half with a reset. Then the brake is let go. A link heals
when the stream has ended and both ends were found empty. A run whose destination was not at the brake, or whose
session had ended, does not count and is done again. A second reader at the source's node runs along where that
node lives on.

Every stream must equal the unmoved one token by token, with its usage; what a reader had whose entry died must
be the beginning of it. Told are the reader's longest pause after the fault, when it was over, counted from the fault,
and the time until the nodes left have no session, no KV block and no lease: their model is then unloaded
without force. At last each node that is left answers a short request.

upgrade: `migration_upgrade`.

Exit status 1 if a token was lost, doubled or wrong, or anything was left anywhere.
"""

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from scripts.bench.figures import commit, describe_machine
from scripts.bench.migration import bodies
from scripts.bench.migration_rig import DEAD_S, Reader, Trio, compared, until
from scripts.bench.migration_upgrade import upgrade
from tests.e2e import cluster_nodes as nodes

ROLES: Final = ("source", "destination", "entry", "link")
PHASES: Final = ("loading", "resuming", "last round", "after handover")
BRAKES: Final = dict(zip(PHASES, ("loading", "resuming", "last", "going"), strict=True))
BODIES: Final = 12
SHORT: Final = {"prompt": "Still there?", "max_tokens": 8}
TRIES_MAX: Final = 4
QUIET_S: Final = 30.0
RESULT: Final = Path(__file__).parent / "results" / "migration_matrix.json"


class MissedError(Exception):
    """A run that did not hit its cell."""


class Run:
    """One fault in one move."""

    def __init__(self, group: "Group", role: str, phase: str, number: int) -> None:
        self.group = group
        self.trio = group.trio
        self.role, self.phase = role, phase
        self.is_first_half, self.is_told = number % 2 == 0, number % 4 >= 2
        self.name = f"run{random.getrandbits(40):x}"
        self.source = self.to = ""
        self.result: dict[str, Any] = {"role": role, "phase": phase}

    @property
    def victim(self) -> str | None:
        """Who is killed."""
        return {"source": self.source, "destination": self.to, "entry": "e"}.get(self.role)

    @property
    def cut(self) -> tuple[str, str]:
        """Whose link is cut."""
        return "e", self.source if self.is_first_half else self.to

    async def play(self) -> dict[str, Any]:
        """Do it; return what was seen."""
        reader, other = await self._begin()
        at = time.monotonic()
        await self._strike()
        is_entry = self.role == "entry"
        self.trio.nodes[self.to].stop_at()
        await reader.task
        ended = time.monotonic()
        self.result |= compared(reader, self.group.wanted[reader.name], is_cut=is_entry)
        if not is_entry:
            self.result |= {"go_on_s": reader.went_on_s(at), "gap_s": reader.gap_s(at)}
        alive = [name for name in self.trio.names if name != self.victim]
        left = await self.trio.quiet(
            [n for n in alive if other is None or n != self.source], QUIET_S
        )
        self.result["empty_s"] = time.monotonic() - (at if is_entry else ended)
        if other is not None:
            await other.task
            told = compared(other, self.group.wanted[other.name])
            self.result["other"] = told["problem"]
            left = left or await self.trio.quiet(alive, QUIET_S)
        self.result["left"] = left
        await self._mend(alive)
        return self.result

    async def _begin(self) -> tuple[Reader, Reader | None]:
        """Bring a session to where it is to be hit."""
        draw, trio = self.group.draw, self.trio
        known = draw.sample(["x", "y"], 2)
        await trio.settle("e", {known[0]: True, known[1]: self.phase != "loading"})
        reader = self.group.reader("e", self.name)
        await reader.events(10)
        found = await trio.where("e", self.name)
        if found is None:
            raise MissedError(f"no session: {reader.error}")
        session, self.source = found
        self.to = "y" if self.source == "x" else "x"
        lives_on = self.role in ("destination", "entry") or (self.role == "link")
        other = self.group.reader(self.source, self.name + "b") if lives_on else None
        if other is not None:
            await other.events(1)
        node, brake = trio.nodes[self.to], BRAKES[self.phase]
        is_late = self.phase == "after handover" and not self.is_first_half
        node.stop_at(*(() if is_late else (brake,)))
        status, told = await trio.ask("e", f"/admin/sessions/{session}/move", {"to": self.to})
        if status != 200:
            raise MissedError(told["error"]["message"])
        is_there = await until(
            (lambda: self._moved(told["migration"]))
            if is_late
            else (lambda: node.stands_at(brake)),
            10.0,
        )
        if not is_there or reader.task.done():
            raise MissedError("the destination did not come to the brake in time")
        return reader, other

    def _moved(self, number: str) -> bool:
        ended = self.trio.nodes["e"].events("session move ended")
        return any(event["migration"] == number for event in ended)

    async def _strike(self) -> None:
        if self.victim is not None:
            self.trio.nodes[self.victim].process.kill()
            return
        self.result["cut"] = "source" if self.is_first_half else "destination"
        self.result["is_told"] = self.is_told
        self.trio.network.part(self.cut, is_cut=True, is_told=self.is_told)

    async def _mend(self, alive: list[str]) -> None:
        """Bring back what was killed or cut, and see that everything works."""
        if self.role == "link":
            await until(lambda: False, DEAD_S)  # both ends know by now
            self.result["left"] = self.result["left"] or await self.trio.quiet(alive, QUIET_S)
            self.trio.network.part(self.cut, is_cut=False)
            await self.trio.see()
        holders = [name for name in alive if name != "e"]
        for name in alive:
            answer = self.group.reader(name, self.name + f"n{name}", SHORT)
            await answer.task
            told = compared(answer, self.group.short)["problem"]
            self.result["next"] = self.result.get("next") or told
        for name in holders:
            if self.victim is not None or self.role == "link":
                left = await self.trio.quiet([name], QUIET_S) or await self.trio.leases(name)
                self.result["left"] = self.result["left"] or left
        if self.victim is not None:
            await self.trio.restart(self.victim)


class Group:
    """Three nodes, and the cells that are run on them."""

    def __init__(self, trio: Trio, seed: int) -> None:
        self.trio = trio
        self.draw = random.Random(seed)
        self.bodies = bodies(self.draw, BODIES, (90, 120))
        self.unmoved: list[nodes.Streamed] = []
        self.wanted: dict[str, nodes.Streamed] = {}
        self.short = nodes.Streamed()
        self.missed: list[str] = []

    async def begin(self) -> None:
        """Start, and run all requests unmoved."""
        await self.trio.start()
        url = self.trio.nodes["x"].url
        self.unmoved = list(
            await asyncio.gather(*(nodes.Streamed().read(url, body) for body in self.bodies))
        )
        self.short = await nodes.Streamed().read(url, {**self.bodies[0], **SHORT})

    def reader(self, entry: str, name: str, change: dict[str, Any] | None = None) -> Reader:
        """Begin to read one of the requests."""
        index = 0 if change is not None else self.draw.randrange(BODIES)
        self.wanted[name] = self.unmoved[index]
        return Reader(self.trio.nodes[entry], {**self.bodies[index], **(change or {})}, name)

    async def cell(self, role: str, phase: str, number: int) -> dict[str, Any]:
        """Run one until it hits."""
        for _ in range(TRIES_MAX):
            run = Run(self, role, phase, number)
            try:
                return {**await run.play(), "misses": len(self.missed)}
            except (MissedError, TimeoutError, AssertionError) as error:
                self.missed.append(f"{role}, {phase}: {type(error).__name__} {error}"[:300])
                await self.reset()
        return {"role": role, "phase": phase, "problem": "never hit"}

    async def reset(self) -> None:
        """Bring the nodes to where they can begin again."""
        for pair in (("e", "x"), ("e", "y")):
            self.trio.network.part(pair, is_cut=False)
        for name, node in self.trio.nodes.items():
            node.stop_at()
            if node.process.poll() is not None:
                await self.trio.restart(name)
        await self.trio.see()
        await self.trio.quiet(list(self.trio.names), QUIET_S)


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Return ranks of what was measured, in seconds."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return {}
    ranks = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(found[min(len(found) - 1, int(part * len(found)))], 3)
        for name, part in ranks.items()
    }


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each cell."""
    rows = []
    for role in ROLES:
        for phase in PHASES:
            cell = [r for r in results if (r["role"], r["phase"]) == (role, phase)]
            hit = [result for result in cell if "empty_s" in result]
            problems = [
                f"{key}: {result[key]}"
                for result in cell
                for key in ("problem", "other", "next", "left")
                if result.get(key)
            ]
            rows.append({
                "struck": role, "when": phase, "runs": len(cell), "hit": len(hit),
                "lost": sum(result["lost"] for result in hit),
                "doubled": sum(result["doubled"] for result in hit), "problems": problems,
                "go_on_s": spread(result.get("go_on_s") for result in hit),
                "pause_s": spread(result.get("gap_s") for result in hit),
                "empty_s": spread(result["empty_s"] for result in hit),
            })  # fmt: skip
    return rows


def lines(file: Path) -> list[bytes]:
    """Return the lines of a file, which need not be there."""
    return file.read_bytes().splitlines() if file.exists() else []


async def matrix(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run all cells, spread over groups of nodes."""
    results = [orjson.loads(line) for line in lines(asked.each)]
    done = {(result["role"], result["phase"], result["number"]) for result in results}
    jobs = [(role, phase, n) for n in range(asked.runs) for role in asked.roles for phase in PHASES]
    jobs = [job for job in reversed(jobs) if job not in done]
    deadline = time.monotonic() + 60 * asked.minutes
    missed: list[str] = []

    async def work(number: int) -> None:
        own = place / f"group{number}"
        own.mkdir()
        group = Group(Trio(own, ("e", "x", "y"), ("x", "y"), asked.step_s), asked.seed + number)
        try:
            await group.begin()
            while jobs and time.monotonic() < deadline:
                job = jobs.pop()
                results.append(found := {"number": job[2], **await group.cell(*job)})
                with asked.each.open("ab") as each:
                    each.write(orjson.dumps(found) + b"\n")
        finally:
            missed.extend(group.missed)
            await group.trio.close()

    await asyncio.gather(*(work(number) for number in range(asked.groups)))
    rows = summary(results)
    return {"cells": rows, "missed_and_done_again": missed, "runs": len(results)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=20, help="of each cell")
    parser.add_argument("--groups", type=int, default=2, help="of three nodes, side by side")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after these")
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--streams", type=int, default=64, help="of the upgrade")
    parser.add_argument("--roles", default=",".join(ROLES))
    parser.add_argument("--phases", default="matrix,upgrade")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument(
        "--each", type=Path, default=RESULT.with_suffix(".jsonl"),
        help="a line for each run; runs that it has already are not made again, so slices are possible",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, help="work here and keep the logs")
    asked = parser.parse_args()
    asked.roles = asked.roles.split(",")
    return asked


def main() -> int:
    """Measure, print, write."""
    asked = parsed()
    is_bad, measured = False, commit()
    with tempfile.TemporaryDirectory() as name:
        for phase in asked.phases.split(","):
            place = (asked.keep or Path(name)) / phase
            place.mkdir(parents=True)
            work = matrix if phase == "matrix" else upgrade
            found = asyncio.run(work(asked, place))
            found |= {
                "machine": describe_machine(), "commit": measured,
                "date": datetime.now(UTC).isoformat(), "command": shlex.join(
                    ["python", "-m", "scripts.bench.migration_matrix", *sys.argv[1:]]
                ),
            }  # fmt: skip
            known = orjson.loads(asked.json.read_bytes()) if asked.json.exists() else {}
            known[phase] = found
            asked.json.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2) + b"\n")
            for row in found.get("cells", [found]):
                print(orjson.dumps(row).decode(), flush=True)
                is_bad |= bool(row["problems"])
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
