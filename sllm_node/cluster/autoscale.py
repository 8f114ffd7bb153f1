"""How many replicas a model has, and where the next one starts: one pure decision for each model.

Theory of operation. Every node has an autoscaler and tells it the same: who is alive, what is desired,
and the demand for each model as it sees it. Only the model's *home* acts, the node that wins the
rendezvous hash among those alive: so there is no leader to elect, the work is spread, and when a home
dies each of its models goes to another. A new home first waits `settle_s`: by then whatever the old one
began shows in the states of nodes. Where a cluster is cut in two each half has a home; once it heals,
what is above the maximum is retired.

Wanted are as many replicas as running and waiting sessions fill to `fill`; never fewer than the minimum nor more than the maximum. More are started at once, each where
startup is shortest. Fewer only when, for the keep-alive, no more than that were needed even with
`margin` on top: the most that was needed in that time stays. A replica that is retired takes no new
sessions, ends those it has, and leaves. Those of a node that drains are as good as gone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from sllm_node.cluster.records import Desired
from sllm_node.cluster.state import ReplicaId
from sllm_node.core.types import ModelId, NodeId

_NEVER: Final = -math.inf


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How eager an autoscaler is; the same on all nodes."""

    fill: float = 0.8
    """Of a replica's places: the share that is to be taken."""
    margin: float = 0.25
    """By which demand may grow before a replica that leaves would be missed."""
    settle_s: float = 15.0
    """For which a new home watches: above the time in which states get about."""
    pending_s: float = 60.0
    """After which a start that never showed is given up."""
    retry_s: float = 30.0
    """For which a node that refused is left alone."""
    starts_at_once: int = 4
    """Of one model."""

    def __post_init__(self) -> None:
        assert 0 < self.fill <= 1
        assert self.margin >= 0
        assert self.starts_at_once >= 1
        assert 0 <= self.settle_s < self.pending_s


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """A replica of the model, somewhere."""

    replica: ReplicaId
    node: NodeId
    sessions: int = 0
    is_ready: bool = True
    is_leaving: bool = False
    """It takes no new sessions."""
    is_draining: bool = False
    """Its node drains: it leaves by itself if at all, and the maximum is that of the other nodes."""
    is_pinned: bool = False
    idle_s: float = 0.0

    @property
    def key(self) -> tuple[NodeId, ReplicaId]:
        """Return its name in the cluster."""
        return self.node, self.replica


@dataclass(frozen=True, slots=True)
class Start:
    """A node that could start a replica, and the startup-time estimate."""

    node: NodeId
    startup_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's sessions and replicas in the whole cluster."""

    model: ModelId
    slots: int
    """Sessions that one replica takes at once."""
    waiting: int = 0
    replicas: tuple[ReplicaSeen, ...] = ()
    starts: tuple[Start, ...] = ()

    def sessions(self) -> int:
        """Return the sessions that run or wait."""
        return sum(replica.sessions for replica in self.replicas) + self.waiting


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Load the model there; a refusal goes to `on_refused`."""

    model: ModelId
    node: NodeId
    startup_s: float


@dataclass(frozen=True, slots=True)
class RetireReplica:
    """Give it no new sessions, and let it leave when those it has have ended."""

    model: ModelId
    node: NodeId
    replica: ReplicaId


Action = StartReplica | RetireReplica


@dataclass(frozen=True, slots=True)
class Scaling:
    """One model's desired and actual replicas, for the status."""

    model: ModelId
    home: NodeId | None
    minimum: int
    maximum: int
    wanted: int
    ready: int
    starting: int
    leaving: int
    reason: str


@dataclass(slots=True)
class _Pending:
    """A start that was asked for and does not show yet."""

    node: NodeId
    since: float
    known: frozenset[ReplicaId]
    """Replicas that the node had of the model before."""


@dataclass(slots=True)
class _Model:
    desired: Desired
    home: NodeId | None = None
    home_since: float = _NEVER
    seen_at: float = math.inf
    pending: list[_Pending] = field(default_factory=list)
    retired: dict[tuple[NodeId, ReplicaId], float] = field(default_factory=dict)
    """Replicas that were told to leave, and when."""
    refused: dict[NodeId, float] = field(default_factory=dict)
    """Nodes to leave alone, and until when."""
    surplus_since: float | None = None
    peak: int = 0
    """The most replicas that were needed since then."""
    status: Scaling | None = None


