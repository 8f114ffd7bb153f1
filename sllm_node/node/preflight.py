"""Would a node with this config start here, and serve well: what `check-config` says line by line.

An error is what a start would fail of; a warning is what an operator should know before it. Nothing is
changed: what a folder allows is tried with a file that has no name. Where the node runs already, it has
the port and the memory, and that is no error. Whether it does is told by its journal's lock: whoever
listens on the port before a start may be anybody, and is sent nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sllm_node.checkpoint.catalog import Catalog, may_go
from sllm_node.cluster.cluster import own_address
from sllm_node.cluster.file import ClusterFile
from sllm_node.cluster.journal import TAKEN, is_taken
from sllm_node.cluster.named_files import load_cluster
from sllm_node.core.config import Config
from sllm_node.core.errors import ClusterKeyError, ConfigError, DeviceError, SllmError
from sllm_node.core.hosts import is_loopback
from sllm_node.core.types import NodeId
from sllm_node.core.units import GIB, format_size
from sllm_node.node import folders
from sllm_node.node.kept import journal_path
from sllm_node.node.machine import Machine
from sllm_node.node.unfit import unfit

Level = Literal["ok", "warning", "error"]
LITTLE_BYTES: Final = 1 * GIB
"""Of free disk: below it a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a preflight."""

    level: Level
    about: str
    """A key of the config, mostly."""
    said: str
    todo: str = ""

    @property
    def line(self) -> str:
        """The finding without its level."""
        return f"{self.about}: {self.said}" + (f"; {self.todo}" if self.todo else "")


def preflight(config: Config, file: Path, machine: Machine) -> Iterator[Finding]:
    """Yield what is found, in the order in which a start would come upon it."""
    is_held = is_taken(journal_path(config))
    is_running = is_held and _is_served(config, machine)
    yield from _file_findings(config, file)
    yield from _store_findings(config, machine)
    yield from _journal_findings(config, machine, is_strange=is_held and not is_running)
    yield from _memory_findings(config, machine, is_running=is_running)
    yield from _device_findings(config, machine, is_running=is_running)
    yield from _remote_findings(config)
    yield from _server_findings(config, machine, is_running=is_running)
    if config.cluster.file:
        yield from _cluster_findings(config, machine, is_running=is_running)


def _is_served(config: Config, machine: Machine) -> bool:
    """Tell whether somebody listens on the node's port; 0 is a new one at each start."""
    server = config.server
    return server.port == 0 or machine.listen_problem(server.host, server.port) is not None


def _file_findings(config: Config, file: Path) -> Iterator[Finding]:
    yield Finding("ok", "file", f"{file} has no unknown keys and no contradictions")
    has_keys = bool(config.server.api_keys or config.server.admin_keys)
    if has_keys and file.stat().st_mode & 0o004:
        yield Finding(
            "warning", "file", "everybody on this machine can read the keys in it",
            f"run 'chmod o= {file}'; who starts the node must still hand it over, as LoadCredential= of "
            "the unit in systemd/ does",
        )  # fmt: skip


# --- folders --------------------------------------------------------------------------------------


def _store_findings(config: Config, machine: Machine) -> Iterator[Finding]:
    path, key = Path(config.store.path), "store.path"
    look = machine.look(path)
    if look.problem is not None:
        level: Level = "error" if look.is_fatal else "warning"
        goes_on = "" if look.is_fatal else "what is there is served, and nothing comes to it; "
        todo = f"{goes_on}{_mending(look)}, or change store.path"
        yield Finding(level, key, f"{path}: {look.problem}", todo)
    elif not look.exists:
        yield Finding("ok", key, f"{path} is not there yet; the node makes it")
    if look.exists:
        yield from _catalog_findings(config, path)
    if look.free is not None:
        is_little = look.free < LITTLE_BYTES
        yield Finding(
            "warning" if is_little else "ok", key, f"{format_size(look.free)} free on its disk",
            "make room: conversions and fetched models need it" if is_little else "",
        )  # fmt: skip
    if config.store.direct_io and look.is_direct is False:
        yield Finding(
            "warning", "store.direct_io", f"the file system of {path} refuses direct I/O",
            "reads go through the page cache, twice through memory; use a disk's file system (ext4, xfs)",
        )  # fmt: skip
    elif config.store.direct_io and look.is_direct:
        yield Finding("ok", "store.direct_io", "direct I/O works")


