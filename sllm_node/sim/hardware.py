"""What a simulated cluster is made of: models, sessions, replicas, devices, nodes. Mutable, no decisions.

All sizes are bytes, all times seconds of the simulation. Tiers below the devices are LRU lists of
whole checkpoints. `free` of a device is what nobody was promised.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from sllm_node.cluster.state import Bandwidths, NodeId, ReplicaId
from sllm_node.core.types import ModelId
from sllm_node.schedule.estimate import MovingAverage
from sllm_node.sim.description import NodeGroup

_GB: Final = 1e9


@dataclass(frozen=True, slots=True)
class Model:
    """One model."""

    number: int
    id: ModelId
    decoded: int
    stored: int
    share: int
    """Memory on each of its devices: weights and KV."""
    shares: int
    slots: int
    prefill_s_per_token: float
    prefill_s: float
    token_s: float

    def resume_s(self, tokens: float) -> float:
        """Return the seconds to compute so many tokens' KV."""
        return self.prefill_s_per_token * tokens + self.prefill_s


@dataclass(slots=True, eq=False)
class Session:
    """One generation and how far it is."""

    number: int
    model: Model
    arrival_s: float
    tokens_in: int
    tokens_out: int
    """That it will have in the end."""
    done: int = 0
    """Tokens out when it last began."""
    decode_from: float = 0.0
    """When the first token after those comes."""
    ends_at: float = 0.0
    life: int = 0
    """Counts up with every change of `ends_at`, so that older events are void."""
    loaded_s: float | None = None
    """Since arrival, until its model was there."""
    first_s: float | None = None
    """Since arrival, until its first token."""
    replica: "Replica | None" = None
    preempted: int = 0
    is_over: bool = False

    def out_at(self, now: float) -> int:
        """Return its tokens out at `now`."""
        if now < self.decode_from:
            return self.done
        more = 1 + int((now - self.decode_from) / self.model.token_s)
        return min(self.tokens_out, self.done + more)


@dataclass(slots=True, eq=False)
class Replica:
    """A model on devices of a node, ready or on its way."""

    name: ReplicaId
    model: Model
    node: "Node"
    devices: tuple["Device", ...]
    sessions: dict[int, Session] = field(default_factory=dict)
    waiting: deque[Session] = field(default_factory=deque)
    """For a place."""
    incoming: int = 0
    """Places promised to sessions that move here."""
    is_ready: bool = False
    is_leaving: bool = False
    """Its sessions are being moved away."""
    is_gone: bool = False
    expected_at: float = 0.0
    """When it should be ready."""
    load_s: float = 0.0
    idle_since: float = 0.0
    idles: int = 0
    """Counts up whenever it falls idle."""
    leaving: list["Moving"] = field(default_factory=list)
    """Replicas that are to go before it can be loaded, in order."""
    followers: list["Replica"] = field(default_factory=list)
    """Replicas whose victims' sessions come here once it is ready."""

    @property
    def free_slots(self) -> int:
        """Return how many sessions it could take now."""
        return self.model.slots - len(self.sessions) - self.incoming

    @property
    def is_idle(self) -> bool:
        """Tell whether it may leave at once."""
        return self.is_ready and not (
            self.sessions or self.incoming or self.waiting or self.is_leaving
        )


@dataclass(slots=True, eq=False)
class Moving:
    """A victim and where its sessions go."""

    victim: Replica
    to: Replica
    promised: int = 0
    """Places there that are still kept for them."""


@dataclass(slots=True, eq=False)
class Device:
    """One accelerator."""

    name: str
    free: int
    total: int
    link_until: float = 0.0
    """When the loads onto it that have begun or wait will be done."""


@dataclass(slots=True, eq=False)
class Node:
    """One host."""

    id: NodeId
    devices: tuple[Device, ...]
    rates: Bandwidths
    """As they really are."""
    told: Bandwidths
    """As the node has observed and published them."""
    dram: "Tier"
    nvme: "Tier"
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict)
    nvme_until: float = 0.0
    link_until: float = 0.0
    sends_until: float = 0.0
    is_up: bool = True
    boot: int = 1
    version: int = 1
    made: int = 0
    """Replicas so far; for their names."""
    observed_nvme: MovingAverage = field(default_factory=lambda: MovingAverage(0.0))


class Tier:
    """Whole checkpoints on one tier of a node, the least recently used first."""

    __slots__ = ("free", "models", "version")

    def __init__(self, size: int) -> None:
        self.free = size
        self.models: OrderedDict[int, Model] = OrderedDict()
        self.version = 0
        """Counts up when models come or go."""

    def has(self, model: Model) -> bool:
        """Tell whether it is here."""
        return model.number in self.models

    def touch(self, model: Model) -> None:
        """Note that it was used."""
        self.models.move_to_end(model.number)

    def add(self, model: Model, kept: frozenset[int] = frozenset()) -> list[Model] | None:
        """Put it here and return what left for it, none of `kept`; None: there is no room."""
        if self.has(model):
            self.touch(model)
            return []
        gone: list[Model] = []
        free = self.free
        for other in self.models.values():
            if free >= model.stored:
                break
            if other.number not in kept:
                gone.append(other)
                free += other.stored
        if free < model.stored:
            return None
        for other in gone:
            del self.models[other.number]
        self.models[model.number] = model
        self.free = free - model.stored
        self.version += 1
        return gone

    def clear(self) -> None:
        """Forget all."""
        self.free += sum(model.stored for model in self.models.values())
        self.models.clear()
        self.version += 1


def make_node(group: NodeGroup, number: int) -> Node:
    """Return a node of a group with nothing on it."""
    rates = Bandwidths(
        clone=group.clone_gb_per_s * _GB, decode=group.decode_gb_per_s * _GB,
        dram=group.dram_gb_per_s * _GB, nvme=group.nvme_gb_per_s * _GB,
        peer=group.peer_gb_per_s * _GB, remote=group.remote_gb_per_s * _GB,
    )  # fmt: skip
    devices = tuple(Device(f"cuda:{i}", group.hbm, group.hbm) for i in range(group.devices))
    name = NodeId(f"{group.name}-{number}")
    return Node(name, devices, rates, rates, Tier(group.dram), Tier(group.nvme))
