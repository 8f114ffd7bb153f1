"""What a node tells the others of itself: plain frozen data that msgspec encodes as it is.

Sizes are bytes, times are seconds. Clocks of two nodes have nothing in common, so every time here is
counted from the moment the state was made; who receives it adds their own `now`. Of two states of
one boot the higher version is the newer; a new boot id makes all earlier ones void.
"""

from dataclasses import dataclass
from typing import Final, NewType

from sllm_node.core import types
from sllm_node.core.types import ModelId, SessionId, Weights

NodeId = types.NodeId
ReplicaId = NewType("ReplicaId", str)
"""A replica's name, unique within one boot of its node."""
NO_REPLICA: Final = ReplicaId("")
NO_NODE: Final = NodeId("")
BootId = NewType("BootId", str)
"""Drawn at each start of a node."""

FORMAT: Final = 1
"""Of `NodeState` as it is encoded; a receiver refuses others."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device's memory and the loads on their way to it."""

    name: str
    bytes_total: int
    bytes_free: int
    """Neither held by a replica nor promised to a load."""
    loads_done_s: tuple[float, ...] = ()
    """When the bytes of each queued load are expected to be there, in their order."""


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes a second that this node observed (`schedule.estimate`); 0: there is no such path."""

    clone: float
    """Device to device within the node, decoded bytes."""
    decode: float
    """What a device writes while it decodes, decoded bytes."""
    dram: float
    """DRAM to device, stored bytes; and so are the others."""
    nvme: float
    peer: float = 0.0
    """From another node, as far as this one's link goes."""
    remote: float = 0.0
    beside_s: float = 0.0
    """Seconds that a load takes beside its bytes: the module, the tokenizer, KV memory."""
    kept_s: float = 0.0
    """The same where the module is kept from an earlier load."""
    evict_s: float = 0.0
    """Seconds until the memory of idle replicas is free for a load."""
    peer_s: float = 0.0
    """Seconds that one from a peer takes before its first byte: index and texts come first."""


@dataclass(frozen=True, slots=True)
class ResumeFit:
    """Time to resume a session here: `a_s_per_token * tokens + b_s` (`cluster.estimate`)."""

    a_s_per_token: float
    b_s: float


@dataclass(frozen=True, slots=True)
class HeldModel:
    """What this node has of one checkpoint below its devices."""

    model: ModelId
    bytes_decoded: int
    bytes_stored: int
    """Of the whole checkpoint, as links and tiers carry it: smaller than decoded if it is encoded."""
    bytes_dram: int = 0
    """Stored bytes that lie in DRAM."""
    bytes_nvme: int = 0
    """Stored bytes that lie on NVMe, those also in DRAM included; what lacks comes from afar."""
    resume: ResumeFit | None = None
    """None: nothing observed yet."""
    replica_bytes: int = 0
    """What a replica takes of each of its devices here, weights and KV; 0: not told."""
    replica_shares: int = 1
    """Devices here that a replica is split over."""
    context_tokens: int = 0
    created: int = 0
    """Unix time of the conversion."""
    waiting: int = 0
    """Sessions that wait here while no replica of it is here, or coming."""
    is_kept: bool = False
    """Its module is kept here from an earlier load."""
    digest: str = ""
    """Of its weights; empty: an older release does not tell."""

    @property
    def weights(self) -> Weights:
        """Return what its weights are told from others by."""
        return Weights(self.created, self.bytes_stored, self.digest)


@dataclass(frozen=True, slots=True)
class SessionState:
    """A running session as far as moving it matters."""

    session: SessionId
    tokens_in: int
    tokens_out: int
    tokens_per_s: float = 0.0
    """Of its output; what it will have grown by when the state is used."""
    priority: int = 0
    stays: bool = False
    """It is not to be moved for another model: it came by a move, or could not move, not long ago."""
    entry: NodeId = NO_NODE
    """Whose client it is, if not this node's own."""

    def tokens(self, age_s: float) -> float:
        """Return the tokens it has in all, so long after the state was made."""
        return self.tokens_in + self.tokens_out + self.tokens_per_s * age_s


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What a replica takes of one device."""

    device: str
    size: int


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A model on one device or split over several, ready or on its way."""

    replica: ReplicaId
    model: ModelId
    shares: tuple[DeviceShare, ...]
    slots: int
    """Sessions that it takes at once."""
    sessions: tuple[SessionState, ...] = ()
    ready_s: float = 0.0
    """0: it decodes. Else: when its load is expected to be done."""
    next_free_s: float | None = None
    """When a session is expected to end; None: unknown."""
    idle_s: float = 0.0
    """How long nobody has used it."""
    is_pinned: bool = False
    is_leaving: bool = False
    """It takes no new sessions and goes when those it has have ended."""

    @property
    def free_slots(self) -> int:
        """Return how many sessions it could take now."""
        return self.slots - len(self.sessions)

    @property
    def is_evictable(self) -> bool:
        """Tell whether it may leave at once: ready, unused, not pinned."""
        return not (self.sessions or self.is_pinned or self.ready_s > 0)

    @property
    def is_movable(self) -> bool:
        """Tell whether it may leave once its sessions have moved; not if others wait for its places."""
        held = self.is_pinned or self.is_leaving or self.ready_s > 0
        return bool(self.sessions) and len(self.sessions) <= self.slots and not held

    def size_on(self, device: str) -> int:
        """Return the bytes that leave `device` with it."""
        size = 0
        for share in self.shares:
            if share.device == device:
                size += share.size
        return size


@dataclass(frozen=True, slots=True)
class NodeState:
    """All that placement knows of a node."""

    node: NodeId
    boot: BootId
    version: int
    """Counts up with every change; the epoch of reservations."""
    devices: tuple[DeviceState, ...]
    bandwidths: Bandwidths
    models: tuple[HeldModel, ...] = ()
    replicas: tuple[ReplicaState, ...] = ()
    is_draining: bool = False
    nvme_done_s: float = 0.0
    """When the loads that read its NVMe are expected to have read; all its devices share it."""
    link_done_s: float = 0.0
    """The same of its network link: loads from peers and remotes."""
    format: int = FORMAT
    cluster_file: str = ""
    """A digest of the cluster file it follows (`cluster.agreement`); empty: an older release."""