def _mending(look: folders.Look) -> str:
    """Return what makes a folder writable."""
    if look.is_full:
        return f"make room on the disk of {look.place}"
    return f"let the user of the node write {look.place}"


def _catalog_findings(config: Config, path: Path) -> Iterator[Finding]:
    catalog = Catalog(path)
    try:
        catalog.scan()
    except OSError as error:
        todo = "let the user of the node read it"
        yield Finding("error", "store.path", f"{path}: {error.strerror}", todo)
        return
    found = catalog.models()
    yield Finding("ok", "store.path", f"{path}: {len(found)} checkpoints")
    for name, problem in sorted(catalog.problems.items()):
        is_ours = may_go(path / name)
        mend = (
            f"'sllm-node rm {name}' deletes it"
            if is_ours
            else "if it is none, move it out of the store"
        )
        todo = f"the node starts without it; {mend}"
        yield Finding("warning", "store.path", f"checkpoint {name}: {problem}", todo)
    for misfit in unfit(catalog, found, config.store.chunk_bytes).values():
        said = f"no request for this checkpoint can be served: {misfit}"
        yield Finding("warning", "store.chunk_bytes", said)
    is_alone = not (config.remotes or config.cluster.file)
    for name in sorted(config.models):
        if is_alone and name not in found and name not in catalog.problems:
            said = "there is no such checkpoint in the store"
            yield Finding("warning", f"models.{name}", said, "convert it, or mend the name")


def _journal_findings(config: Config, machine: Machine, *, is_strange: bool) -> Iterator[Finding]:
    """Look at the journal; a stranger that has it is told."""
    path = journal_path(config)
    look = machine.look(path.parent)
    if look.problem is not None:
        is_opened = look.is_full and path.exists()
        goes_on = "the node starts, and can keep no new pin or alias; " if is_opened else ""
        todo = f"{goes_on}{_mending(look)}, or set node.journal to a file elsewhere"
        level: Level = "warning" if is_opened else "error"
        yield Finding(level, "node.journal", f"{path.parent}: {look.problem}", todo)
    elif is_strange:
        yield Finding("error", "node.journal", f"{path}: {TAKEN}")
    else:
        yield Finding("ok", "node.journal", f"{path} can be written")


# --- memory ---------------------------------------------------------------------------------------


def _memory_findings(config: Config, machine: Machine, *, is_running: bool) -> Iterator[Finding]:
    memory, key = machine.memory(), "store.pool_bytes"
    pool, on_cpu = int(config.store.pool_bytes), _cpu_bytes(config)
    words = f"{format_size(pool)} of {format_size(memory.total)} of memory"
    lower = "lower store.pool_bytes"
    if pool >= memory.total:
        yield Finding("error", key, f"{words}: more than this process may have", lower)
    elif pool > memory.available and not is_running:
        said = f"{words}, of which {format_size(memory.available)} are free now"
        yield Finding("warning", key, said, f"stop what else runs here, or {lower}")
    else:
        yield Finding("ok", key, words)
    if on_cpu and pool < memory.total < pool + on_cpu:
        yield Finding(
            "warning", "device.memory_bytes",
            f"pool and CPU devices may take {format_size(pool + on_cpu)}, more than there is",
            f"{lower} or device.memory_bytes ({format_size(on_cpu)} in all)",
        )  # fmt: skip
    yield from _lock_findings(config, machine)


def _cpu_bytes(config: Config) -> int:
    if not config.device.names[0].startswith("cpu"):
        return 0
    return len(config.device.names) * int(config.device.cpu_bytes)


def _lock_findings(config: Config, machine: Machine) -> Iterator[Finding]:
    """Look at the limit of locked memory, where the pool is registered with a driver."""
    limit = machine.lockable()
    if config.device.names[0].startswith("cpu"):
        return
    if limit is None or limit >= config.store.pool_bytes:
        yield Finding("ok", "RLIMIT_MEMLOCK", "the pool may be page-locked")
        return
    yield Finding(
        "warning", "RLIMIT_MEMLOCK",
        f"{format_size(limit)} may be page-locked, the pool has {format_size(config.store.pool_bytes)}",
        "LimitMEMLOCK=infinity in the unit, 'ulimit -l unlimited' in a shell; some drivers insist on it",
    )  # fmt: skip


