"""Making room at one node by moves: which sessions leave, whether they do, when it is given up. Pure.

    leaving -> freed | refused | late | over

A placement that moves sessions asks the node where the model is to load. That node checks the ask on its
own state, closes the replicas for the model that waits (`Scheduler.on_promise`, which also keeps the room
for it), and asks the entry of each of their sessions to move it; all at once, so that the destination
computes them in one batch. The scheduler does the rest: the last session gone, it evicts and loads. The
vacate is over when the model loads (freed), an entry says that a session stays (refused), it takes too
long (late), or nobody waits for the model any more (over). After `refused` and `late` the replicas are
open again, what has moved has moved, and all who wait for the model go back to their entries, to be
placed anew.

Others see all this in the node's state (`shown`), so they don't count on what can't be: the model is on
its way there, its memory is taken, and sessions stay that may not move: on devices of which one is being
vacated already, above the limit of sessions that leave at once, and where a vacate has just failed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from sllm_node.cluster.estimate import coming_s
from sllm_node.cluster.reservations import Ask
from sllm_node.cluster.state import NodeId, NodeState, ReplicaId, ReplicaState
from sllm_node.core.types import ModelId, ModelState, SessionId
from sllm_node.schedule.actions import ModelView

_REMEMBERED: Final = 4096
"""Sessions of which is known that they stay."""


@dataclass(frozen=True, slots=True)
class VacateLimits:
    """How much, and how long."""

    vacate_s: float
    settle_s: float
    max_sessions: int


@dataclass(slots=True)
class Vacate:
    """Sessions that leave so that a model can load."""

    id: str
    """The session that waits for it."""
    model: ModelId
    ask: Ask
    began: float
    until: float
    sessions: dict[SessionId, NodeId]
    """Those that were asked to leave, and where to."""
    outcome: str = "leaving"
    reason: str = ""
    seconds: float = 0.0

    def fields(self) -> dict[str, object]:
        """Return what logs and `status` say."""
        return {
            "vacate": self.id, "model": self.model, "replicas": list(self.ask.frees),
            "devices": [share.device for share in self.ask.shares],
            "sessions": len(self.sessions), "to": sorted(set(self.sessions.values())),
            "outcome": self.outcome, "seconds": round(self.seconds, 4),
            **({"reason": self.reason} if self.reason else {}),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class AskToLeave:
    """Have the entry of a session move it."""

    session: SessionId
    to: NodeId
    vacate: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A vacate has its outcome."""

    vacate: Vacate


Action = AskToLeave | Ended


def joined(ask: Ask, model: ModelId, state: NodeState) -> Ask:
    """Return the ask without its wish for memory if the model is there or coming since: it waits for that.

    It was to be loaded, and that has begun meanwhile: by a hint, or for another session.
    """
    here = (r for r in state.replicas if r.model == model and not r.is_leaving)
    if ask.shares and any(replica.free_slots > 0 for replica in here):
        return replace(ask, shares=(), evicts=(), frees=(), aways=())
    return ask


def objection(ask: Ask, state: NodeState) -> str | None:
    """Return why the sessions of an ask can't leave, by the node's own state (`shown`); None: they can."""
    replicas = {r.replica: r for r in state.replicas}
    for away in ask.aways:
        found = replicas.get(away.replica)
        if found is None:
            return f"replica {away.replica} is gone"
        if not (found.is_movable or found.is_evictable):
            return f"replica {away.replica} has to stay, is leaving already, or others wait for it"
        if new := {s.session for s in found.sessions} - set(away.sessions):
            return f"replica {away.replica} has {len(new)} sessions more"
        if any(session.stays for session in found.sessions):
            return f"replica {away.replica} has sessions that are not to be moved now"
        if away.to == state.node:
            return f"replica {away.replica} can't have sessions move to its own node"
    return None


