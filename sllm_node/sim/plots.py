"""Plots of reports; the only module of the simulator that needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from sllm_node.sim.report import Report


def plot(reports: Sequence[Report], folder: Path) -> Path:
    """Write startup latencies and loads by tier of all policies; return the file."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    names = [report.policy for report in reports]
    for place, percentile in enumerate(("p50", "p95", "p99")):
        values = [getattr(report.to_first_token_s, percentile) for report in reports]
        positions = [i + (place - 1) * 0.25 for i in range(len(names))]
        left.bar(positions, values, width=0.25, label=percentile.upper())
    left.set_xticks(range(len(names)), names, rotation=20)
    left.set_yscale("log")
    left.set_ylabel("arrival to first token, s")
    left.legend()
    below = [0] * len(names)
    for tier in ("clone", "dram", "nvme", "peer", "remote"):
        counts = [report.loads.get(tier, 0) for report in reports]
        right.bar(names, counts, bottom=below, label=tier)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    right.tick_params(axis="x", rotation=20)
    right.set_ylabel("loads")
    right.legend()
    figure.tight_layout()
    path = folder / "startup.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
