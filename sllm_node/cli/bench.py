"""`sllm-node bench`: measurements of this machine."""

import asyncio
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sllm_node.cli.checkpoints import DEFAULT_STORE
from sllm_node.cli.output import fail, print_json, print_table, say, tell
from sllm_node.core.config import Config, StoreConfig, load_config
from sllm_node.core.errors import StoreFolderError
from sllm_node.core.types import ModelId
from sllm_node.core.units import format_rate, format_size

if TYPE_CHECKING:
    from sllm_node.bench.compare import ComparisonPlan
    from sllm_node.bench.scenarios import Scenario

BENCH_FOLDER: Final = ".bench"
"""Below the store: where a comparison keeps its models, out of the catalogue's sight."""

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure this machine."""


@app.command("load")
def load(  # noqa: PLR0913, PLR0917 - an option each
    name: Annotated[
        str | None, typer.Argument(help="the checkpoint to read; none: compare with other loaders")
    ] = None,
    store: Annotated[
        Path, typer.Option("--store", envvar="SLLM_NODE_STORE", help="folder of checkpoints")
    ] = DEFAULT_STORE,
    config: Annotated[
        Path | None, typer.Option(help="take [store] (threads, chunk size, path) from this file")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds that count")] = 7,
    warm_loads: Annotated[int, typer.Option(min=1, help="loads from DRAM")] = 100,
    shape: Annotated[
        str | None,
        typer.Option(help="compare on a synthesised model: 8b, 32b, 30b-a3b, opt-6.7b, tiny"),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="compare on this Hugging Face folder of safetensors")
    ] = None,
    scenario: Annotated[str, typer.Option(help="cached, random or all")] = "all",
    device: Annotated[str, typer.Option(help="cpu or cuda:N")] = "cpu",
    copies: Annotated[int, typer.Option(min=1, help="copies that `random` draws from")] = 1,
    contestants: Annotated[
        str | None, typer.Option(help="some of them, with commas between; default: all")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="seconds after which no further round begins")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of bytes and of the order of loads")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for tables, samples and plots")] = None,
    *,
    ablation: Annotated[bool, typer.Option("--ablation", help="time the pipeline's parts")] = False,
    probe: Annotated[bool, typer.Option(help="try each peer in its own process before")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Read NAME through the loader and a plain reader, or compare loaders on a shape or folder."""
    settings = (load_config(config) if config is not None else Config()).store
    folder = Path(settings.path) if config is not None else store
    if name is not None and shape is None and source is None:
        _beside_plain_reader(name, folder, settings, (rounds, warm_loads), as_json=as_json)
        return
    if name is not None or (shape is None) == (source is None):
        fail("give one of NAME (a checkpoint of the store), --shape and --source")
    from sllm_node.bench.compare import ComparisonPlan
    from sllm_node.bench.contestants import contestant_names

    plan = ComparisonPlan(
        store=folder / BENCH_FOLDER,
        shape=shape,
        source=source,
        scenarios=_scenarios(scenario),
        device=device,
        rounds=rounds,
        copies=copies,
        contestants=contestant_names(contestants),
        with_ablation=ablation,
        with_probe=probe,
        seed=seed,
        budget_s=budget,
        out=out,
    )
    _compare(plan, settings, as_json=as_json)


def _scenarios(wanted: str) -> "tuple[Scenario, ...]":
    from sllm_node.bench.scenarios import SCENARIOS

    if wanted == "all":
        return SCENARIOS
    found = tuple(scenario for scenario in SCENARIOS if scenario == wanted)
    if not found:
        fail(f"there is no scenario {wanted!r}; there are {', '.join(SCENARIOS)} and all")
    return found


def _compare(plan: "ComparisonPlan", settings: StoreConfig, *, as_json: bool) -> None:
    from sllm_node.bench.compare import compare
    from sllm_node.core.clock import MonotonicClock

    report = compare(plan, settings, MonotonicClock(), tell)
    if as_json:
        print_json(report.as_json())
    else:
        say(report.as_text())
    if plan.out is not None:
        tell(f"tables, samples and plots are in {plan.out}")


def _beside_plain_reader(
    name: str, folder: Path, settings: StoreConfig, counts: tuple[int, int], *, as_json: bool
) -> None:
    from sllm_node.checkpoint.catalog import Catalog
    from sllm_node.core.clock import MonotonicClock
    from sllm_node.store import bench

    rounds, warm_loads = counts
    if not folder.is_dir():
        raise StoreFolderError(str(folder), "is not there")
    checkpoint = Catalog(folder).get(ModelId(name))
    result = asyncio.run(
        bench.bench_load(
            checkpoint, settings, MonotonicClock(), rounds=rounds, warm_loads=warm_loads
        )
    )
    if as_json:
        print_json(bench.as_json(result, checkpoint.path))
        return
    say(
        f"{name}: {format_size(result.bytes_total)}, {rounds} rounds, {settings.reader_threads} threads"
    )
    print_table(
        ("reading NVMe to DRAM", ">median", ">slowest", ">fastest"),
        [
            _row("plain direct reader", result.plain),
            _row("loader, checksums on", result.loader),
            _row("loader, checksums off", result.loader_unverified),
        ],
    )
    say(
        f"loader / plain reader: {result.ratio:.3f} "
        f"({min(result.ratios):.3f} to {max(result.ratios):.3f})"
    )
    waits_ms = sorted(1e3 * seconds for seconds in result.first_copy_s)
    say(
        f"from DRAM to the device: {format_rate(statistics.median(result.device))}, "
        f"first copy after {waits_ms[int(0.99 * (len(waits_ms) - 1))]:.2f} ms (p99)"
    )


def _row(name: str, rates: tuple[float, ...]) -> tuple[str, ...]:
    shown = (statistics.median(rates), min(rates), max(rates))
    return (name, *(format_rate(rate) for rate in shown))
