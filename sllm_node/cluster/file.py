"""The cluster file: which nodes there are, how they trust each other, and how long silence may last.

All nodes have the same file. TOML comes in as the node's config does (`core/config.py`): unknown keys
are refused with their place, and every problem is told at once. Paths in it are relative to its
folder, and `{id}` in them stands for the id of the node that reads it. `reload` is a pure function:
a wrong file raises, so the caller's old one stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from sllm_node.cluster.records import Desired, check
from sllm_node.core.config import (
    ByteSize,
    Count,
    Name,
    NotNegative,
    Seconds,
    Section,
    decode_value,
    find_problems,
    parse_toml,
    sound_part,
)
from sllm_node.core.errors import ConfigError, InvalidRequestError
from sllm_node.core.hosts import address_problem
from sllm_node.core.types import ModelId, NodeId
from sllm_node.core.units import MIB, parse_size

_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_ID_WORDS: Final = "letters, digits, '.', '_' and '-', 64 at most, the first a letter or digit"
LARGEST_DOCUMENT: Final = 4 * MIB
Positive = Annotated[float, Meta(gt=0, le=86400)]


class NodeEntry(Section, frozen=True):
    """One [[nodes]]."""

    id: Annotated[str, Meta(pattern=_ID, description=_ID_WORDS)]
    address: Name
    """host:port that peers reach it under."""


class TrustConfig(Section, frozen=True):
    """Table [trust]: a key that all share, or certificates of a CA (mutual TLS)."""

    mode: Literal["key", "tls"] = "key"
    key_file: Name | None = None
    ca_file: Name | None = None
    certificate_file: Name | None = None
    private_key_file: Name | None = None


class TimingConfig(Section, frozen=True):
    """Table [timing]."""

    heartbeat_s: Positive = 1.0
    suspect_s: Positive = 3.0
    dead_s: Positive = 10.0
    publish_gap_s: Positive = 0.1
    patience_s: Positive | None = None
    """A session that no node takes waits so long for one; left out: six times `dead_s`."""

    @property
    def waits_s(self) -> float:
        """How long a session waits for a node that can take it."""
        return 6 * self.dead_s if self.patience_s is None else self.patience_s


class LimitsConfig(Section, frozen=True):
    """Table [limits]."""

    max_nodes: Count = 64
    """Of `[[nodes]]`, so that a mistaken file is refused; nodes of a directory are not counted."""
    document_bytes: ByteSize = msgspec.field(default_factory=lambda: ByteSize(parse_size("64KiB")))
    replay_window_messages: Annotated[int, Meta(ge=1, le=65536)] = 1024
    peer_bandwidth: ByteSize = msgspec.field(default_factory=lambda: ByteSize(parse_size("1GB")))
    """Bytes a second that a load from a peer is reckoned with before the first one; 0: there is none."""
    files_at_once: Annotated[int, Meta(ge=1, le=64)] = 4
    """Ranges of files that a node sends to peers at the same time, and fetches."""


class PlacementConfig(Section, frozen=True):
    """Table [placement]: running sessions that move to other nodes so that a model can start."""

    moves: bool = True
    gain_s: Seconds = 0.2
    """A start with moves has to be so much sooner than the best without."""
    settle_s: Seconds = 30.0
    """A session that moved, or could not, is left alone for so long."""
    vacate_s: Positive = 60.0
    """A device has to be free so long after; else the request is placed again."""
    max_sessions: Count = 64
    """Sessions that leave one node at once."""
    rebalance_s: Seconds = 0.0
    """A request that waits for so long where another node has a place is placed anew; 0: it stays."""

    @property
    def least_gain_s(self) -> float | None:
        """How much sooner a start with moves has to be; None: none is made."""
        return self.gain_s if self.moves else None


class ScaledModel(Section, frozen=True):
    """Table [models.NAME]: between how many replicas the model has, by demand."""

    min_replicas: NotNegative = 0
    max_replicas: NotNegative = 1
    keep_alive_s: Seconds = 300.0


class DirectoryConfig(Section, frozen=True):
    """Table [directory]: etcd, where nodes find each other beside those of [[nodes]]."""

    endpoints: tuple[Annotated[str, Meta(pattern=r"^https?://[^/\s]+$")], ...] = ()
    prefix: Annotated[str, Meta(pattern=r"^/\S*/$|^/$")] = "/sllm/"
    user: Name | None = None
    password_file: Name | None = None
    ca_file: Name | None = None
    certificate_file: Name | None = None
    private_key_file: Name | None = None
    lease_s: Annotated[int, Meta(ge=1, le=3600)] = 15
    timeout_s: Positive = 5.0


class ClusterFile(Section, frozen=True):
    """The whole file."""

    nodes: tuple[NodeEntry, ...] = ()
    trust: TrustConfig = msgspec.field(default_factory=TrustConfig)
    timing: TimingConfig = msgspec.field(default_factory=TimingConfig)
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    placement: PlacementConfig = msgspec.field(default_factory=PlacementConfig)
    directory: DirectoryConfig = msgspec.field(default_factory=DirectoryConfig)
    models: dict[str, ScaledModel] = msgspec.field(default_factory=dict)

    def peers(self, me: NodeId) -> dict[NodeId, str]:
        """Return the addresses of all nodes but `me`."""
        return {NodeId(node.id): node.address for node in self.nodes if node.id != me}

    def desired(self) -> tuple[Desired, ...]:
        """Return the replicas that [models.NAME] wish for."""
        return tuple(
            Desired(ModelId(name), model.min_replicas, model.max_replicas, model.keep_alive_s)
            for name, model in self.models.items()
        )

    def address(self, me: NodeId) -> str:
        """Return the address of a node; empty: the file does not have it."""
        return next((node.address for node in self.nodes if node.id == me), "")

    @property
    def has_directory(self) -> bool:
        """Whether nodes may come that the file does not name."""
        return bool(self.directory.endpoints)


@dataclass(frozen=True, slots=True)
class Reload:
    """A changed cluster file that is in order, and what it changes."""

    cluster: ClusterFile
    added: tuple[NodeId, ...]
    removed: tuple[NodeId, ...]
    moved: tuple[NodeId, ...]
    """Their address is another."""
    needs_restart: tuple[str, ...]
    """Keys that changed and are only read at start."""


NO_NODES: Final = "nodes: none is named in order; a node is a table [[nodes]] with id and address"
NEEDED_FILES: Final = {
    "key": ("key_file",),
    "tls": ("ca_file", "certificate_file", "private_key_file"),
}
"""By `trust.mode`: the keys of [trust] that have to be set."""


def parse_cluster(
    text: str, origin: str = "cluster file", me: NodeId | None = None, *, may_be_new: bool = False
) -> ClusterFile:
    """Parse and check TOML `text`; `origin` names it in errors. No file is looked at (`named_files` does).

    `may_be_new`: no node need have joined yet.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    tree = parse_toml(text, origin)
    nodes = tree.pop("nodes", [])
    problems = [*find_problems(ClusterFile, tree, ""), *_node_problems(nodes)]
    sound = {**sound_part(ClusterFile, tree), "nodes": _sound_nodes(nodes)}
    cluster = msgspec.convert(sound, ClusterFile, dec_hook=decode_value)
    problems += [one for one in _contradictions(cluster) if not (may_be_new and one == NO_NODES)]
    is_open = cluster.has_directory
    if (
        not problems
        and not is_open
        and me is not None
        and me not in {node.id for node in cluster.nodes}
    ):
        known = ", ".join(node.id for node in cluster.nodes)
        problems.append(f"nodes: {me!r} (node.id of this node's config) is missing; known: {known}")
    if problems:
        raise ConfigError(origin, tuple(problems))
    return cluster