def _device_findings(config: Config, machine: Machine, *, is_running: bool) -> Iterator[Finding]:
    key = "device.names"
    if config.device.names[0].startswith("cpu"):
        yield Finding("ok", key, f"{len(config.device.names)} on this machine's CPU")
        return
    try:
        found = machine.devices(config.device)
    except DeviceError as error:
        level: Level = "warning" if is_running else "error"
        yield Finding(level, key, str(error), "the node that runs has it" if is_running else "")
        return
    for room in found:
        words = f"{room.name}: {format_size(room.asked)} asked, {format_size(room.free)} free"
        if room.asked <= room.free or is_running:
            yield Finding("ok", key, words)
        else:
            todo = "lower device.memory_bytes, or see with 'nvidia-smi' who has it"
            yield Finding("warning", key, words, todo)
        if room.asked <= config.engine.kv_cache_bytes:
            said = (
                f"{words}: less than engine.kv_cache_bytes, so no model fits beside its KV memory"
            )
            yield Finding("warning", key, said, "lower engine.kv_cache_bytes")


# --- others ---------------------------------------------------------------------------------------


def _remote_findings(config: Config) -> Iterator[Finding]:
    for name, remote in config.remotes.items():
        for key in ("key_file", "credentials_file"):
            named = getattr(remote, key)
            if named is None:
                continue
            problem = folders.reading_problem(Path(named))
            level: Level = "ok" if problem is None else "error"
            todo = "" if problem is None else "let the user of the node read it"
            yield Finding(level, f"remotes.{name}.{key}", f"{named} {problem or 'is there'}", todo)


def _server_findings(config: Config, machine: Machine, *, is_running: bool) -> Iterator[Finding]:
    server, key = config.server, "server.port"
    problem = machine.listen_problem(server.host, server.port)
    where = f"{server.host}:{server.port}"
    if problem is None:
        yield Finding("ok", key, f"{where} is free")
    elif is_running:
        yield Finding("ok", key, f"{where}: this node runs already, and serves there")
    else:
        todo = "stop who listens there ('ss -ltnp' shows it), or change server.host, server.port"
        yield Finding("error", key, f"can't listen on {where}: {problem}", todo)
    if is_loopback(server.host):
        return
    if not server.api_keys:
        said = "whoever reaches this port may use and administer the node"
        yield Finding(
            "warning", "server.api_keys", said, "set server.api_keys and server.admin_keys"
        )
    elif not server.admin_keys:
        said = "whoever has an API key may also drain the node and unload models"
        yield Finding("warning", "server.admin_keys", said, "set server.admin_keys")


def _cluster_findings(config: Config, machine: Machine, *, is_running: bool) -> Iterator[Finding]:
    path, me = Path(config.cluster.file), NodeId(config.node.id)
    try:
        cluster = load_cluster(path, me)
        address = own_address(config, cluster)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("error", "cluster.file", f"{error.path}: {problem}")
        return
    except SllmError as error:
        yield Finding("error", "cluster.file", str(error))
        return
    yield Finding("ok", "cluster.file", _in_words(cluster, me, address))
    yield from _trust_findings(cluster, path, me, address)
    listen = config.cluster.listen or address
    host, _, port = listen.rpartition(":")
    taken = machine.listen_problem(host.strip("[]"), int(port))
    if taken is None:
        yield Finding("ok", "cluster.listen", f"{listen} is free")
    elif is_running:
        yield Finding("ok", "cluster.listen", f"{listen}: the node that runs has it")
    else:
        todo = (
            "stop who listens there; where the address is not of an interface here, set "
            'cluster.listen, as in "0.0.0.0:8100"'
        )
        yield Finding("error", "cluster.listen", f"can't listen on {listen}: {taken}", todo)


def _in_words(cluster: ClusterFile, me: NodeId, address: str) -> str:
    others = len(cluster.peers(me))
    return f"node {me!r} at {address}, {others} other{'s' * (others != 1)} named"


def _trust_findings(
    cluster: ClusterFile, path: Path, me: NodeId, address: str
) -> Iterator[Finding]:
    """Open keys and certificates as a start does."""
    from sllm_node.cluster.trust import open_trust

    try:
        open_trust(cluster, path, me, address, lambda: 1)
    except ConfigError as error:
        yield from (Finding("error", "cluster.file", problem) for problem in error.problems)
    except ClusterKeyError as error:
        yield Finding("error", "cluster.file", str(error))
    else:
        words = "the shared key" if cluster.trust.mode == "key" else "certificates"
        yield Finding("ok", "cluster.file", f"{words} can be used")
