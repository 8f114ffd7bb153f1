"""`sllm-node simulate`: what a cluster would do with a trace, under several policies side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllm_node.cli.asking import reason
from sllm_node.cli.output import fail, print_json, print_table, say, tell

if TYPE_CHECKING:
    from sllm_node.sim.description import Description
    from sllm_node.sim.report import Report
    from sllm_node.sim.trace import Row


def register(app: typer.Typer) -> None:
    """Add the command to the main program."""
    app.command("simulate")(simulate)


def simulate(  # noqa: PLR0913 - a command has as many options as it has
    cluster: Annotated[Path, typer.Argument(help="the cluster to simulate, as TOML")],
    *,
    trace: Annotated[
        str,
        typer.Option(help="a CSV of requests, or gamma:rate=20,cv=8,duration=600,in=512,out=128"),
    ],
    policy: Annotated[
        str, typer.Option(help="policies, separated by commas")
    ] = "ours,serverlessllm,shepherd,serverless,least-loaded",
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same events")] = 0,
    scale: Annotated[float, typer.Option(min=0.001, help="requests for each of the trace")] = 1.0,
    start_s: Annotated[float, typer.Option(min=0.0, help="where in the trace to begin")] = 0.0,
    duration_s: Annotated[float, typer.Option(min=0.001, help="how much of the trace")] = 600.0,
    mechanisms: Annotated[
        str, typer.Option(help="own: each policy its own; paper, keep, ours: all the same ones")
    ] = "own",
    out: Annotated[Path | None, typer.Option(help="folder for report, events and plots")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Simulate a cluster: startup latencies, loads, migrations, under each policy."""
    from sllm_node.sim.description import load_description
    from sllm_node.sim.runs import CONTESTANTS, MECHANISMS

    described = load_description(cluster)
    names = policy.split(",")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        fail(f"--policy: {', '.join(unknown)} is unknown; there are {', '.join(CONTESTANTS)}")
    if mechanisms not in MECHANISMS:
        fail(f"--mechanisms: {mechanisms} is unknown; there are {', '.join(MECHANISMS)}")
    rows = _rows(trace, seed, scale, (start_s, duration_s))
    try:
        reports = [_run(described, rows, (name, mechanisms), seed, out) for name in names]
        if out is not None:
            _write(reports, out)
    except OSError as error:
        fail(f"--out {out}: {reason(error)}; name a folder that can be written, or a new one")
    if as_json:
        import msgspec

        print_json([msgspec.to_builtins(report) for report in reports])
        return
    _show(reports, described.limits.startup_s)


def _rows(trace: str, seed: int, scale: float, stretch: tuple[float, float]) -> "list[Row]":
    from sllm_node.sim.trace import cut, gamma_rows, parse_gamma, read_rows

    if trace.startswith("gamma:"):
        return _scaled(gamma_rows(parse_gamma(trace), seed), scale, seed)
    try:
        text = Path(trace).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"the trace {trace} can't be read: {error}; name a CSV file or gamma:...")
    rows = _scaled(cut(read_rows(text.splitlines(), trace), *stretch), scale, seed)
    if not rows:
        fail(f"the trace {trace} has no requests in this stretch; see --start-s, --duration-s")
    return rows


def _scaled(rows: "list[Row]", scale: float, seed: int) -> "list[Row]":
    from sllm_node.sim.trace import REQUESTS_MOST, scaled

    if max(1, len(rows)) * scale > REQUESTS_MOST:
        fail(f"--scale {scale:g} makes more than {REQUESTS_MOST:,} requests of {len(rows):,}")
    return scaled(rows, scale, seed)


def _run(
    described: "Description", rows: "list[Row]", who: tuple[str, str], seed: int, out: Path | None
) -> "Report":
    from sllm_node.sim.runs import MECHANISMS, run

    name, equal = who[0], MECHANISMS[who[1]]
    if out is None:
        return run(described, rows, name, seed, mechanisms=equal)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"events-{name}.log").open("w", encoding="utf-8") as events:
        return run(described, rows, name, seed, events, equal)


def _write(reports: "list[Report]", out: Path) -> None:
    import msgspec
    import orjson

    made = [msgspec.to_builtins(report) for report in reports]
    (out / "report.json").write_bytes(orjson.dumps(made, option=orjson.OPT_INDENT_2))
    try:
        from sllm_node.sim.plots import plot
    except ImportError:
        tell("no plots: they need matplotlib, as in: pip install 'sllm-node[plots]'")
        return
    plot(reports, out)


def _show(reports: "list[Report]", limit_s: float) -> None:
    columns = (
        "policy", ">requests", ">mean", ">P50", ">P95", ">P99", ">P99 loaded", f">in {limit_s:g} s",
        ">migrated", ">preempted", ">timeouts", "loads by tier, digest",
    )  # fmt: skip
    print_table(columns, [_row(report) for report in reports])
    say("Startup latency in seconds, from arrival to first token, and to the model loaded.")


def _row(report: "Report") -> tuple[str, ...]:
    first = report.to_first_token_s
    loads = " ".join(f"{tier} {count}" for tier, count in report.loads.items())
    counts = (report.counts.get(name, 0) for name in ("migrate", "preemption", "timeout"))
    return (
        report.policy, str(report.requests), f"{first.mean:.3f}", f"{first.p50:.3f}",
        f"{first.p95:.3f}", f"{first.p99:.3f}", f"{report.to_loaded_s.p99:.3f}",
        f"{report.share_in_time:.1%}", *map(str, counts), f"{loads}; {report.digest[:12]}",
    )  # fmt: skip
