"""What the logs of a cluster's nodes say of a run: loads, ways, estimates. Used by `scripts.bench.cluster`."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

WARM_LOADS: Final = 5
"""Loads of a node after which its estimates count as warm."""
GOOD_SHARE, GOOD_S = 0.20, 0.005
_LINES: Final = {
    "load started", "load finished", "load failed", "request placed", "session started",
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

    def report(self, sent_at: Mapping[str, float]) -> dict[str, Any]:
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
            "estimates": self._estimates(placed),
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

    def _started(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "session started"]

    def _startups(self, placed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, list[float]] = defaultdict(list)
        for line in self._started():
            found[_way(line, placed)].append(1e3 * line["startup_s"])
        return {way: summary(values) for way, values in sorted(found.items())}

    def _estimates(self, placed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        loads: Counter[str] = Counter()
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for line in self.lines:
            if line["event"] == "load finished":
                loads[line["on"]] += 1
            if line["event"] == "session started" and loads[line["node"]] >= WARM_LOADS:
                pair = (line["expected_s"], line["startup_s"])
                found[_way(line, placed)].append(pair)
                found["all"].append(pair)
        return {way: errors(pairs) for way, pairs in sorted(found.items())}


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


def errors(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return how far estimates were from what came; good is 20 % or 5 ms, whichever is more."""
    apart = [abs(actual - expected) for expected, actual in pairs]
    good = [
        gap <= max(GOOD_S, GOOD_SHARE * actual)
        for gap, (_, actual) in zip(apart, pairs, strict=True)
    ]
    signed = [actual - expected for expected, actual in pairs]
    return {
        "error_ms": summary([1e3 * gap for gap in apart]),
        "bias_ms": round(1e3 * statistics.mean(signed), 2),
        "share_good": round(sum(good) / len(good), 4),
    }
