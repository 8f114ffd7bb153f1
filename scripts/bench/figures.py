"""The figures we claim: `record` is how a benchmark writes one, `table` is what README shows.

`python -m scripts.readme` puts the table into README.
"""

import json
import os
import platform
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results" / "figures.json"


def definitions() -> dict[str, dict[str, Any]]:
    """Return name → unit, better, goal, what."""
    return tomllib.loads((HERE / "figures.toml").read_text(encoding="utf-8"))


def measured(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return name → what was measured."""
    figures: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return figures


def record(
    name: str,
    value: float,
    samples: list[float],
    *,
    ceiling: float | None = None,
    note: str = "",
    command: str | None = None,
    machine: str | None = None,
    measured_at: str | None = None,
    path: Path = RESULTS,
) -> None:
    """Write one measured figure; `ceiling` is what the same run measured as the possible best.

    `measured_at` is the commit that was measured; None: this one. Samples that are recorded already
    were measured then, so they keep their commit and date.

    Raises:
        KeyError: figures.toml does not know `name`.
    """
    unit = definitions()[name]["unit"]
    figures = measured(path)
    known = figures.get(name, {})
    is_known = known.get("samples") == samples and known.get("value") == value
    figures[name] = {
        "value": value,
        "unit": unit,
        "samples": samples,
        "ceiling": ceiling,
        "note": note,
        "machine": machine or describe_machine(),
        "command": command or " ".join(["python", *sys.argv]),
        "commit": known["commit"] if is_known else measured_at or commit(),
        "date": known["date"] if is_known else datetime.now(UTC).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")


def describe_machine() -> str:
    """Return processor, cores, memory and kernel of this machine."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory_gib:.0f} GiB, Linux {platform.release()}"


def commit() -> str:
    """Return the commit that was measured, marked when files differ from it."""
    run = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*run, "status", "--porcelain", "--untracked-files=no", "sllm_node", "kernels"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return (head.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else "")


def table() -> str:
    """Return README's table: every defined figure, measured or not."""
    rows = [
        "| figure | what | goal | measured | spread | ceiling | machine | command | commit | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = measured()
    for name, defined in definitions().items():
        sign = "≥" if defined["better"] == "higher" else "≤"
        goal = f"{sign} {defined['goal']:g} {defined['unit']}"
        rows.append(f"| `{name}` | {defined['what']} | {goal} | {_measured(found.get(name))} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    """Return four digits of a figure, or all of a large one: nobody reads 2.25e+04."""
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def _measured(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "not measured yet | | | | | |"
    samples = figure["samples"]
    spread = ""
    if samples:
        spread = f"{_number(min(samples))} to {_number(max(samples))} (n = {len(samples)})"
    ceiling = "" if figure["ceiling"] is None else _number(figure["ceiling"])
    note = f" ({figure['note']})" if figure["note"] else ""
    cells = (
        f"**{_number(figure['value'])} {figure['unit']}**{note}", spread, ceiling, figure["machine"],
        f"`{figure['command']}`", figure["commit"], figure["date"],
    )  # fmt: skip
    return " | ".join(cells)
