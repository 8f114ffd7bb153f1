"""What the logs of a cluster's nodes say of a run: loads, ways, estimates. Used by `scripts.bench.cluster`."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

WARM_LOADS: Final = 5
"""Loads of a node after which its estimates count as warm."""
GOOD_SHARE, GOOD_S = 0.20, 0.005
PARTS: Final = ("queue", "load", "forward")
Delay = Callable[[str, float, float], float]
"""How long a node's event loop waited for a processor, between two times."""
_LINES: Final = {
    "serving", "first token given", "load started", "load finished", "load failed", "request placed", "session started",
    "forwarded session refused", "placement refused", "session lost its node", "peer lost",
    "routed session failed",
}  # fmt: skip


class Logs:
    """The lines of all nodes in all their lives."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._lives = 0
        self.errors: list[str] = []

    def read(self, node: str, path: Path) -> None:
        """Take in what a node wrote in one life."""
        self._lives += 1
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["level"] == "error":
                self.errors.append(f"{node}: {text[:600]}")
            if line["event"] in _LINES:
                line["at"] = datetime.fromisoformat(line["time"]).timestamp()
                # A node puts a tag of its own behind the id that the client sent.
                line["asked"] = line.get("request", "").rpartition("-")[0]
                self.lines.append({**line, "on": node, "life": self._lives})

    def report(self, sent_at: Mapping[str, float], delay: Delay | None = None) -> dict[str, Any]:
        """Return the figures; `sent_at`: the wall clock when a request was sent, by its id."""
        self.lines.sort(key=lambda line: line["at"])
        counts = Counter(line["event"] for line in self.lines)
        placed = {line["asked"]: line for line in self.lines if line["event"] == "request placed"}
        return {
            "events": dict(sorted(counts.items())),
            "log_errors": self.errors[:5],
            "log_errors_count": len(self.errors),
            "arrival_to_load_begun_ms": self._begun(sent_at, placed),
            "startup_ms_by_way": self._startups(placed),
            "estimates": self._estimates(placed, delay),
            "prefill_estimates": self._prefills(),
        }

    def _begun(
        self, sent_at: Mapping[str, float], placed: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return how long after it was sent a request's load began, by way.

        A node that has not had a request for a model reads its tokenizer meanwhile. A load that begins when
        a request ends is another's, although it has the same id in the log.
        """
        by_way: dict[str, list[float]] = defaultdict(list)
        known: set[tuple[int, str]] = set()
        for line in self.lines:
            told = placed.get(line["asked"])
            is_begin = line["event"] == "load started" and line["asked"] in sent_at
            is_own = told is not None and (told["node"], told["model"]) == (
                line["on"],
                line.get("model"),
            )
            if is_begin and told is not None and is_own:
                where = "here" if told["on"] == line["on"] else "peer"
                before = "known" if (told["life"], told["model"]) in known else "new"
                taken_ms = 1e3 * (line["at"] - sent_at[line["asked"]])
                by_way[f"{told['way']} {where}, tokenizer {before}"].append(taken_ms)
            if line["event"] == "session started":
                known.add((line["life"], line["model"]))
        return {way: summary(found) for way, found in sorted(by_way.items())}

    def _prefills(self) -> dict[str, Any]:
        """Return how good estimates were of the time from a session's grant to its first token."""
        told = [line for line in self.lines if line["event"] == "first token given"]
        ones = [Started(line["expected_s"], line["prefill_s"]) for line in told]
        return errors(ones) if ones else {}

    def _started(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "session started"]

    def _startups(self, placed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, list[float]] = defaultdict(list)
        for line in self._started():
            found[_way(line, placed)].append(1e3 * line["startup_s"])
        return {way: summary(values) for way, values in sorted(found.items())}

    def _estimates(
        self, placed: Mapping[str, Mapping[str, Any]], delay: Delay | None
    ) -> dict[str, Any]:
        """Return how good estimates of nodes were that had loaded a few times since they started."""
        loads: Counter[str] = Counter()
        found: dict[str, list[Started]] = defaultdict(list)
        for line in self.lines:
            if line["event"] == "serving":
                loads[line["on"]] = 0
            if line["event"] == "load finished":
                loads[line["on"]] += 1
            if line["event"] == "session started" and loads[line["node"]] >= WARM_LOADS:
                begun, nodes = line["at"] - line["startup_s"], {line["on"], line["node"]}
                delay_s = delay and sum(delay(node, begun, line["at"]) for node in nodes)
                one = started_of(line, delay_s)
                found[_way(line, placed)].append(one)
                found["all"].append(one)
        return {way: errors(ones) for way, ones in sorted(found.items())}


