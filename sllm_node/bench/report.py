"""A folder that says what was measured: a table for people, numbers for programs, every sample, plots."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from sllm_node.bench.ablation import AblationResult
from sllm_node.bench.contestants import OF_OURS
from sllm_node.bench.devices import is_cuda
from sllm_node.bench.figures import Row, ceiling_of, gigabytes, headline, rows_of, spread_of
from sllm_node.bench.machine import one_line
from sllm_node.bench.scenarios import ScenarioResult
from sllm_node.core.units import format_rate

_WIDTH = 160
NOTES = (
    "seconds from the call until the last byte is usable on the device; everything freed between loads",
    "cached: the same model again; safetensors in the page cache, ours in its pinned pool",
    "random: page cache and pool emptied before each load",
    "ceiling of cached: page-locked memory copied to the device",
    "ceiling of random: the slower of that and a plain O_DIRECT reader of our shards, with our threads",
    "speed-up: how many times longer than ours, by medians",
    "cached: fastsafetensors and instanttensor are told to use the page cache; runai's defaults decide",
    "transformers also builds the module; the others deliver tensors",
    "our pinned pool is taken once, before; what peers take for a load is part of their load",
)

CPU_NOTE = "on the cpu, safetensors and transformers map files and copy nothing; ours always copies"


@dataclass(slots=True)
class Report:
    """Everything that one run found; written anew after each part, so that a crash loses little."""

    title: str
    machine: dict[str, object]
    device: str
    versions: dict[str, str | None]
    seed: int
    store: dict[str, Any]
    """The [store] settings that ours ran with."""
    scenarios: list[ScenarioResult] = field(default_factory=list)
    ablation: AblationResult | None = None
    remarks: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return machine and figures as plain data."""
        return {
            "title": self.title,
            "machine": self.machine,
            "device": self.device,
            "seed": self.seed,
            "store": self.store,
            "versions": self.versions,
            "figures": headline(self.scenarios, self.versions),
            "scenarios": {r.scenario: self._scenario(r) for r in self.scenarios},
            "ablation": _ablation_json(self.ablation),
            "notes": self._notes(),
        }

    def _scenario(self, result: ScenarioResult) -> dict[str, Any]:
        ceiling = ceiling_of(result)
        return {
            "bytes": result.size,
            "page_cache": result.page_cache,
            "ceiling": {"name": ceiling[0], "bytes_per_s": ceiling[1]} if ceiling else None,
            "contestants": [asdict(row) for row in rows_of(result, self.versions)],
        }

    def _notes(self) -> list[str]:
        threads, verify = self.store.get("reader_threads"), self.store.get("verify")
        settings = f"our store: {threads} reader threads, checksums {verify!r}"
        return [*NOTES, *([] if is_cuda(self.device) else [CPU_NOTE]), settings, *self.remarks]

    def samples(self) -> dict[str, Any]:
        """Return every sample as plain data."""
        ablation = self.ablation.seconds if self.ablation else {}
        return {
            "loads": [asdict(sample) for result in self.scenarios for sample in result.samples],
            "ablation_seconds": ablation,
        }

    def as_text(self) -> str:
        """Return the tables as text."""
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=_WIDTH, highlight=False, markup=False, emoji=False)
        console.print(self.title, one_line(self.machine), str(self.machine["date"]), sep="\n")
        for result in self.scenarios:
            console.print(_scenario_table(result, self.versions))
        if self.ablation is not None:
            console.print(_ablation_table(self.ablation))
        for note in self._notes():
            console.print(f"- {note}")
        console.print(f"- command: {self.machine['command']}")
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"

    def short(self) -> str:
        """Return a few lines: medians and rates of every contestant in every scenario."""
        lines = []
        for result in self.scenarios:
            for row in rows_of(result, self.versions):
                told = row.remark[:90]
                if row.spread is not None and row.bytes_per_s is not None:
                    told = f"{row.spread.median:8.3f} s {format_rate(row.bytes_per_s):>12}"
                lines.append(f"{result.scenario:7} {row.name:16} {told}")
            if (ceiling := ceiling_of(result)) is not None:
                lines.append(f"{result.scenario:7} {ceiling[0]:16} {format_rate(ceiling[1]):>23}")
        for name, seconds in (self.ablation.seconds if self.ablation else {}).items():
            lines.append(f"ablation {name:15} {spread_of(seconds).median:8.3f} s")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write summary.txt, summary.json, raw.json and, with matplotlib, the plots."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.txt").write_text(self.as_text(), encoding="utf-8")
        (folder / "summary.json").write_bytes(_dumped(self.as_json()))
        (folder / "raw.json").write_bytes(_dumped(self.samples()))

    def plot(self, folder: Path) -> list[Path]:
        """Draw the plots into `folder`; without matplotlib, none."""
        try:
            from sllm_node.bench.plots import draw
        except ModuleNotFoundError:
            return []
        return draw(self, folder)


def _dumped(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _scenario_table(result: ScenarioResult, versions: dict[str, str | None]) -> Any:
    ceiling = ceiling_of(result)
    title = f"{result.scenario}: {gigabytes(result.size)}, page cache: {result.page_cache}"
    if ceiling is not None:
        title += f", ceiling {format_rate(ceiling[1])} ({ceiling[0]})"
    columns = ("contestant", "version", ">median", ">p10 to p90", ">loads", ">rate", ">of ceiling",
               ">ours faster by", "remark")  # fmt: skip
    return _table(title, columns, [_cells(row) for row in rows_of(result, versions)])


def _cells(row: Row) -> tuple[str, ...]:
    if row.spread is None or row.bytes_per_s is None:
        return (row.name, row.version, *("",) * 6, row.remark)
    spread = row.spread
    is_peer = row.speedup is not None and row.name not in OF_OURS
    return (
        row.name,
        row.version,
        f"{spread.median:.3f} s",
        f"{spread.p10:.3f} to {spread.p90:.3f} s",
        str(spread.count),
        format_rate(row.bytes_per_s),
        f"{row.ceiling_share:.1%}" if row.ceiling_share is not None else "",
        f"{row.speedup:.2f}x" if is_peer else "",
        row.remark,
    )


def _ablation_table(result: AblationResult) -> Any:
    rows: list[tuple[str, ...]] = []
    before: float | None = None
    for name, seconds in result.seconds.items():
        spread = spread_of(seconds)
        gain = f"{before / spread.median:.2f}x" if before else ""
        rate = format_rate(result.size / spread.median)
        between = f"{spread.p10:.3f} to {spread.p90:.3f} s"
        rows.append((name, f"{spread.median:.3f} s", between, str(spread.count), rate, gain))
        before = spread.median
    columns = ("step", ">median", ">p10 to p90", ">loads", ">rate", ">over the step before")
    return _table(f"ablation: {gigabytes(result.size)}, cold caches", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if is_right else "left",
                         overflow="fold")  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _ablation_json(result: AblationResult | None) -> list[dict[str, Any]]:
    if result is None:
        return []
    found = {name: spread_of(seconds) for name, seconds in result.seconds.items()}
    return [
        {"step": name, **asdict(spread), "bytes_per_s": result.size / spread.median}
        for name, spread in found.items()
    ]
