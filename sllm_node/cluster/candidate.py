"""What is to be placed, and one way to start it: what `placement` compares and `choice` takes. Pure."""

from dataclasses import dataclass
from enum import IntEnum

from sllm_node.cluster.estimate import Source
from sllm_node.cluster.moves import Move
from sllm_node.cluster.state import NO_REPLICA, NodeId, ReplicaId
from sllm_node.core.types import ModelId, Weights


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What is to be placed."""

    model: ModelId
    share_bytes: int
    """Memory that a replica takes of each of its devices: weights and KV."""
    shares: int = 1
    """Devices of one node that a replica is split over."""
    priority: int = 0
    """Sessions of higher priority are not moved for it."""
    tokens: int = 0
    """Prompt and output, at most; a node that tells that a session can have fewer gets none of it."""
    weights: Weights | None = None
    """What it began with: a node that tells of others gets none of it. None: any will do."""


class Kind(IntEnum):
    """Ways to start, the one that disturbs least first."""

    SERVE = 0
    WAIT = 1
    LOAD = 2
    EVICT = 3
    """Load after idle replicas have left."""
    MIGRATE = 4


_REASONS = {
    Kind.SERVE: "a replica has a place",
    Kind.WAIT: "a replica will have a place",
    Kind.LOAD: "there is room to load it",
    Kind.EVICT: "there is room to load it once idle replicas are evicted",
    Kind.MIGRATE: "there is room to load it once sessions have moved",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to start, with its estimates in seconds."""

    kind: Kind
    startup_s: float
    """Until the request can be decoded."""
    node: NodeId
    devices: tuple[str, ...]
    crowding: float = 0.0
    """Share of a replica's places that are taken."""
    replica: ReplicaId = NO_REPLICA
    wait_s: float = 0.0
    """Before the load: the queue of the devices, or the moves if they last longer; or for a place."""
    load_s: float = 0.0
    """Of its own load, or what is left of one under way."""
    source: Source | None = None
    evicts: tuple[ReplicaId, ...] = ()
    moves: tuple[Move, ...] = ()

    @property
    def key(self) -> tuple[float, int, float, NodeId, tuple[str, ...], ReplicaId]:
        """Return what candidates are compared by; no two have the same."""
        return (
            self.startup_s, self.kind, self.crowding, self.node, self.devices, self.replica,
        )  # fmt: skip

    @property
    def reason(self) -> str:
        """Return a sentence for logs and `status`."""
        what = f"{self.node} {','.join(self.devices)}: {_REASONS[self.kind]}"
        parts = f"wait {self.wait_s:.3f} s, load {self.load_s:.3f} s"
        source = f" from {self.source.value}" if self.source else ""
        return f"{what}; starts in {self.startup_s:.3f} s ({parts}{source})"
