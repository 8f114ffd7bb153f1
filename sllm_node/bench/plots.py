"""The plots of a report: how long, how fast beside the ceiling, and what each step brings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from sllm_node.bench.ablation import AblationResult
from sllm_node.bench.contestants import OF_OURS
from sllm_node.bench.figures import ceiling_of, gigabytes, rows_of, spread_of
from sllm_node.bench.machine import one_line

if TYPE_CHECKING:
    from sllm_node.bench.report import Report
    from sllm_node.bench.scenarios import ScenarioResult

_OURS: Final = "#1b6ca8"
_PEER: Final = "#9aa5b1"
_CEILING: Final = "#c0392b"
_SIZE: Final = (8.0, 4.5)
_DPI: Final = 150


def draw(report: "Report", folder: Path) -> list[Path]:
    """Write a PNG for each plot into `folder` and return their paths."""
    drawn = []
    for result in report.scenarios:
        drawn.append(_latency(report, result, folder / f"{result.scenario}_latency.png"))
        drawn.append(_rates(report, result, folder / f"{result.scenario}_rate.png"))
    if report.ablation is not None:
        drawn.append(_ablation(report, report.ablation, folder / "ablation.png"))
    return drawn


def _latency(report: "Report", result: "ScenarioResult", path: Path) -> Path:
    rows = [row for row in rows_of(result, report.versions) if row.spread is not None]
    figure, axes = _canvas(report, f"{result.scenario}: time to load {gigabytes(result.size)}")
    for place, row in enumerate(rows):
        assert row.spread is not None
        low, high = row.spread.median - row.spread.p10, row.spread.p90 - row.spread.median
        axes.bar(place, row.spread.median, color=_colour(row.name), width=0.65,
                 yerr=[[low], [high]], capsize=4, ecolor="#333333")  # fmt: skip
        axes.annotate(f"{row.spread.median:.3g} s", (place, row.spread.p90), ha="center",
                      xytext=(0, 5), textcoords="offset points", fontsize=9)  # fmt: skip
    _names(axes, [row.name for row in rows])
    axes.set_ylabel("seconds (median, bars p10 to p90)")
    return _saved(figure, path)


def _rates(report: "Report", result: "ScenarioResult", path: Path) -> Path:
    rows = [row for row in rows_of(result, report.versions) if row.bytes_per_s is not None]
    figure, axes = _canvas(report, f"{result.scenario}: rate, {gigabytes(result.size)}")
    for place, row in enumerate(rows):
        rate = (row.bytes_per_s or 0.0) / 1e9
        axes.bar(place, rate, color=_colour(row.name), width=0.65)
        axes.annotate(f"{rate:.3g}", (place, rate), ha="center", xytext=(0, 4),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    if (ceiling := ceiling_of(result)) is not None:
        rate = ceiling[1] / 1e9
        axes.axhline(rate, color=_CEILING, linestyle="--", linewidth=1.5,
                     label=f"ceiling: {ceiling[0]}, {rate:.3g} GB/s")  # fmt: skip
        axes.legend(loc="upper right", frameon=False)
    _names(axes, [row.name for row in rows])
    axes.set_ylabel("GB/s (size over median seconds)")
    return _saved(figure, path)


def _ablation(report: "Report", result: AblationResult, path: Path) -> Path:
    figure, axes = _canvas(report, f"ablation: what each step brings, {gigabytes(result.size)}")
    for place, seconds in enumerate(result.seconds.values()):
        spread = spread_of(seconds)
        low, high = spread.median - spread.p10, spread.p90 - spread.median
        axes.bar(place, spread.median, color=_OURS, width=0.65, yerr=[[low], [high]], capsize=4,
                 ecolor="#333333")  # fmt: skip
        rate = result.size / spread.median / 1e9
        axes.annotate(f"{spread.median:.3g} s\n{rate:.3g} GB/s", (place, spread.p90), ha="center",
                      xytext=(0, 5), textcoords="offset points", fontsize=8)  # fmt: skip
    _names(axes, list(result.seconds))
    axes.set_ylabel("seconds (median, bars p10 to p90)")
    return _saved(figure, path)


def _canvas(report: "Report", title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.set_title(f"{report.title}\n{title}", fontsize=11, loc="left")
    figure.supxlabel(one_line(report.machine), fontsize=6.5, color="#555555")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.margins(y=0.18)
    return figure, axes


def _names(axes: Any, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 7 else 20)
    axes.set_ylim(bottom=0)


def _colour(name: str) -> str:
    return _OURS if name in OF_OURS else _PEER


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