class Autoscaler:
    """The autoscaler of one node, for those models whose home the node is."""

    def __init__(self, me: NodeId, options: ScaleOptions) -> None:
        self._me = me
        self._options = options
        self._alive: frozenset[NodeId] = frozenset()
        self._models: dict[ModelId, _Model] = {}

    # --- events -----------------------------------------------------------------------------------

    def on_alive(self, nodes: Iterable[NodeId], now: float, *, is_draining: bool = False) -> None:
        """Take who is alive, this node among them unless it drains; before the first time no model has a home."""
        self._alive = frozenset(nodes if is_draining else (self._me, *nodes))
        for model in self._models:
            self._find_home(model, now)

    def on_desired(self, desired: Iterable[Desired], now: float) -> None:
        """Take the replicas that are desired; models not among them are left alone."""
        wishes = {wish.model: wish for wish in desired}
        for model in self._models.keys() - wishes.keys():
            del self._models[model]
        for model, wish in wishes.items():
            if model in self._models:
                self._models[model].desired = wish
            else:
                self._models[model] = _Model(wish)
                self._find_home(model, now)

    def on_demand(self, demand: Demand, now: float) -> tuple[Action, ...]:
        """Take a model's demand as it is now, to be told every second or so; return what to do."""
        state = self._models.get(demand.model)
        if state is None:
            return ()
        if now - state.seen_at > self._options.settle_s:
            state.home_since = now  # this node slept: another was home meanwhile
        state.seen_at = now
        self._reconcile(state, demand, now)
        count = _count(state, demand)
        is_mine = state.home == self._me
        is_settled = now - state.home_since >= self._options.settle_s
        actions: tuple[Action, ...] = ()
        if is_mine and is_settled:
            starts = self._start(state, demand, count, now)
            actions = (*starts, *self._retire(state, demand, _count(state, demand), now))
        else:
            state.surplus_since = None
        state.status = self._describe(state, demand, is_settled=is_settled)
        return actions

    def on_refused(self, model: ModelId, node: NodeId, now: float) -> None:
        """Take that a node did not start a replica that it was asked for."""
        state = self._models.get(model)
        if state is None:
            return
        state.refused[node] = now + self._options.retry_s
        found = next((pending for pending in state.pending if pending.node == node), None)
        if found is not None:
            state.pending.remove(found)

    # --- what can be asked ------------------------------------------------------------------------

    def status(self) -> tuple[Scaling, ...]:
        """Return every model that is scaled and whose demand is known, by name."""
        found = (self._models[model].status for model in sorted(self._models))
        return tuple(status for status in found if status is not None)

    # --- inside -----------------------------------------------------------------------------------

    def _find_home(self, model: ModelId, now: float) -> None:
        state = self._models[model]
        home = home_of(model, self._alive)
        if home == state.home:
            return
        state.home, state.home_since = home, now
        state.pending.clear()
        state.retired.clear()
        state.refused.clear()
        state.surplus_since = None

    def _reconcile(self, state: _Model, demand: Demand, now: float) -> None:
        """Forget what was begun and shows by now, or never will."""
        there = {replica.key for replica in demand.replicas if not replica.is_leaving}
        state.retired = {
            key: since
            for key, since in state.retired.items()
            if key in there and now - since < self._options.pending_s
        }
        state.refused = {node: until for node, until in state.refused.items() if until > now}
        used: set[tuple[NodeId, ReplicaId]] = set()
        waiting = []
        for pending in state.pending:
            shown = next((r.key for r in demand.replicas if _shows(r, pending, used)), None)
            if shown is not None:
                used.add(shown)
            elif pending.node in self._alive and now - pending.since < self._options.pending_s:
                waiting.append(pending)
        state.pending = waiting

    def _start(
        self, state: _Model, demand: Demand, count: "_Count", now: float
    ) -> tuple[StartReplica, ...]:
        wanted = self._within(state.desired, self._needed(demand))
        room = min(
            wanted - count.serving,
            state.desired.maximum - count.total,
            self._options.starts_at_once - len(state.pending),
        )
        busy = {pending.node for pending in state.pending} | state.refused.keys()
        found = sorted(demand.starts, key=lambda start: (start.startup_s, start.node))
        chosen: dict[NodeId, Start] = {}
        for start in found:
            if len(chosen) >= room:
                break
            if start.node in self._alive and start.node not in busy:
                chosen.setdefault(start.node, start)
        for node in chosen:
            known = frozenset(r.replica for r in demand.replicas if r.node == node)
            state.pending.append(_Pending(node, now, known))
        return tuple(StartReplica(demand.model, s.node, s.startup_s) for s in chosen.values())

    def _retire(
        self, state: _Model, demand: Demand, count: "_Count", now: float
    ) -> tuple[RetireReplica, ...]:
        """Choose those that leave: none before the keep-alive has ended, unless above the maximum."""
        surplus = max(
            count.serving - state.desired.maximum, self._surplus(state, demand, count, now)
        )
        live = [r for r in demand.replicas if not r.is_leaving and r.key not in state.retired]
        free = sorted((r for r in live if not r.is_pinned), key=_least_missed)
        chosen = free[: max(0, min(surplus, len(live) - state.desired.minimum))]
        for replica in chosen:
            state.retired[replica.key] = now
        return tuple(RetireReplica(demand.model, r.node, r.replica) for r in chosen)

    def _surplus(self, state: _Model, demand: Demand, count: "_Count", now: float) -> int:
        """Return how many replicas were needed at no time of the keep-alive."""
        needed = self._within(state.desired, self._needed(demand, 1.0 + self._options.margin))
        if count.serving <= needed or state.pending:
            state.surplus_since = None
            return 0
        if state.surplus_since is None:
            state.surplus_since, state.peak = now, needed
        state.peak = max(state.peak, needed)
        if now - state.surplus_since < state.desired.keep_alive_s:
            return 0
        surplus = count.serving - state.peak
        state.surplus_since, state.peak = now, needed
        return surplus

    def _needed(self, demand: Demand, factor: float = 1.0) -> int:
        return math.ceil(factor * demand.sessions() / (max(1, demand.slots) * self._options.fill))

    @staticmethod
    def _within(desired: Desired, needed: int) -> int:
        return min(desired.maximum, max(desired.minimum, needed))

    def _describe(self, state: _Model, demand: Demand, *, is_settled: bool) -> Scaling:
        count = _count(state, demand)
        wanted = self._within(state.desired, self._needed(demand))
        ready = sum(
            r.is_ready and not r.is_leaving and r.key not in state.retired for r in demand.replicas
        )
        reason = f"{demand.sessions():.1f} sessions, {demand.slots} places a replica"
        if state.home is None:
            reason = "no node is its home: none is known that does not drain"
        elif not is_settled:
            reason = f"{state.home} has just become its home, and watches"
        elif count.serving < wanted and state.home == self._me and not state.pending:
            reason += "; no node can start another replica now"
        elif state.surplus_since is not None:
            reason += f"; {count.serving} replicas until demand has been less for the keep-alive"
        return Scaling(
            demand.model, state.home, state.desired.minimum, state.desired.maximum, wanted, ready,
            count.serving - ready, count.leaving, reason,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Count:
    serving: int
    """Replicas that serve, will, or were asked for; not those that leave."""
    total: int
    """Replicas that count for the maximum."""
    leaving: int


def _count(state: _Model, demand: Demand) -> _Count:
    leaving = sum(r.is_leaving or r.key in state.retired for r in demand.replicas)
    every = len(demand.replicas) + len(state.pending)
    return _Count(every - leaving, every - sum(r.is_draining for r in demand.replicas), leaving)


def _shows(replica: ReplicaSeen, pending: _Pending, used: set[tuple[NodeId, ReplicaId]]) -> bool:
    is_new = replica.replica not in pending.known and replica.key not in used
    return replica.node == pending.node and is_new


def _least_missed(replica: ReplicaSeen) -> tuple[bool, bool, int, float, NodeId, ReplicaId]:
    """Order replicas by who misses them: loads first, then the idlest, then those with few sessions."""
    return (
        replica.sessions > 0, replica.is_ready, replica.sessions, -replica.idle_s,
        replica.node, replica.replica,
    )  # fmt: skip


def home_of(model: ModelId, alive: Iterable[NodeId]) -> NodeId | None:
    """Return the node that decides about a model: all who agree on who is alive agree on it."""
    return max(alive, key=lambda node: (_weight(model, node), node), default=None)


def _weight(model: ModelId, node: NodeId) -> bytes:
    return blake2b(f"{node}\0{model}".encode(), digest_size=8).digest()
