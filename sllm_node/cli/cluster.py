"""`sllm-node cluster`: makes a cluster's file, keys and certificates, and checks them; asks running nodes."""

import importlib
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from sllm_node.cli.asking import DEFAULT_URL, ConfigFile, Key, Url, call, quoted
from sllm_node.cli.output import fail, print_json, print_table, say, tell
from sllm_node.cli.remote import AsJson, Model
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

app = typer.Typer(
    help="Make and check the file that many nodes share; ask and tell running nodes.",
    no_args_is_help=True,
)
CALL_S = 2.0
"""For how long a node is called that may not run."""
_DIGITS_MOST = 6
"""Of a number of replicas."""
Folder = Annotated[Path, typer.Argument(help="the cluster's folder")]


class Trust(StrEnum):
    """How the nodes of a cluster know each other."""

    TLS = "tls"
    KEY = "key"


@app.callback()
def _group() -> None:
    """Make and check the file that many nodes share; ask and tell running nodes."""


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
    """Add a node and issue its certificate; print the files to copy to it, and what its unit needs."""
    if renew == (address is not None):
        fail("name the node's HOST:PORT, or --renew for a node that is in the file already")
    if address is None:
        needed = _folder().renew(folder, NodeId(node), datetime.now(UTC))
    else:
        needed = _folder().join(folder, NodeId(node), address, datetime.now(UTC))
    for path in needed:
        say(str(path))
    tell(f"copy these to {node}" + ("" if renew else ", and the first to all other nodes"))
    tell(
        "where systemd runs it, its unit hands all but the first to it ('systemctl edit sllm-node'):"
    )
    for line in ("[Service]", *_folder().handed_over(folder, NodeId(node))):
        tell(f"  {line}")


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="the cluster file")],
    node: Annotated[
        str | None, typer.Option(help="check the files of this node only, as on the node itself")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tell what is well with a cluster file, its keys and certificates, and what is not; and who listens.

    Exit status 1 if there is a problem; a node that does not run yet is none.
    """
    folder, me = _folder(), None if node is None else NodeId(node)
    try:
        found, nodes = folder.check(file, me, datetime.now(UTC)), _called(folder, file)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"file": str(file), "problems": list(error.problems)})
        raise typer.Exit(1) from error
    if as_json:
        print_json({"file": str(file), **asdict(found), "nodes": nodes})
        raise typer.Exit(1 if found.problems else 0)
    _show_check(found.well, found.remarks, nodes)
    if found.problems:
        fail(str(ConfigError(str(file), found.problems)))
    away = sum(one["silent"] is not None for one in nodes)
    say(
        f"{file}: no problems" + (f", {away} of {len(nodes)} nodes not running yet" if away else "")
    )


def _called(folder: ModuleType, file: Path) -> list[dict[str, str | None]]:
    """Return all nodes; of those at whose address nobody listens, what came of trying."""
    cluster = folder.read(file)
    silent = folder.silent(cluster, CALL_S)
    return [
        {"id": one.id, "address": one.address, "silent": silent.get(one.id)}
        for one in cluster.nodes
    ]


def _show_check(
    well: tuple[str, ...], remarks: tuple[str, ...], nodes: list[dict[str, str | None]]
) -> None:
    for line in well:
        say(f"ok       {line}")
    for line in remarks:
        say(f"note     {line}")
    for one in nodes:
        where = f"{one['id']} at {one['address']}"
        if one["silent"] is not None:
            say(f"not yet  {where}: {one['silent']}; 'sllm-node serve' on that machine starts it")
        else:
            say(f"ok       {where}: listens")


@app.command("models")
def models(
    url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None, *, as_json: AsJson = False
) -> None:
    """Show the models of all nodes: where they are, how many replicas are desired, their other names."""
    target = (url, key, config)
    report = call("GET", "/admin/status", target).get("cluster") or fail(
        "the node is in no cluster (cluster.file)"
    )
    wishes = call("GET", "/admin/wishes", target)
    rows, hidden = _models_of(report, wishes), wishes.get("hidden", {})
    if as_json:
        print_json({"models": rows, "hidden_aliases": hidden})
        return
    print_table(
        ("model", "nodes", "on devices of", ">ready", ">desired", "other names"),
        [
            (
                row["id"], " ".join(row["nodes"]), " ".join(row["on_device"]), str(row["ready"]),
                "" if row["desired"] is None else "{minimum}-{maximum}".format(**row["desired"]),
                " ".join(row["aliases"]),
            )
            for row in rows
        ],
    )  # fmt: skip
    for name, model in hidden.items():
        tell(f"sllm-node: the alias {name} of {model} does not count: a model is called {name}")


def _models_of(report: dict[str, Any], wishes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each model that some node has, or that an operator wished for."""
    held: dict[str, list[tuple[str, bool]]] = {}
    for node in report["nodes"]:
        for model in node["models"]:
            held.setdefault(model["id"], []).append((node["id"], model["device"]))
    scaled = {one["model"]: one for one in report["scaling"]}
    names: dict[str, list[str]] = {}
    for alias, model in wishes["aliases"].items():
        names.setdefault(model, []).append(alias)
    rows: list[dict[str, Any]] = []
    for model in sorted({*held, *scaled, *names}):
        scaling, places = scaled.get(model), held.get(model, [])
        on_device = [node for node, is_there in places if is_there]
        rows.append({
            "id": model, "nodes": [node for node, _ in places], "on_device": on_device,
            "ready": len(on_device) if scaling is None else scaling["ready"],
            "desired": None if scaling is None else {
                key: scaling[key] for key in ("minimum", "maximum")
            },
            "aliases": names.get(model, []),
        })  # fmt: skip
    return rows


@app.command("scale")
def scale(
    model: Model,
    replicas: Annotated[
        str, typer.Argument(help="at least and at most, as in 1-3", metavar="MIN-MAX")
    ],
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
    *,
    keep_alive_s: Annotated[float, typer.Option(help="how long a replica stays unneeded")] = 300.0,
) -> None:
    """Keep between so many replicas of a model in the cluster; all nodes are told, and remember it."""
    least, dash, most = replicas.partition("-")
    numbers = (least, most) if dash else (least,)
    if not all(one.isdecimal() and len(one) <= _DIGITS_MOST for one in numbers):
        fail(f"{replicas[:40]!r} is not MIN-MAX, as in 1-3")
    body = {"minimum": int(least), "maximum": int(most or least), "keep_alive_s": keep_alive_s}
    report = call("POST", f"/admin/models/{quoted(model)}/scale", (url, key, config), body)
    _told(report, "{model}: {minimum} to {maximum} replicas".format(**report))


@app.command("unscale")
def unscale(
    model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None
) -> None:
    """Desire no replicas of a model any more: it comes with requests and leaves when idle."""
    report = call("POST", f"/admin/models/{quoted(model)}/unscale", (url, key, config))
    _told(report, f"{model}: not scaled any more")


@app.command("register")
def register(
    model: Model,
    address: Annotated[str, typer.Argument(help="the remote that has it: https://… or s3://…")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
) -> None:
    """Let all nodes load a model from a remote, by the directory."""
    body = {"url": address}
    report = call("POST", f"/admin/models/{quoted(model)}/register", (url, key, config), body)
    say("{model}: registered at {url}".format(**report))


@app.command("unregister")
def unregister(
    model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None
) -> None:
    """Let nodes do that no more; what they have of the model stays."""
    call("POST", f"/admin/models/{quoted(model)}/unregister", (url, key, config))
    say(f"{model}: not registered any more")


Alias = Annotated[str, typer.Argument(help="what clients ask for")]


@app.command("alias")
def alias(
    name: Alias, model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None
) -> None:
    """Let clients ask for a model by another name; all nodes are told, and remember it."""
    body = {"model": model}
    report = call("POST", f"/admin/aliases/{quoted(name)}/set", (url, key, config), body)
    _told(report, f"{name}: {report['model']}")


@app.command("unalias")
def unalias(
    name: Alias, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None
) -> None:
    """Forget another name of a model."""
    report = call("POST", f"/admin/aliases/{quoted(name)}/unset", (url, key, config))
    _told(report, f"{name}: forgotten")


def _told(report: dict[str, Any], text: str) -> None:
    say(text)
    if missed := report["missed"]:
        fail(f"not told: {', '.join(missed)}; do this again when they are back")


def _folder() -> ModuleType:
    """Return `sllm_node.cluster.folder`, which needs the extra."""
    try:
        return importlib.import_module("sllm_node.cluster.folder")
    except ImportError as error:
        fail(f"certificates need a package ({error}); pip install 'sllm-node[cluster]'")
