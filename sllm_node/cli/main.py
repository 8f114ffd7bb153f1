"""The commands of `sllm-node` and how their errors look: one sentence on stderr, exit status 1."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllm_node import __version__
from sllm_node.cli import bench, checkpoints, cluster, remote, simulate
from sllm_node.cli.output import end_stdout, fail, print_json, say, show_any_text, tell
from sllm_node.cluster.named_files import load_cluster
from sllm_node.core.config import Config, config_schema, load_config
from sllm_node.core.errors import SllmError
from sllm_node.core.types import NodeId

if TYPE_CHECKING:
    from sllm_node.node.preflight import Finding

app = typer.Typer(
    name="sllm-node",
    help="Serves many LLMs on few GPUs over an OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
checkpoints.register(app)
remote.register(app)
simulate.register(app)
app.add_typer(bench.app, name="bench")
app.add_typer(cluster.app, name="cluster")


def _version(*, wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=lambda v: _version(wanted=v), is_eager=True)
    ] = False,
) -> None:
    """Serves many LLMs on few GPUs over an OpenAI-compatible endpoint."""


@app.command("serve")
def serve(
    config: Annotated[Path, typer.Option(help="the node's TOML file")],
) -> None:
    """Run the node until SIGTERM or SIGINT, then drain and exit."""
    checked = load_config(config)
    from sllm_node.node.node import run

    serve_or_tell(checked, config, run)


def serve_or_tell(config: Config, file: Path, start: Callable[[Config], None]) -> None:
    """Start the node; if that fails, tell all that keeps it from starting, not the first cause only.

    Raises:
        SllmError: the node can't start.
    """
    try:
        start(config)
    except SllmError:
        for one in _preflight(config, file):
            if one.level != "ok":
                tell(f"{one.level:<8} {one.line}")
        raise


@app.command("check-config")
def check_config(
    file: Annotated[Path | None, typer.Argument(help="the node's TOML file")] = None,
    *,
    schema: Annotated[bool, typer.Option(help="print the JSON Schema instead")] = False,
    file_only: Annotated[bool, typer.Option(help="look at no folder, port or device")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Report every problem of a config file, and of a node that would start here; exit status 1 if any."""
    if schema:
        print_json(config_schema())
        return
    if file is None:
        fail("name the file to check, or --schema")
    try:
        config = load_config(file)
        if file_only and config.cluster.file:
            load_cluster(Path(config.cluster.file), NodeId(config.node.id))
    except SllmError as error:
        if not as_json:
            raise
        problems = list(getattr(error, "problems", [str(error)]))
        print_json({"file": str(file), "problems": problems, "findings": []})
        raise typer.Exit(1) from error
    _show_findings(file, [] if file_only else _preflight(config, file), as_json=as_json)


def _preflight(config: Config, file: Path) -> "list[Finding]":
    from sllm_node.node.machine import ThisMachine
    from sllm_node.node.preflight import preflight

    return list(preflight(config, file, ThisMachine()))


def _show_findings(file: Path, findings: "list[Finding]", *, as_json: bool) -> None:
    problems = [one.line for one in findings if one.level == "error"]
    if as_json:
        told = [asdict(one) for one in findings]
        print_json({"file": str(file), "problems": problems, "findings": told})
        raise typer.Exit(1 if problems else 0)
    for one in findings:
        say(f"{one.level:<8} {one.line}")
    if problems:
        fail(f"{file}: {len(problems)} problem{'s' * (len(problems) != 1)}, see above")
    warnings = sum(one.level == "warning" for one in findings)
    said = f", {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    say(f"{file}: no problems{said}")


def main() -> None:
    """Run the command line; a typed error becomes one message and exit status 1."""
    show_any_text()
    try:
        app()
    except SllmError as error:
        fail(str(error))
    except UnicodeEncodeError as error:
        fail(f"{error.object[error.start : error.end]!a} of an argument is no text in UTF-8")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_stdout()
