"""Startup latency of ours against the paper's policy in simulation, and how long a thousand nodes take.

    python -m scripts.bench.simulation ratio [--seeds 20] [--rates 6,12,18]
    python -m scripts.bench.simulation thousand --trace code.csv [--scale 20]

`ratio` runs both policies over the same requests (configs/simulation.toml, Gamma arrivals, CV 8) for each
load and seed, and takes the ratio of their P99 startup latencies; its interval is a bootstrap of the
median over seeds. The first `--apart` seeds run again with equal mechanisms, which tells the gain of
placement from that of codec, peers, clones and keep-alive. `thousand` measures the first ten minutes
of a trace on 1,000 nodes, twice, and compares the digests. Results go to results/simulation.json.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scripts.bench import figures
from sllm_node.sim.description import Description, load_description
from sllm_node.sim.runs import MECHANISMS, run
from sllm_node.sim.trace import Gamma, cut, gamma_rows, read_rows, scaled

RESULTS = figures.HERE / "results" / "simulation.json"
COMMAND = "python -m scripts.bench.simulation"
APART = ("paper", "keep", "ours")


@dataclass(frozen=True)
class Load:
    """One load of the comparison."""

    described: Description
    rate: float
    duration_s: float

    def p99(self, policy: str, seed: int, mechanisms: str = "own") -> float:
        gamma = Gamma(self.rate, 8.0, self.duration_s)
        equal = MECHANISMS[mechanisms]
        report = run(self.described, gamma_rows(gamma, seed), policy, seed, mechanisms=equal)
        return report.to_first_token_s.p99

    def pairs(self, seeds: range, mechanisms: str = "own") -> dict[str, Any]:
        ours = [self.p99("ours", seed, mechanisms) for seed in seeds]
        paper = [self.p99("serverlessllm", seed, mechanisms) for seed in seeds]
        ratios = [a / b for a, b in zip(ours, paper, strict=True)]
        return {
            "ours_p99_s": ours,
            "serverlessllm_p99_s": paper,
            "ratios": ratios,
            **interval(ratios),
        }


def interval(values: list[float]) -> dict[str, float]:
    """Return the median and the bounds in which it lies with 95 %."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.asarray(values), (2000, len(values))), axis=1)
    low, high = (float(v) for v in np.percentile(medians, [2.5, 97.5]))
    return {"median": float(np.median(values)), "low": low, "high": high}


def ratio(options: argparse.Namespace, described: Description) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rate in map(float, options.rates.split(",")):
        load = Load(described, rate, options.duration_s)
        found[f"{rate:g}"] = entry = load.pairs(range(options.seeds))
        print(
            f"{rate:g} requests/s: {entry['median']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})",
            flush=True,
        )
        save("ratio", found, options)
    for rate in map(float, options.rates.split(",")):
        load = Load(described, rate, options.duration_s)
        for mechanisms in APART if options.apart else ():
            apart = load.pairs(range(options.apart), mechanisms)
            found[f"{rate:g}"][f"all_with_{mechanisms}"] = apart
            print(f"{rate:g} requests/s, all with {mechanisms}: {apart['median']:.3f}", flush=True)
        save("ratio", found, options)
    worst = max(found.values(), key=lambda entry: float(entry["median"]))
    if options.seeds >= 20 and len(found) >= 3:
        figures.record(
            "startup_p99_over_serverlessllm",
            worst["median"],
            worst["ratios"],
            command=f"{COMMAND} ratio",
        )
    return found


def thousand(options: argparse.Namespace, described: Description) -> dict[str, Any]:
    change = msgspec.structs.replace
    more = 1000 // described.nodes[0].count
    described = change(
        described,
        nodes=(change(described.nodes[0], count=1000),),
        models=tuple(change(m, count=m.count * more // 4) for m in described.models),
        limits=change(described.limits, publish_s=1.0),
    )
    with options.trace.open() as lines:
        rows = scaled(cut(read_rows(lines, str(options.trace)), 0, 600), options.scale, 1)
    taken, cpu, digests, reports = [], [], [], []
    for _ in range(2):
        wall, process = time.perf_counter(), time.process_time()
        report = run(described, rows, "ours", 1)
        taken.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - process)
        digests.append(report.digest)
        reports.append(msgspec.to_builtins(report))
        print(
            f"{len(rows)} requests in {taken[-1]:.1f} s (processor {cpu[-1]:.1f} s), {report.digest}"
        )
    assert digests[0] == digests[1], "two runs of one seed differ"
    figures.record(
        "simulate_1000_nodes_s", max(taken), taken,
        note=f"{len(rows):,} requests, each of the trace {options.scale:g} times; processor time {max(cpu):.0f} s",
        command=f"{COMMAND} thousand --trace {options.trace.name} --scale {options.scale:g}",
    )  # fmt: skip
    found = {"requests": len(rows), "wall_s": taken, "processor_s": cpu, "digest": digests[0],
             "report": reports[0]}  # fmt: skip
    save("thousand", found, options)
    return found


def save(key: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[key] = {
        "found": found, "machine": figures.describe_machine(), "commit": figures.commit(),
        "options": {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(options).items()
        },
    }  # fmt: skip
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("ratio", "thousand"))
    parser.add_argument(
        "--cluster", type=Path, default=figures.ROOT / "configs" / "simulation.toml"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--apart", type=int, default=3)
    parser.add_argument("--rates", default="6,12,18")
    parser.add_argument("--duration-s", type=float, default=90.0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--scale", type=float, default=20.0)
    options = parser.parse_args()
    described = load_description(options.cluster)
    (ratio if options.what == "ratio" else thousand)(options, described)


if __name__ == "__main__":
    main()