class Vacates:
    """Those of one node."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        """Of a replica."""
        self._active: dict[ModelId, Vacate] = {}
        self._stays: dict[SessionId, float] = {}
        """Sessions that could not leave, and until when they are left alone."""
        self._settle_s = 0.0
        self._max_sessions = 0

    @property
    def active(self) -> tuple[ModelId, ...]:
        """Return the models that room is made for."""
        return tuple(self._active)

    def under_way(self) -> tuple[Vacate, ...]:
        """Return those that have no outcome yet."""
        return tuple(self._active.values())

    def next_timer(self) -> float | None:
        """Return when `on_timer` is to be called, if ever."""
        return min((vacate.until for vacate in self._active.values()), default=None)

    def limit(self, limits: VacateLimits) -> None:
        """Take the limits as the cluster file has them now."""
        self._settle_s, self._max_sessions = limits.settle_s, limits.max_sessions

    def begin(
        self, ask: Ask, model: ModelId, state: NodeState, limits: VacateLimits, now: float
    ) -> list[Action]:
        """Begin what `objection` has nothing against; the model waits here now."""
        assert model not in self._active
        self.limit(limits)
        there = {s.session for r in state.replicas if r.replica in ask.frees for s in r.sessions}
        sessions = {
            session: away.to for away in ask.aways for session in away.sessions if session in there
        }
        vacate = Vacate(str(ask.id), model, ask, now, now + limits.vacate_s, sessions)
        self._active[model] = vacate
        return [AskToLeave(session, to, vacate.id) for session, to in sessions.items()]

    def is_leaving(self, session: SessionId, vacate: str) -> bool:
        """Tell whether a session is still to leave for that vacate."""
        return any(v.id == vacate and session in v.sessions for v in self._active.values())

    def on_stays(self, session: SessionId, reason: str, now: float) -> list[Action]:
        """Take note that a session can't or won't leave."""
        found = next((v for v in self._active.values() if session in v.sessions), None)
        if found is None:
            return []
        return [self._fail(found, "refused", f"session {session} stays: {reason}", (session,), now)]

    def refuse(self, model: ModelId, reason: str, now: float) -> list[Action]:
        """End one that its own node can't make; nothing if it has ended."""
        vacate = self._active.get(model)
        return (
            [] if vacate is None else [self._fail(vacate, "refused", reason, vacate.sessions, now)]
        )

    def on_news(self, model: ModelId, view: ModelView, now: float) -> list[Action]:
        """Take note of how a model stands; it matters while room is made for it."""
        vacate = self._active.get(model)
        if vacate is None:
            return []
        if view.state in (ModelState.LOADING, ModelState.READY):
            return [self._end(vacate, "freed", now)]
        return [] if view.waiting else [self._end(vacate, "over", now)]

    def on_timer(self, now: float) -> list[Action]:
        """Give up what took too long."""
        late = [v for v in self._active.values() if v.until <= now]
        why = "sessions did not leave in time"
        return [self._fail(vacate, "late", why, vacate.sessions, now) for vacate in late]

    def shown(self, state: NodeState, now: float) -> NodeState:
        """Return the node's state as placements are to see it."""
        if not (self._active or self._stays):
            return state
        coming = [v for v in self._active.values() if v.model not in _models(state.replicas)]
        devices = {share.device for v in coming for share in v.ask.shares}
        leaving = sum(len(vacate.sessions) for vacate in self._active.values())
        replicas = [self._as_shown(r, devices, leaving, now) for r in state.replicas]
        replicas += [self._replica(vacate, now) for vacate in coming]
        taken = {name: sum(_taken(v.ask, name, state) for v in coming) for name in devices}
        return replace(
            state,
            replicas=tuple(replicas),
            devices=tuple(
                replace(d, bytes_free=max(0, d.bytes_free - taken.get(d.name, 0)))
                for d in state.devices
            ),
        )

    def _as_shown(
        self, replica: ReplicaState, devices: set[str], leaving: int, now: float
    ) -> ReplicaState:
        is_kept = leaving + len(replica.sessions) > self._max_sessions or any(
            share.device in devices for share in replica.shares
        )
        sessions = tuple(
            replace(one, stays=one.stays or is_kept or self._stays.get(one.session, now) > now)
            for one in replica.sessions
        )
        if any(replica.replica in vacate.ask.frees for vacate in self._active.values()):
            return replace(
                replica, sessions=sessions, next_free_s=None
            )  # it has no turn to wait for
        return replica if sessions == replica.sessions else replace(replica, sessions=sessions)

    def _replica(self, vacate: Vacate, now: float) -> ReplicaState:
        """Return the replica that is to come, for those who want it too."""
        ready_s = coming_s(vacate.ask.ready_s, now - vacate.began)
        shares, name = vacate.ask.shares, ReplicaId(vacate.model)
        return ReplicaState(name, vacate.model, shares, self._slots, ready_s=ready_s)

    def _fail(
        self, vacate: Vacate, outcome: str, why: str, stay: Iterable[SessionId], now: float
    ) -> Ended:
        vacate.reason = why
        self._stays = {name: until for name, until in self._stays.items() if until > now}
        for session in stay:
            if len(self._stays) < _REMEMBERED:
                self._stays[session] = now + self._settle_s
        return self._end(vacate, outcome, now)

    def _end(self, vacate: Vacate, outcome: str, now: float) -> Ended:
        del self._active[vacate.model]
        vacate.outcome, vacate.seconds = outcome, now - vacate.began
        return Ended(vacate)


def _models(replicas: Iterable[ReplicaState]) -> set[ModelId]:
    return {replica.model for replica in replicas}


def _taken(ask: Ask, device: str, state: NodeState) -> int:
    """Return what a vacate takes of what is free on a device: what those who leave don't bring."""
    gone = {*ask.frees, *ask.evicts}
    brought = sum(r.size_on(device) for r in state.replicas if r.replica in gone)
    asked = sum(share.size for share in ask.shares if share.device == device)
    return max(0, asked - brought)
