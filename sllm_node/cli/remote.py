"""Commands to a running node over its admin endpoints: status, load, pull, pin, cancel, move, drain, undrain."""

from typing import Annotated, Any

import typer

from sllm_node.cli.asking import DEFAULT_URL, ConfigFile, Key, Target, Url, call, quoted
from sllm_node.cli.output import fail, print_json, print_table, say
from sllm_node.core.units import format_rate, format_size

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Model = Annotated[str, typer.Argument(help="the model's name")]
SERVED_SHOWN = 50
"""Sessions of the cluster."""
UNKNOWN = "?"
"""In the place of what a node of an older release does not tell."""
MOVES_SHOWN = 5
"""Of the last moves, and of the last times that sessions had to leave."""


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (status, load, unload, pull, pin, unpin, cancel, move, drain, undrain):
        app.command()(command)


def status(
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
    *,
    cluster: Annotated[bool, typer.Option(help="show all nodes, as this one sees them")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is loaded where, what runs and waits, and how full the node is."""
    report = call("GET", "/admin/status", (url, key, config))
    if cluster:
        report = report.get("cluster") or fail("the node is in no cluster (cluster.file)")
    if as_json:
        print_json(report)
    elif cluster:
        _show_cluster(report)
    else:
        _show_status(report)


def load(model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Bring a model onto the device and wait until it serves."""
    _act("load", model, (url, key, config))


def unload(
    model: Model,
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
    *,
    force: Annotated[bool, typer.Option(help="end its running sessions")] = False,
) -> None:
    """Take a model off the device."""
    _act("unload", model, (url, key, config), {"force": force})


def pull(model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Fetch a model from its remote to the node's disk, without loading it, and wait for it."""
    _act("pull", model, (url, key, config))


def pin(model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Load a model and never evict it until it is unpinned; a restart keeps the pin."""
    _act("pin", model, (url, key, config))


def unpin(model: Model, url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Let a pinned model be evicted again."""
    _act("unpin", model, (url, key, config))


def cancel(
    request: Annotated[str, typer.Argument(help="its id, as in status or in x-request-id")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
) -> None:
    """End the sessions of one request, or of all that came with this x-request-id."""
    report = call("POST", f"/admin/requests/{quoted(request)}/cancel", (url, key, config))
    if not report.get("cancelled", 0):
        fail(f"no session of request {request} runs or waits here; status lists them")
    say(f"cancelled {report.get('cancelled', 0)} sessions of request {request}")


def move(
    session: Annotated[str, typer.Argument(help="its id, as in status")],
    to: Annotated[str, typer.Option(help="the node that is to serve it", metavar="NODE")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFile = None,
) -> None:
    """Move a running session to another node; its reader notices nothing. Ask its reader's node."""
    report = call("POST", f"/admin/sessions/{quoted(session)}/move", (url, key, config), {"to": to})
    say(f"session {session} moves to {to}: migration {report.get('migration', '')}")


def drain(url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Take no new requests; what runs moves to peers, or finishes. The process goes on until stopped."""
    call("POST", "/admin/drain", (url, key, config))
    say("draining; 'undrain' takes it back")


def undrain(url: Url = DEFAULT_URL, key: Key = None, config: ConfigFile = None) -> None:
    """Take a drain back: new requests are served again; sessions that moved away stay there."""
    call("POST", "/admin/undrain", (url, key, config))
    say("serving")


def _act(verb: str, model: str, target: Target, body: dict[str, Any] | None = None) -> None:
    report = call("POST", f"/admin/models/{quoted(model)}/{verb}", target, body)
    say(f"{model}: {report.get('state', verb)}")


def _show_cluster(report: dict[str, Any]) -> None:
    peers = {peer["id"]: peer for peer in report["peers"]}
    nodes = {node["id"]: node for node in report["nodes"]}
    rows: list[tuple[str, ...]] = []
    for name in sorted({report["me"], *peers, *nodes}):
        peer, node = peers.get(name), nodes.get(name)
        state = "this node" if peer is None else peer["state"]
        heard, age = ("" if peer is None else _seconds(peer, k) for k in ("heard_s", "age_s"))
        free = "" if node is None else format_size(sum(d["free"] for d in node["devices"]))
        sessions = "" if node is None else str(node["sessions"])
        address, why = ("", "") if peer is None else (peer["address"], peer.get("why", UNKNOWN))
        rows.append((name, address or "", state, heard, age, free, sessions, why))
    heads = (">heard s ago", ">state's age s", ">free", ">sessions", "why")
    print_table(("node", "address", "state", *heads), rows)
    if report.get("problem"):
        say(f"this node: {report['problem']}")
    for peer in report["peers"]:
        if peer.get("problem"):
            say(f"{peer['id']}: {peer['problem']} (its log and this node's say more)")
    places = [
        (model["id"], node["id"], _tier_of(model), format_size(model["bytes"]))
        for node in report["nodes"]
        for model in node["models"]
    ]
    print_table(("model", "node", "tier", ">stored"), sorted(places))
    for model, nodes in report.get("differing", {}).items():
        say(
            f"{model}: nodes have different checkpoints: {'; '.join(map(', '.join, nodes))} (the newest first)"
        )
    _show_served(report["nodes"])
    _show_scaling(report["scaling"])
    _show_moves(report)
    if (directory := report["directory"]) is not None:
        problem = f": {directory['problem']}" if directory["problem"] else ""
        is_listed = (
            "this node is registered" if directory["registered"] else "this node is not registered"
        )
        say(
            f"directory {directory['endpoint']}: {directory['state']}, {is_listed}, "
            f"{len(directory['nodes'])} other nodes{problem}"
        )
    estimates = report["estimates"]
    if estimates["count"]:
        say(
            f"startup estimates: {estimates['count']}, off by {estimates['mean_error_s']:.3f} s on "
            f"average, {estimates['worst_s']:.3f} s at most"
        )


def _seconds(peer: dict[str, Any], key: str) -> str:
    value = peer.get(key, UNKNOWN)
    return value if value == UNKNOWN else "" if value is None else f"{value:.1f}"


def _show_served(nodes: list[dict[str, Any]]) -> None:
    """Show who serves which session, and whose client has it."""
    if any("served" not in node for node in nodes):
        say("sessions: unknown, the node that was asked is of an older release")
    found = [(node["id"], one) for node in nodes for one in node.get("served", ())]
    rows: list[tuple[str, ...]] = [
        (
            one["session"], one["model"], name, one["entry"],
            str(one["prompt_tokens"]), str(one["generated_tokens"]),
        )
        for name, one in found[:SERVED_SHOWN]
    ]  # fmt: skip
    if rows:
        print_table(("session", "model", "node", "entry", ">prompt", ">generated"), rows)
    if (left := len(found) - len(rows)) > 0:
        say(f"and {left} more sessions; --json has all")


def _show_scaling(scaled: list[dict[str, Any]]) -> None:
    rows = [
        (
            one["model"], one["home"] or "", f"{one['minimum']} to {one['maximum']}",
            *(str(one[state]) for state in ("wanted", "ready", "starting", "leaving")), one["reason"],
        )
        for one in scaled
    ]  # fmt: skip
    if rows:
        columns = (">wanted", ">ready", ">starting", ">leaving", "why")
        print_table(("scaled model", "home", "replicas", *columns), rows)


def _show_moves(report: dict[str, Any]) -> None:
    """Show the last moves of readers' sessions, and for which models this node's sessions left."""
    moves: list[tuple[str, ...]] = [
        (
            one["session"], f"{one['origin']} to {one['to']}", one["reason"], one["vacate"],
            one["outcome"], "" if one["gap_s"] is None else f"{1e3 * one['gap_s']:.0f}",
        )
        for one in report["migrations"][:MOVES_SHOWN]
    ]  # fmt: skip
    if moves:
        print_table(("moved session", "nodes", "why", "for", "outcome", ">gap ms"), moves)
    vacates: list[tuple[str, ...]] = [
        (
            one["model"], one["vacate"], ", ".join(one["replicas"]), ", ".join(one["to"]),
            str(one["sessions"]), one["outcome"], f"{one['seconds']:.3f}",
        )
        for one in report["vacates"][:MOVES_SHOWN]
    ]  # fmt: skip
    if vacates:
        heads = ("room for", "by", "from", "its sessions to", ">sessions", "outcome", ">after s")
        print_table(heads, vacates)


def _tier_of(model: dict[str, Any]) -> str:
    """Return the nearest tier that holds all of a model."""
    if model["device"]:
        return "device"
    if model["dram"] >= model["bytes"]:
        return "dram"
    return "nvme" if model["nvme"] >= model["bytes"] else "remote"


def _show_status(report: dict[str, Any]) -> None:
    node = report["node"]
    say(
        f"node {node['id']}  version {node['version']}  {node['state']}  up {node['uptime_s']:.0f} s"
    )
    rows = [_model_row(model) for model in report["models"]]
    columns = ("model", "state", "tier", ">size", ">device", ">DRAM", ">run", ">wait", "notes")
    print_table(columns, rows)
    for name, problem in report.get("unusable", {}).items():
        say(f"not usable: {name}: {problem}")
    for one in report.get("failures", []):
        say(f"{one['model']}: its last load failed {one['age_s']:.0f} s ago: {one['error']}")
    pool = report["pool"]
    for device in report["devices"]:
        used, cached, total = (format_size(device[key]) for key in ("used", "cached", "total"))
        say(f"device {device['name']}: {used} of {total} used, {cached} cached")
    lent = f" and {pool['lent']} lent" if pool.get("lent") else ""
    size = format_size(pool["chunk_bytes"])
    say(f"pinned pool: {pool['used']}{lent} of {pool['chunks']} chunks of {size}")
    for remote in report.get("remotes", []):
        problem = f": {remote['problem']}" if remote["problem"] else ""
        say(
            f"remote {remote['name']} ({remote['url']}): {remote['state']}, "
            f"{len(remote['models'])} models{problem}"
        )
        for model, senders in remote.get("senders", {}).items():
            say(f"  {model} comes from {', '.join(senders) or 'nobody at the moment'}")
        if kept := remote.get("not_offered"):
            say(f"  not offered at the moment, bytes kept (rm deletes them): {', '.join(kept)}")
    for tier, rate in report.get("bandwidth", {}).items():
        if rate:
            say(f"loads from {tier}: {format_rate(rate)} observed")
    rows = [_session_row(session) for session in report["sessions"]]
    heads = (">prompt", ">generated", ">age s", "entry", "node")
    if rows:
        print_table(("session", "model", "state", *heads), rows)


def _session_row(session: dict[str, Any]) -> tuple[str, ...]:
    """Return a session; its entry has the client's connection, its node serves it."""
    moves = ", moves" if session.get("migration") else ""
    return (
        session["session"], session["model"], session["state"],
        str(session["prompt_tokens"]), str(session["generated_tokens"]), f"{session['age_s']:.1f}",
        session.get("entry") or "", (session.get("node") or "") + moves,
    )  # fmt: skip


def _model_row(model: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if model["pinned"]:
        notes.append("pinned")
    if (stalled_s := model.get("stalled_s")) is not None:
        notes.append(f"stalled for {stalled_s:.0f} s")
    if (progress := model.get("progress")) is not None:
        notes.append(f"{100 * progress['bytes_done'] / max(1, progress['bytes_total']):.0f} %")
        if progress["eta_s"] is not None:
            notes.append(f"{progress['eta_s']:.1f} s left")
    if model["devices"]:
        notes.append("on " + " + ".join(model["devices"]))
    if (left := model.get("keep_alive_until_s")) is not None:
        notes.append(f"leaves in {left:.0f} s")
    by_tier = model["bytes_by_tier"]
    if "remote" in by_tier:
        notes.append(f"{100 * by_tier['nvme'] / max(1, by_tier['remote']):.0f} % fetched")
    return (
        model["id"], model["state"], model["tier"], format_size(model["bytes"]),
        format_size(by_tier.get("device", 0)), format_size(by_tier.get("dram", 0)),
        str(model["running"]), str(model["waiting"]), ", ".join(notes),
    )  # fmt: skip
