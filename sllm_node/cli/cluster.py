"""`sllm-node cluster`: makes a cluster's file, keys and certificates, and checks them."""

import importlib
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from sllm_node.cli.output import fail, print_json, say, tell
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

app = typer.Typer(help="Make and check the file that many nodes share.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="the cluster's folder")]


class Trust(StrEnum):
    """How the nodes of a cluster know each other."""

    TLS = "tls"
    KEY = "key"


@app.callback()
def _group() -> None:
    """Make and check the file that many nodes share."""


@app.command("init")
def init(
    folder: Folder,
    trust: Annotated[Trust, typer.Option(help="certificates, or one shared key")] = Trust.TLS,
) -> None:
    """Make a cluster without nodes: its file, and an authority or a key."""
    for path in _folder().init(folder, trust.value, datetime.now(UTC)):
        say(str(path))
    tell(f"next: sllm-node cluster join {folder} ID HOST:PORT, for each node")


@app.command("join")
def join(
    folder: Folder,
    node: Annotated[str, typer.Argument(help="the node's id, as node.id in its config")],
    address: Annotated[
        str | None, typer.Argument(help="HOST:PORT by which peers reach it", metavar="HOST:PORT")
    ] = None,
    *,
    renew: Annotated[bool, typer.Option(help="issue a new certificate to a known node")] = False,
) -> None:
    """Add a node and issue its certificate; print the files to copy to it."""
    if renew == (address is not None):
        fail("name the node's HOST:PORT, or --renew for a node that is in the file already")
    if address is None:
        needed = _folder().renew(folder, NodeId(node), datetime.now(UTC))
    else:
        needed = _folder().join(folder, NodeId(node), address, datetime.now(UTC))
    for path in needed:
        say(str(path))
    tell(f"copy these to {node}" + ("" if renew else ", and the first to all other nodes"))


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="the cluster file")],
    node: Annotated[
        str | None, typer.Option(help="check the files of this node only, as on the node itself")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Report every problem of a cluster file, its keys and certificates; exit status 1 if any."""
    remarks: tuple[str, ...] = ()
    try:
        me = None if node is None else NodeId(node)
        found = _folder().check(file, me, datetime.now(UTC))
        problems, remarks = found.problems, found.remarks
    except ConfigError as error:
        problems = error.problems
    if as_json:
        print_json({"file": str(file), "problems": list(problems), "remarks": list(remarks)})
        raise typer.Exit(1 if problems else 0)
    for remark in remarks:
        tell(f"sllm-node: {remark}")
    if problems:
        fail(str(ConfigError(str(file), problems)))
    say(f"{file}: no problems")


def _folder() -> ModuleType:
    """Return `sllm_node.cluster.folder`, which needs the extra."""
    try:
        return importlib.import_module("sllm_node.cluster.folder")
    except ImportError as error:
        fail(f"certificates need a package ({error}); pip install 'sllm-node[cluster]'")
