"""The commands of `sllm-node` and how their errors look: one sentence on stderr, exit status 1."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sllm_node import __version__
from sllm_node.cli import bench, checkpoints, cluster, remote, simulate
from sllm_node.cli.output import fail, print_json, say
from sllm_node.cluster.file import load_cluster
from sllm_node.core.config import config_schema, load_config
from sllm_node.core.errors import SllmError
from sllm_node.core.types import NodeId

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

    run(checked)


@app.command("check-config")
def check_config(
    file: Annotated[Path | None, typer.Argument(help="the node's TOML file")] = None,
    *,
    schema: Annotated[bool, typer.Option(help="print the JSON Schema instead")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Report every problem of a config file together; exit status 1 if there is one."""
    if schema:
        print_json(config_schema())
        return
    if file is None:
        fail("name the file to check, or --schema")
    try:
        config = load_config(file)
        if config.cluster.file:
            load_cluster(Path(config.cluster.file), NodeId(config.node.id))
    except SllmError as error:
        if not as_json:
            raise
        print_json({"file": str(file), "problems": list(getattr(error, "problems", [str(error)]))})
        raise typer.Exit(1) from error
    if as_json:
        print_json({"file": str(file), "problems": []})
    else:
        say(f"{file}: no problems")


def main() -> None:
    """Run the command line; a typed error becomes one message and exit status 1."""
    try:
        app()
    except SllmError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
