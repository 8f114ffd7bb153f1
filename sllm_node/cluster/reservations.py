"""What a node has promised to others' placements but not begun: the last word lies with the target.

Entry nodes decide on states that may be old, and at once. So before anything moves, the target is asked
for what the decision counts on: memory on devices (with idle replicas to be evicted), or a place in a
replica. It looks at its own state less what it has promised; a refusal carries that state, so that the
next decision of the one refused is made on fresh news and differs. A promise ends when it is used, given
up, or `ttl_s` seconds old, so a dead asker blocks nothing for long.
"""

from dataclasses import dataclass, replace
from typing import NewType

from sllm_node.cluster.state import (
    BootId,
    DeviceShare,
    DeviceState,
    NodeId,
    NodeState,
    ReplicaId,
    ReplicaState,
)
from sllm_node.core.types import SessionId

ReservationId = NewType("ReservationId", str)
"""Made by the asker; asking again with the same one changes nothing."""


@dataclass(frozen=True, slots=True)
class Away:
    """Running sessions of a replica that are to go on at another node, so that its memory is free."""

    replica: ReplicaId
    sessions: tuple[SessionId, ...]
    to: NodeId


@dataclass(frozen=True, slots=True)
class Ask:
    """What a decision counts on at one node."""

    id: ReservationId
    boot: BootId
    """Of the state decided on."""
    version: int
    shares: tuple[DeviceShare, ...] = ()
    """Bytes on devices; with `places` 0."""
    evicts: tuple[ReplicaId, ...] = ()
    """Idle replicas that make room for them."""
    frees: tuple[ReplicaId, ...] = ()
    """Replicas whose sessions move away first; the promise holds for their memory too."""
    replica: ReplicaId | None = None
    places: int = 0
    """Sessions that `replica` is to take."""
    aways: tuple[Away, ...] = ()
    """Of `frees`: which sessions go where, as the target is to see to (`cluster.vacate`)."""
    ready_s: float = 0.0
    """With `aways`: when the model was expected to serve, from now."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The promise stands until `expires` in the target's clock."""

    id: ReservationId
    expires: float


@dataclass(frozen=True, slots=True)
class Refused:
    """No promise: decide again with `state`, from which what is promised has been taken."""

    id: ReservationId
    reason: str
    state: NodeState


class Reservations:
    """The promises of one node."""

    def __init__(self, ttl_s: float, limit: int = 1024) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        """Of promises at once."""
        self._held: dict[ReservationId, tuple[Ask, float]] = {}

    def ask(self, ask: Ask, state: NodeState, now: float) -> Granted | Refused:
        """Promise or refuse; `state` is the node's own, as it is now."""
        self.expire(now)
        old = self._held.get(ask.id)
        if old:
            return Granted(ask.id, old[1])
        left = self.less_promised(state)
        reason = self._objection(ask, left)
        if reason:
            return Refused(ask.id, reason, left)
        expires = now + self._ttl_s
        self._held[ask.id] = (ask, expires)
        return Granted(ask.id, expires)

    def release(self, reservation: ReservationId) -> bool:
        """Drop a promise, given up or used (the node's state tells of it from now on); False: it is gone."""
        return self._held.pop(reservation, None) is not None

    def expire(self, now: float) -> list[ReservationId]:
        """Drop and return the promises that nobody used in time."""
        gone = [key for key, (_, expires) in self._held.items() if expires <= now]
        for key in gone:
            del self._held[key]
        return gone

    def less_promised(self, state: NodeState) -> NodeState:
        """Return the state as others should see it: promised memory, replicas and places are taken."""
        asks = [ask for ask, _ in self._held.values()]
        if not asks:
            return state
        leaving = {name for ask in asks for name in (*ask.evicts, *ask.frees)}
        devices = tuple(_less(device, asks, state) for device in state.devices)
        staying = (r for r in state.replicas if r.replica not in leaving)
        return replace(state, devices=devices, replicas=tuple(_taken(r, asks) for r in staying))

    def _objection(self, ask: Ask, state: NodeState) -> str | None:
        """Return why not; None: it can be had."""
        if ask.boot != state.boot:
            return f"node {state.node} has restarted since; its replicas are others now"
        if state.is_draining:
            return f"node {state.node} is draining"
        if len(self._held) >= self._limit:
            return f"node {state.node} has made {self._limit} promises, which is the limit"
        return _missing_replica(ask, state) or _shortage(ask, state)


def _missing_replica(ask: Ask, state: NodeState) -> str | None:
    replicas = {r.replica: r for r in state.replicas}
    if ask.replica is not None:
        found = replicas.get(ask.replica)
        if found is None or found.free_slots < ask.places:
            return f"replica {ask.replica} has not {ask.places} places"
    for name in ask.evicts:
        if name not in replicas or not replicas[name].is_evictable:
            return f"replica {name} is not idle any more"
    for name in ask.frees:
        found = replicas.get(name)
        if found is None or found.is_pinned or found.is_leaving or found.ready_s > 0:
            return f"replica {name} is gone, leaving already, or must stay"
    return None


def _shortage(ask: Ask, state: NodeState) -> str | None:
    leaving = [r for r in state.replicas if r.replica in ask.evicts or r.replica in ask.frees]
    free = {device.name: device.bytes_free for device in state.devices}
    for share in ask.shares:
        room = free.get(share.device, 0) + sum(r.size_on(share.device) for r in leaving)
        if share.size > room:
            return (
                f"device {share.device} has {room} bytes to promise and {share.size} were asked for"
            )
    return None


def _less(device: DeviceState, asks: list[Ask], state: NodeState) -> DeviceState:
    """Take what is promised from a device; what evictions leave over is not free before they are done."""
    promised = 0
    for ask in asks:
        leaving = sum(
            r.size_on(device.name)
            for r in state.replicas
            if r.replica in ask.evicts or r.replica in ask.frees
        )
        asked = sum(share.size for share in ask.shares if share.device == device.name)
        promised += max(0, asked - leaving)
    return replace(device, bytes_free=max(0, device.bytes_free - promised))


def _taken(replica: ReplicaState, asks: list[Ask]) -> ReplicaState:
    """Take promised places from a replica; one with promises may neither leave nor be emptied."""
    places = sum(ask.places for ask in asks if ask.replica == replica.replica)
    if not places:
        return replica
    return replace(replica, slots=replica.slots - places, is_pinned=True)