def reload(old: ClusterFile, text: str, origin: str, me: NodeId) -> Reload:
    """Return what the new `text` of the file changes for the node `me`.

    Raises:
        ConfigError: the text is wrong; keep the old file.
    """
    new = parse_cluster(text, origin, me)
    before, after = old.peers(me), new.peers(me)
    return Reload(
        cluster=new,
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        moved=tuple(sorted(name for name in after if before.get(name, after[name]) != after[name])),
        needs_restart=_needs_restart(old, new, me),
    )


def _needs_restart(old: ClusterFile, new: ClusterFile, me: NodeId) -> tuple[str, ...]:
    changed = [] if old.address(me) == new.address(me) else ["nodes.address of this node"]
    for table in ("trust", "timing", "limits", "directory"):
        before, after = getattr(old, table), getattr(new, table)
        changed += [
            f"{table}.{field}"
            for field in before.__struct_fields__
            if getattr(before, field) != getattr(after, field)
        ]
    return tuple(changed)


def _node_problems(nodes: object) -> Iterator[str]:
    if not isinstance(nodes, list):
        yield "nodes must be a list of tables, as in [[nodes]]"
        return
    for i, entry in enumerate(nodes):
        yield from find_problems(NodeEntry, entry, f"nodes[{i}]")
        for key in ("id", "address"):
            if isinstance(entry, dict) and key not in entry:
                yield f"nodes[{i}].{key}: is missing"


