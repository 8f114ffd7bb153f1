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
    NodeState,
    ReplicaId,
    ReplicaState,
    SessionState,
)
from sllm_node.core.types import SessionId

ReservationId = NewType("ReservationId", str)
"""Made by the asker; asking again with the same one changes nothing."""


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
    """Replicas whose sessions the asker moves away first; the promise holds for their memory too."""
    replica: ReplicaId | None = None
    places: int = 0
    """Sessions that `replica` is to take."""


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

    def next_expiry(self) -> float | None:
        """Return when `expire` has work."""
        return min((expires for _, expires in self._held.values()), default=None)

    def less_promised(self, state: NodeState) -> NodeState:
        """Return the state as others should see it: promised memory, replicas and places are taken."""
        asks = [ask for ask, _ in self._held.values()]
        if not asks:
            return state
        leaving = {name for ask in asks for name in (*ask.evicts, *ask.frees)}
        gone = [r for r in state.replicas if r.replica in leaving]
        devices = tuple(_less(device, asks, gone) for device in state.devices)
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
        replicas = {r.replica: r for r in state.replicas}
        if ask.replica is not None:
            found = replicas.get(ask.replica)
            if found is None or found.free_slots < ask.places:
                return f"replica {ask.replica} has no {ask.places} places"
        for name in ask.evicts:
            if name not in replicas or not replicas[name].is_evictable:
                return f"replica {name} is not idle any more"
        for name in ask.frees:
            if name not in replicas or replicas[name].is_pinned:
                return f"replica {name} is gone, leaving already, or pinned"
        return _shortage(ask, state, [replicas[name] for name in (*ask.evicts, *ask.frees)])


def _shortage(ask: Ask, state: NodeState, leaving: list[ReplicaState]) -> str | None:
    free = {device.name: device.bytes_free for device in state.devices}
    for share in ask.shares:
        room = free.get(share.device, 0) + sum(r.size_on(share.device) for r in leaving)
        if share.size > room:
            return (
                f"device {share.device} has {room} bytes to promise and {share.size} were asked for"
            )
    return None


def _less(device: DeviceState, asks: list[Ask], gone: list[ReplicaState]) -> DeviceState:
    """Take what is promised from a device; memory of leaving replicas is promised, not free."""
    promised = sum(s.size for ask in asks for s in ask.shares if s.device == device.name)
    leaving = sum(replica.size_on(device.name) for replica in gone)
    return replace(device, bytes_free=max(0, device.bytes_free + leaving - promised))


def _taken(replica: ReplicaState, asks: list[Ask]) -> ReplicaState:
    places = sum(ask.places for ask in asks if ask.replica == replica.replica)
    promised = tuple(SessionState(SessionId(""), 0, 0) for _ in range(places))
    return replace(replica, sessions=(*replica.sessions, *promised)) if places else replica
