"""What migration is worth in simulation, 64 nodes x 8 devices: moves against none, and against preemption.

    python -m scripts.bench.migration_simulated --trace code.csv [--seeds 20] [--only code-100,gamma-40]

Three policies that differ in nothing else place the same requests: `ours`, `ours-without-moves` and
`ours-preempting`. Loads are stretches of the Azure code trace, every request so many times, and Gamma
arrivals (CV 8, 512 tokens out on average) at so many requests a second.

What a seed is: of `code`, the same 40 seconds (the first burst that lasts, from the third minute), with other
models for the requests and the copies at other moments within their second. Of `stretch`, another stretch: the
trace is cut into 40 seconds each, and those with 200 requests or more are taken in their order, one a seed, its
models drawn anew as well. Of `gamma`, other arrivals. None of them is another trace.

Of each seed: P50 and P99 of the startup latency, and P50, P99 and sum of the pauses of sessions that moved or
were stopped.
Intervals are bootstraps of the median over seeds, of ratios those of the median of the seeds' ratios.
Results go to results/migration_simulated.json, after each seed.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.bench import figures
from scripts.bench.simulation import interval
from sllm_node.sim.description import Description, load_description
from sllm_node.sim.report import Report
from sllm_node.sim.runs import run
from sllm_node.sim.trace import Gamma, Row, cut, gamma_rows, read_rows, scaled

RESULTS = figures.HERE / "results" / "migration_simulated.json"
POLICIES = ("ours", "ours-without-moves", "ours-preempting")
LOADS = {"code-100": 40.0, "stretch-100": 40.0, "gamma-40": 90.0, "gamma-120": 30.0}
"""Kind, how much of it, and how many seconds."""
START_S = 180.0
"""Of the trace: the first burst in it that lasts."""
BUSY = 200
"""Requests that make a stretch of the trace one of those compared."""


def rows_of(load: str, trace: list[Row], seed: int) -> list[Row]:
    """Return the requests of a load: what it is called says how many."""
    kind, much = load.split("-")
    if kind in {"code", "stretch"}:
        rows = (
            busy(trace, LOADS[load])[seed]
            if kind == "stretch"
            else cut(trace, START_S, LOADS[load])
        )
        return scaled(rows, float(much), seed)
    return gamma_rows(Gamma(float(much), 8.0, LOADS[load], tokens_out=512.0), seed)


def busy(trace: list[Row], length_s: float) -> list[list[Row]]:
    """Return the stretches of a trace, side by side, that have requests enough."""
    count = int(trace[-1].at_s // length_s) + 1
    parts = (cut(trace, number * length_s, length_s) for number in range(count))
    return [rows for rows in parts if len(rows) >= BUSY]


def measures(report: Report) -> dict[str, float]:
    """Return what is compared of one run."""
    first, pause = report.to_first_token_s, report.pause_s
    thousand = report.requests / 1000
    return {
        "startup_mean_s": first.mean, "startup_p50_s": first.p50, "startup_p99_s": first.p99,
        "pause_p50_s": pause.p50, "pause_p99_s": pause.p99,
        "paused_s_per_1000_requests": pause.mean * report.pauses / thousand,
        "pauses_per_1000_requests": report.pauses / thousand,
        "loads_per_1000_requests": sum(report.loads.values()) / thousand,
        "timeouts": float(report.counts.get("timeout", 0)), "requests": float(report.requests),
    }  # fmt: skip


def compare(
    described: Description, load: str, trace: list[Row], seeds: int
) -> Iterator[dict[str, Any]]:
    """Run all policies over all seeds; after each seed, yield what is known so far."""
    each: dict[str, dict[str, list[float]]] = {policy: {} for policy in POLICIES}
    if load.startswith("stretch"):
        seeds = min(seeds, len(busy(trace, LOADS[load])))
    for seed in range(seeds):
        rows = rows_of(load, trace, seed)
        for policy in POLICIES:
            for name, value in measures(run(described, rows, policy, seed)).items():
                each[policy].setdefault(name, []).append(value)
        yield summary(each)


def summary(each: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return medians and intervals, of each policy and of the ratios of ours to the others."""
    found: dict[str, Any] = {
        policy: {name: {**interval(values), "seeds": values} for name, values in of.items()}
        for policy, of in each.items()
    }
    for policy in POLICIES[1:]:
        found[f"ours_over_{policy}"] = {
            name: interval([a / b for a, b in zip(each["ours"][name], each[policy][name], strict=True)])
            for name in ("startup_mean_s", "startup_p50_s", "startup_p99_s")
        }  # fmt: skip
    return found


def show(load: str, found: dict[str, Any], took_s: float) -> None:
    print(f"{load} ({took_s:.0f} s)", flush=True)
    for name, of in found.items():
        what = ", ".join(
            f"{key} {value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
            for key, value in of.items()
        )
        print(f"  {name}: {what}", flush=True)


def save(load: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    path: Path = options.out
    known = json.loads(path.read_text()) if path.exists() else {}
    known[load] = {
        "found": found, "machine": figures.describe_machine(), "commit": figures.commit(),
        "cluster": options.cluster.name, "trace": options.trace.name,
        "seeds": len(found["ours"]["requests"]["seeds"]),
    }  # fmt: skip
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join(LOADS))
    parser.add_argument(
        "--cluster", type=Path, default=figures.ROOT / "configs" / "simulation-64x8.toml"
    )
    options = parser.parse_args()
    described = load_description(options.cluster)
    with options.trace.open() as lines:
        trace = read_rows(lines, str(options.trace))
    for load in options.only.split(","):
        begun = time.perf_counter()
        for found in compare(described, load, trace, options.seeds):
            save(load, found, options)
        show(load, found, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