def _sound_nodes(nodes: object) -> list[dict[str, Any]]:
    entries = [sound_part(NodeEntry, entry) for entry in nodes] if isinstance(nodes, list) else []
    return [entry for entry in entries if {"id", "address"} <= entry.keys()]


def _contradictions(cluster: ClusterFile) -> Iterator[str]:
    for i, node in enumerate(cluster.nodes):
        if (problem := address_problem(node.address)) is not None:
            yield f"nodes[{i}].address = {node.address!r}: {problem}"
    yield from _duplicates("id", [node.id for node in cluster.nodes])
    yield from _duplicates("address", [node.address.lower() for node in cluster.nodes])
    if not cluster.nodes and not cluster.has_directory:
        yield NO_NODES
    if len(cluster.nodes) > cluster.limits.max_nodes:
        yield f"nodes: {len(cluster.nodes)} are above limits.max_nodes = {cluster.limits.max_nodes}"
    if not 1024 <= cluster.limits.document_bytes <= LARGEST_DOCUMENT:
        size = int(cluster.limits.document_bytes)
        yield f"limits.document_bytes = {size}: must be from 1024 to {LARGEST_DOCUMENT}"
    yield from _timing_problems(cluster.timing)
    yield from _directory_problems(cluster.directory)
    for wish in cluster.desired():
        try:
            check(wish)
        except InvalidRequestError as error:
            yield f"models.{wish.model}: {error}"
    yield from _trust_problems(cluster.trust)


def _duplicates(key: str, values: list[str]) -> Iterator[str]:
    for i, value in enumerate(values):
        if (first := values.index(value)) < i:
            yield f"nodes[{i}].{key} = {value!r}: nodes[{first}] has it already"


def _timing_problems(timing: TimingConfig) -> Iterator[str]:
    if timing.suspect_s < 2 * timing.heartbeat_s:
        yield (
            f"timing.suspect_s = {timing.suspect_s}: must be twice timing.heartbeat_s "
            f"({timing.heartbeat_s}) at least, so that one lost message makes nobody suspect"
        )
    if timing.dead_s < timing.suspect_s + timing.heartbeat_s:
        yield (
            f"timing.dead_s = {timing.dead_s}: must be timing.suspect_s + timing.heartbeat_s "
            f"({timing.suspect_s + timing.heartbeat_s}) at least"
        )
    if timing.publish_gap_s > timing.heartbeat_s:
        yield (
            f"timing.publish_gap_s = {timing.publish_gap_s}: must not be above "
            f"timing.heartbeat_s ({timing.heartbeat_s})"
        )


def _directory_problems(directory: DirectoryConfig) -> Iterator[str]:
    if not directory.endpoints and directory != DirectoryConfig():
        yield 'directory.endpoints: is missing, as in ["https://10.0.0.1:2379"]'
    for key, other in (
        ("password_file", "user"), ("user", "password_file"),
        ("certificate_file", "private_key_file"), ("private_key_file", "certificate_file"),
    ):  # fmt: skip
        if getattr(directory, key) is not None and getattr(directory, other) is None:
            yield f"directory.{other}: is missing, and directory.{key} needs it"
    for key in ("ca_file", "certificate_file"):
        is_https = all(one.startswith("https:") for one in directory.endpoints)
        if getattr(directory, key) is not None and not is_https:
            yield f"directory.{key}: has no use with an http:// endpoint"


def _trust_problems(trust: TrustConfig) -> Iterator[str]:
    needed = NEEDED_FILES[trust.mode]
    for key in ("key_file", "ca_file", "certificate_file", "private_key_file"):
        is_set = getattr(trust, key) is not None
        if key in needed and not is_set:
            yield f"trust.{key}: is missing, and trust.mode = {trust.mode!r} needs it"
        if is_set and key not in needed:
            yield f"trust.{key}: has no use with trust.mode = {trust.mode!r}; remove it"
