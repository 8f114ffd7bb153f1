"""The cluster that is simulated, as a TOML file describes it: nodes, models, limits, faults.

Unknown keys are refused and every problem is told at once, as in the node's config. Rates are
GB (10^9 bytes) a second, sizes are written with their unit.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from sllm_node.core.config import (
    ByteSize,
    Name,
    Section,
    decode_value,
    find_problems,
    parse_toml,
    read_text,
    sound_part,
)
from sllm_node.core.errors import ConfigError

Rate = Annotated[float, Meta(gt=0, le=1e6)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Some = Annotated[int, Meta(ge=1, le=100_000)]
Share = Annotated[float, Meta(gt=0, le=1)]


class NodeGroup(Section, frozen=True, kw_only=True):
    """One [[nodes]]: so many nodes that are alike."""

    name: Name
    count: Some = 1
    devices: Some = 1
    hbm: ByteSize
    """Of each device."""
    dram: ByteSize
    """For checkpoints."""
    nvme: ByteSize
    dram_gb_per_s: Rate = 55.0
    """DRAM to one device, stored bytes."""
    nvme_gb_per_s: Rate = 6.0
    clone_gb_per_s: Rate = 394.0
    """Device to device within the node."""
    decode_gb_per_s: Rate = 1870.0
    """What a device writes while it decodes encoded chunks."""
    peer_gb_per_s: Rate = 10.0
    """The network link, from other nodes."""
    remote_gb_per_s: Rate = 1.25
    """From the store that has every model."""


class ModelGroup(Section, frozen=True, kw_only=True):
    """One [[models]]: so many models that are alike."""

    name: Name
    count: Some = 1
    size: ByteSize
    """Decoded bytes of all weights."""
    kv: ByteSize
    """KV memory of a replica."""
    devices: Some = 1
    """That a replica is split over."""
    slots: Some = 8
    """Sessions that a replica takes at once."""
    context: Some = 8192
    prefill_s_per_token: Seconds = 4e-5
    prefill_s: Seconds = 0.03
    token_s: Seconds = 0.02
    """Of a decode step."""
    weight: Rate = 1.0
    """Popularity of each beside models of other groups of the same rank."""


class Popularity(Section, frozen=True, kw_only=True):
    """Table [popularity]: request i goes to the model of rank k with a chance in 1 / k ** zipf."""

    zipf: Annotated[float, Meta(ge=0, le=5)] = 1.0
    copies: Some = 2
    """Nodes that have a model on NVMe at the start, at least; popular ones get what room is left."""


class Codec(Section, frozen=True, kw_only=True):
    """Table [codec]."""

    ratio: Share = 0.7
    """Stored over decoded bytes."""


class Limits(Section, frozen=True, kw_only=True):
    """Table [limits]."""

    wait_s: Seconds = 300.0
    """A request that has not begun by then is given up and counts with this latency."""
    startup_s: Seconds = 5.0
    """The share of requests below it is reported."""
    publish_s: Annotated[float, Meta(gt=0, le=60)] = 0.1
    """How old a changed state may be before others hear of it; policies of ours only."""
    noise: Annotated[float, Meta(ge=0, le=1)] = 0.05
    """Standard deviation of the logarithm of load times around what the rates say."""
    prepare_s: Seconds = 0.05
    """Of a load beside moving bytes."""


class Fault(Section, frozen=True, kw_only=True):
    """One [[faults]]: a node that dies and comes back, or whose NVMe is slow for a while."""

    node: Name
    at_s: Seconds
    lasts_s: Seconds
    slow_nvme: Share | None = None
    """Factor of its NVMe rate meanwhile; without it, the node is gone."""


class Chaos(Section, frozen=True, kw_only=True):
    """Table [chaos]: crashes at random."""

    crashes_per_node_hour: Seconds = 0.0
    restart_s: Seconds = 30.0


class Description(Section, frozen=True, kw_only=True):
    """The whole file."""

    nodes: tuple[NodeGroup, ...] = ()
    models: tuple[ModelGroup, ...] = ()
    popularity: Popularity = Popularity()
    codec: Codec = Codec()
    limits: Limits = Limits()
    chaos: Chaos = Chaos()
    faults: tuple[Fault, ...] = ()


_LISTS: Final[dict[str, type[Section]]] = {
    "nodes": NodeGroup,
    "models": ModelGroup,
    "faults": Fault,
}


def load_description(path: Path) -> Description:
    """Read and check the file at `path`.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    return parse_description(read_text(path), str(path))


def parse_description(text: str, origin: str = "simulation") -> Description:
    """Parse and check TOML `text`; `origin` names it in errors.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    tree = parse_toml(text, origin)
    lists = {key: tree.pop(key, []) for key in _LISTS}
    problems = list(find_problems(Description, tree, ""))
    for key, entries in lists.items():
        problems += _list_problems(key, entries)
    if not problems:
        sound: dict[str, Any] = {**sound_part(Description, tree), **lists}
        described = msgspec.convert(sound, Description, dec_hook=decode_value)
        problems += _contradictions(described)
        if not problems:
            return described
    raise ConfigError(origin, tuple(problems))


def _list_problems(key: str, entries: object) -> Iterator[str]:
    if not isinstance(entries, list):
        yield f"{key} must be a list of tables, as in [[{key}]]"
        return
    required = [f.name for f in msgspec.structs.fields(_LISTS[key]) if f.required]
    for i, entry in enumerate(entries):
        yield from find_problems(_LISTS[key], entry, f"{key}[{i}]")
        for name in required:
            if isinstance(entry, dict) and name not in entry:
                yield f"{key}[{i}].{name}: is missing"


def _contradictions(described: Description) -> Iterator[str]:
    for key in ("nodes", "models"):
        if not getattr(described, key):
            yield f"{key}: there is none; a group is a table [[{key}]]"
        names = [group.name for group in getattr(described, key)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{key}: {name!r} is there twice"
    known = {f"{group.name}-{i}" for group in described.nodes for i in range(group.count)}
    for i, fault in enumerate(described.faults):
        if fault.node not in known:
            yield f"faults[{i}].node = {fault.node!r}: there is no such node; they are called GROUP-NUMBER"
    for group in described.models:
        share = -(-group.size // group.devices) + group.kv // group.devices
        if not any(n.hbm >= share and n.devices >= group.devices for n in described.nodes):
            yield f"models: {group.name!r} takes {share} bytes of {group.devices} devices, which no node has"
