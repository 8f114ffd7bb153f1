"""What a policy is asked and may answer, and which mechanisms it has beside its decisions."""

from dataclasses import dataclass
from typing import Protocol

from sllm_node.sim.hardware import Device, Node, Replica, Session


@dataclass(frozen=True, slots=True)
class Join:
    """Take a place of a replica, ready or loading."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class Queue:
    """Wait for a place of a replica that is full; decide again if it takes much longer than this."""

    replica: Replica
    expected_s: float


@dataclass(frozen=True, slots=True)
class Go:
    """Where the sessions of a victim go."""

    victim: Replica
    joins: Replica | None = None
    node: Node | None = None
    devices: tuple[Device, ...] = ()
    evicts: tuple[Replica, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Load the model; before that idle replicas leave, sessions move away or are stopped."""

    node: Node
    devices: tuple[Device, ...]
    evicts: tuple[Replica, ...] = ()
    moves: tuple[Go, ...] = ()
    preempts: tuple[Replica, ...] = ()


Choice = Join | Queue | Load | None
"""None: not now; ask again when something has changed."""


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """What the nodes can do, whoever decides."""

    codec: bool = False
    peers: bool = False
    """Load from other nodes at the rate of the link, not of the remote store."""
    clone: bool = False
    """Load from another device of the node."""
    keep_alive: bool = False
    """Idle replicas stay until their room is needed; else as long as their load lasted."""
    resume: bool = False
    """Sessions of a node that died go on from their tokens; else they begin anew."""


class Policy(Protocol):
    """Decides where requests go."""

    def place(self, session: Session) -> Choice:
        """Return where the session goes now."""

    def on_tick(self) -> None:
        """Take notice that some time has passed: published states have come."""

    def on_changed(self, node: Node) -> None:
        """Take notice that the node is not as it was."""