def _way(line: Mapping[str, Any], placed: Mapping[str, Mapping[str, Any]]) -> str:
    """Return by which way a session started: kind, where its bytes came from, here or at a peer."""
    told = placed.get(line["asked"])
    if told is None:
        return "unknown"
    source = told["why"].rpartition(" from ")[2].rstrip(")") if " from " in told["why"] else ""
    where = "here" if line["node"] == line["on"] else "peer"
    return " ".join(part for part in (told["way"], source, where) if part)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return count, median, 90th and 99th percentile and the greatest."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    return {
        "count": len(ordered), "median": round(statistics.median(ordered), 2),
        "p90": at(0.9), "p99": at(0.99), "max": round(ordered[-1], 2),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Started:
    """A session that ran so long after it was placed."""

    expected_s: float
    actual_s: float
    delay_s: float | None = None
    """Of it, the event loops of its nodes waited for a processor; None: not measured."""
    off_s: Mapping[str, float] = field(default_factory=dict)
    """By part: how much longer it took than estimated."""

    @property
    def error_s(self) -> float:
        """Return how much longer it took in all."""
        return self.actual_s - self.expected_s

    def is_good(self, *, without_delays: bool = False) -> bool:
        """Tell whether it was within 20 % or 5 ms, whichever is more; `without_delays`: but for these."""
        excess_s = self.error_s
        if without_delays and excess_s > 0:
            excess_s = max(0.0, excess_s - (self.delay_s or 0.0))
        return abs(excess_s) <= max(GOOD_S, GOOD_SHARE * self.actual_s)


def started_of(line: Mapping[str, Any], delay_s: float | None = None) -> Started:
    """Return what a line of a node's log says of a session that started."""
    off = {part: line[f"{part}_off_s"] for part in PARTS if f"{part}_off_s" in line}
    return Started(line["expected_s"], line["startup_s"], delay_s, off)


def errors(ones: Sequence[Started]) -> dict[str, Any]:
    """Return how far estimates were from what came, in all and by part."""
    found = {
        "error_ms": summary([1e3 * abs(one.error_s) for one in ones]),
        "bias_ms": round(1e3 * statistics.mean(one.error_s for one in ones), 2),
        "share_good": _share(one.is_good() for one in ones),
    }
    delays = [1e3 * one.delay_s for one in ones if one.delay_s is not None]
    if delays:
        clear = _share(one.is_good(without_delays=True) for one in ones)
        found |= {"share_good_without_run_delays": clear, "run_delay_ms": summary(delays)}
    split = [one for one in ones if one.off_s]
    if split:
        found["parts"] = {part: _part(part, split) for part in PARTS}
    return found


def _part(part: str, ones: Sequence[Started]) -> dict[str, Any]:
    """Return by how much a part was off, and of how many bad estimates it was most of the error."""
    off = [1e3 * one.off_s[part] for one in ones]
    bad = [one.off_s for one in ones if not one.is_good()]
    return {
        "error_ms": summary([abs(value) for value in off]),
        "bias_ms": round(statistics.mean(off), 2),
        "most_of_bad": sum(part == max(PARTS, key=lambda name: abs(one[name])) for one in bad),
    }


def _share(values: Iterable[bool]) -> float:
    kept = list(values)
    return round(sum(kept) / len(kept), 4)
