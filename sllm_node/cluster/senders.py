"""Which peer a checkpoint's bytes are asked of: one that has all of that version, is well and not busy. Pure."""

from dataclasses import dataclass
from typing import Final

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.cluster.estimate import send_rate
from sllm_node.cluster.state import HeldModel
from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, NodeId

AVOID_S: Final = 1.0
"""How long a peer that gave nothing is not asked for files."""
BUSY_S: Final = 0.02
"""How long one that sends to others is asked only if nobody else can be: about as long as a range takes."""


@dataclass(frozen=True, slots=True)
class Version:
    """What states tell of a checkpoint's version; that the bytes are right is for digests to say."""

    created: int
    stored: int

    @classmethod
    def of(cls, index: TensorIndex) -> "Version":
        """Return the version that has this index."""
        return cls(index.created, index.file_size)


class Senders:
    """What was met with when peers were asked for files."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._avoided: dict[NodeId, float] = {}
        self._busy: dict[NodeId, float] = {}

    def failed(self, peer: NodeId, now: float) -> None:
        """Take note that a peer did not give what it was asked for."""
        self._avoided[peer] = now + AVOID_S

    def is_busy(self, peer: NodeId, now: float) -> None:
        """Take note that a peer sends as much as it may."""
        self._busy[peer] = now + BUSY_S

    def holders(
        self, view: ClusterView, model: ModelId, version: Version | None = None
    ) -> list[tuple[float, NodeId]]:
        """Return (rate, peer) of those that have all of a version; None: of the newest that there is."""
        found = [
            (held, rate, node.node)
            for node in list(view.nodes.values())  # a copy: threads ask, too
            if node.node != self._me
            and (held := node.held.get(model)) is not None
            and (rate := send_rate(held, node.state.bandwidths)) > 0
        ]
        if version is None and found:
            version = max((_version(held) for held, _, _ in found), key=lambda one: one.created)
        return [(rate, peer) for held, rate, peer in found if _version(held) == version]

    def ranked(
        self, view: ClusterView, model: ModelId, version: Version | None, now: float
    ) -> list[tuple[float, NodeId]]:
        """Return (seconds to wait before it is asked, peer), the best first."""
        found = [
            (max(0.0, self._busy.get(peer, 0.0) - now), -rate, peer)
            for rate, peer in self.holders(view, model, version)
            if self._avoided.get(peer, now) <= now
        ]
        return [(wait_s, peer) for wait_s, _, peer in sorted(found)]


def _version(held: HeldModel) -> Version:
    return Version(held.created, held.bytes_stored)
