"""`sllm-node bench`: measurements of this machine."""

import asyncio
import statistics
from pathlib import Path
from typing import Annotated

import typer

from sllm_node.cli.checkpoints import DEFAULT_STORE
from sllm_node.cli.output import print_json, print_table, say
from sllm_node.core.config import Config, load_config
from sllm_node.core.types import ModelId
from sllm_node.core.units import format_rate, format_size

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure this machine."""


@app.command("load")
def load(
    name: Annotated[str, typer.Argument(help="the checkpoint to read")],
    store: Annotated[
        Path, typer.Option("--store", envvar="SLLM_NODE_STORE", help="folder of checkpoints")
    ] = DEFAULT_STORE,
    config: Annotated[
        Path | None, typer.Option(help="take [store] (threads, chunk size, path) from this file")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds that count")] = 7,
    warm_loads: Annotated[int, typer.Option(min=1, help="loads from DRAM")] = 100,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Read a checkpoint through the loader and through a plain reader, turn by turn."""
    from sllm_node.checkpoint.catalog import Catalog
    from sllm_node.core.clock import MonotonicClock
    from sllm_node.store import bench

    settings = (load_config(config) if config is not None else Config()).store
    folder = Path(settings.path) if config is not None else store
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
