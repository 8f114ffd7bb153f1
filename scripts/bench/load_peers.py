"""Loading compared with its peers on one box with a GPU, in one command and within nine minutes.

python -m scripts.bench.load_peers --folder DIR --out DIR
Writes Llama-3.1-8B's shape to FOLDER twice (safetensors and ours, 32 GB), runs `cached` and `random`
with all installed peers and the ablation, writes tables, samples and plots to OUT, prints a short
table last. Rounds end when the time is up; --keep leaves the files for another run.

python -m scripts.bench.load_peers --record OUT/summary.json
puts what such a run found into the register of figures.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench import figures
from sllm_node.bench.ceilings import PLAIN_READER
from sllm_node.bench.compare import ComparisonPlan, compare
from sllm_node.bench.contestants import CONTESTANT_NAMES, OF_OURS, OURS
from sllm_node.bench.devices import cuda_count
from sllm_node.bench.machine import one_line
from sllm_node.bench.shapes import SHAPE_NAMES
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import SllmError

BUDGET_S = 460.0
"""Of the nine minutes; starting Python, plots and removing the files take the rest."""


def measure(arguments: argparse.Namespace) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    store = Path(tempfile.mkdtemp(prefix="load-peers-", dir=arguments.folder))
    store = arguments.folder / "load-peers" if arguments.keep else store
    store.mkdir(exist_ok=True)
    plan = ComparisonPlan(
        store=store,
        shape=arguments.shape,
        device=arguments.device,
        rounds=arguments.rounds,
        contestants=tuple(arguments.contestants.split(",")),
        with_ablation=True,
        budget_s=arguments.budget,
        out=arguments.out,
        command=f"python -m scripts.bench.load_peers --shape {arguments.shape} --rounds {arguments.rounds}",
    )
    try:
        report = compare(
            plan, StoreConfig(), MonotonicClock(), lambda text: print(text, flush=True)
        )
    finally:
        if not arguments.keep:
            shutil.rmtree(store, ignore_errors=True)
    print(report.as_text())
    print(report.short())


def record(path: Path, results: Path = figures.RESULTS) -> None:
    """Put the figures of a run on a GPU into the register."""
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    raw = json.loads(path.with_name("raw.json").read_text(encoding="utf-8"))
    names = {
        "cached_speedup_over_safetensors": ("cached", "safetensors"),
        "random_speedup_over_best_peer": ("random", best_peer(summary, "random")),
    }
    for figure, (scenario, peer) in names.items():
        if figure not in summary["figures"] or peer is None:
            continue
        samples = [
            theirs / ours
            for theirs, ours in zip(
                seconds(raw, scenario, peer), seconds(raw, scenario, OURS), strict=False
            )
        ]
        figures.record(
            figure, summary["figures"][figure], samples, machine=one_line(summary["machine"]),
            command=summary["machine"]["command"], note=f"{summary['title']}, over {peer}", path=results,
        )  # fmt: skip
        print(f"{figure} = {summary['figures'][figure]:.3f}")
    record_disk(summary, raw, results)


def record_disk(summary: dict[str, Any], raw: dict[str, Any], results: Path) -> None:
    """Record how near storage to GPU comes to the plain reader of the same rounds."""
    ratio = summary["figures"].get("disk_to_device_ratio")
    ceiling = summary["scenarios"].get("random", {}).get("ceiling")
    if ratio is None or ceiling["name"] != PLAIN_READER or summary["device"] == "cpu":
        return
    pairs = zip(seconds(raw, "random", PLAIN_READER), seconds(raw, "random", OURS), strict=False)
    figures.record(
        "disk_to_gpu_ratio", ratio, [plain / ours for plain, ours in pairs],
        machine=one_line(summary["machine"]), command=summary["machine"]["command"],
        note=summary["title"], path=results,
    )  # fmt: skip
    print(f"disk_to_gpu_ratio = {ratio:.3f}")


def seconds(raw: dict[str, Any], scenario: str, name: str) -> list[float]:
    """Return the samples that count, round by round."""
    found = [s for s in raw["loads"] if (s["scenario"], s["name"]) == (scenario, name)]
    return [s["seconds"] for s in sorted(found, key=lambda s: s["round"]) if s["round"] > 0]


def best_peer(summary: dict[str, Any], scenario: str) -> str | None:
    """Return the fastest of the peers."""
    rows = summary["scenarios"].get(scenario, {}).get("contestants", [])
    return next(
        (row["name"] for row in rows if row["name"] not in OF_OURS and row["spread"] is not None),
        None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="8b")
    parser.add_argument("--device", default="cuda:0" if cuda_count() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--contestants", default=",".join(CONTESTANT_NAMES))
    parser.add_argument("--keep", action="store_true", help="leave the model's files")
    parser.add_argument("--record", type=Path, metavar="SUMMARY", help="record a finished run")
    arguments = parser.parse_args()
    try:
        if arguments.record is not None:
            record(arguments.record)
        else:
            measure(arguments)
    except SllmError as error:
        sys.exit(f"load_peers: {error}")


if __name__ == "__main__":
    main()
