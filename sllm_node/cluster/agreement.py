"""Whether all nodes have the same cluster file, and the same checkpoint under each name.

Each node tells a digest of its file with its state.

What may differ of a file is left out: where secrets lie, and how the directory is reached. What stands at its
default is left out, too, so that a release which adds a key tells the same of an old file.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from sllm_node.cluster.file import ClusterFile
from sllm_node.cluster.shown import differing
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, NodeId

log = logging.getLogger(__name__)

_CHARACTERS: Final = 16
_LOOK_S: Final = 5.0


def digest_of(cluster: ClusterFile) -> str:
    """Return what is the same for two files that say the same."""
    told: dict[str, Any] = {
        "trust": cluster.trust.mode,
        "timing": _chosen(cluster.timing),
        "limits": _chosen(cluster.limits),
        "placement": _chosen(cluster.placement),
        "models": {name: _chosen(model) for name, model in cluster.models.items()},
    }
    if not cluster.has_directory:  # which has more nodes than any file
        told["nodes"] = sorted((node.id, node.address) for node in cluster.nodes)
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_CHARACTERS]


def _chosen(section: msgspec.Struct) -> dict[str, Any]:
    usual = msgspec.structs.asdict(type(section)())
    return {k: v for k, v in msgspec.structs.asdict(section).items() if v != usual[k]}


class Agreement:
    """Which peers have another file than this node, and for how long."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: so long an edit may take to reach all nodes."""
        self._patience_s = patience_s
        self._since: dict[NodeId, float] = {}
        self._told: dict[NodeId, tuple[str, str]] = {}

    def look(self, mine: str, theirs: Mapping[NodeId, str], now: float) -> None:
        """Compare this node's digest with those of its peers; empty: a peer's release tells none."""
        other = {peer: told for peer, told in theirs.items() if told not in ("", mine)}
        self._since = {peer: self._since.get(peer, now) for peer in other}
        for peer, told in other.items():
            is_long = now - self._since[peer] >= self._patience_s
            if is_long and self._told.get(peer) != (mine, told):
                self._told[peer] = (mine, told)
                log.warning(
                    "a peer has another cluster file",
                    extra={"peer": peer, "mine": mine, "its": told},
                )

    def problem(self, peer: NodeId) -> str | None:
        """Return what is to be shown of a `peer` that has another file; None: it has not."""
        return "has another cluster file" if peer in self._since else None


class Differing:
    """Which models have different checkpoints at different nodes, so that sessions can't go on from one at another."""

    def __init__(self) -> None:
        self._looked_at = -math.inf
        self._known: dict[ModelId, list[list[NodeId]]] = {}

    def look(self, view: ClusterView, now: float) -> None:
        """Warn of each once, and again when other nodes have them; does nothing too soon after the last look."""
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        found = differing(view)
        for model, nodes in found.items():
            if self._known.get(model) != nodes:
                told = "; ".join(map(", ".join, nodes))
                log.warning(
                    "nodes have different checkpoints", extra={"model": model, "nodes": told}
                )
        self._known = found
