"""Which sessions of this node's readers move where, and why.

An operator says so; their node drains; or it is to have room for another model (`vacating`).

The node with the reader decides; whoever drains only says that it does (its state), here or at a peer.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from sllm_node.cluster.choice import Choice, choose
from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.home import HomeStream
from sllm_node.cluster.move import MoveReport
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.placing import asked_for
from sllm_node.cluster.state import ResumeFit
from sllm_node.core import log as logs
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import MoveRefusedError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import NodeId, SessionId
from sllm_node.schedule.stream import request_of, sessions_of

log = logging.getLogger(__name__)

RECENT: Final = 100
"""Moves that the status tells of."""
AGAIN_S: Final = 1.0
"""After a move that failed, the same session is left alone for so long."""
Carried = HomeStream | RoutedStream


class Movers:
    """Begins moves, and counts them."""

    def __init__(
        self, peers: Peers, metrics: Metrics, clock: Clock, sessions: Callable[[], list[Carried]]
    ) -> None:
        self._peers = peers
        self._metrics = metrics
        self._clock = clock
        self._sessions = sessions
        self._recent: deque[MoveReport] = deque(maxlen=RECENT)
        self._failed_at: dict[str, float] = {}
        self._failed_to: dict[str, set[NodeId]] = {}
        """Where moves of a session failed: of a drain the others come first."""
        self.on_failed: Callable[[SessionId, NodeId, str], None] = lambda *_: None
        """Called with session, its node and why when a move for placement's sake fails."""
        self.entry_of: Callable[[str], NodeId | None] = lambda _: None
        """Tells which peer's client has a session that is served here."""
        self._again = Alarm(clock, self.evacuate)

    def has(self, session: str) -> bool:
        """Tell whether this node serves a session of a reader of its own."""
        return any(
            one.request.session == session and self._at(one) == self._peers.me
            for one in self._sessions()
        )

    def is_on_its_way(self, session: str) -> bool:
        """Tell whether a session of this node's reader moves already."""
        found = (one for one in self._sessions() if one.request.session == session)
        return any(self._is_under_way(one) for one in found)

    def move(self, session: str, to: NodeId, reason: str, vacate: str = "") -> dict[str, str]:
        """Begin a move.

        Raises:
            MoveRefusedError: it can't be.
        """
        found = self._found(session)
        session = found.request.session
        if to != self._peers.me and to not in self._peers.view.nodes:
            raise MoveRefusedError(
                session, f"node {to!r} is not in the cluster or can't be reached"
            )
        if to == self._at(found):
            raise MoveRefusedError(session, f"it is at node {to!r} already")
        self._peers.refresh()
        choice = self._choose(found, frozenset(self._peers.view.nodes) - {to})
        if choice is None or (vacate and choice.startup_s is None):
            raise MoveRefusedError(
                session, f"node {to!r} can't take it: not the model (or other weights), or no room"
            )
        return {
            "session": session,
            "to": to,
            "migration": self._begin(found, choice, reason, vacate),
        }

    def _found(self, name: str) -> Carried:
        """Return a session by its id, or by its request's, or by what its client called that."""
        sessions = self._sessions()
        found = [s for s in sessions if s.request.session == name] or sessions_of(sessions, name)
        if len(found) > 1:
            ids = ", ".join(sorted(one.request.session for one in found))
            raise MoveRefusedError(name, f"it is not one session but several: {ids}")
        if found:
            return found[0]
        entry = self.entry_of(name)
        asked = "the node that its client is connected to" if entry is None else f"node {entry!r}"
        raise MoveRefusedError(name, f"no client of this node has it; ask {asked}")

    def evacuate(self) -> None:
        """Begin to move sessions away from the nodes that drain, as far as there are others."""
        nodes = self._peers.view.nodes
        draining = {name for name, node in nodes.items() if node.state.is_draining}
        sessions = self._sessions() if draining else []
        known = {one.request.session for one in sessions}
        self._failed_to = {name: to for name, to in self._failed_to.items() if name in known}
        if (
            sessions and not self._again.is_set
        ):  # also for those that move: it may fail, or end there
            self._again.set(self._clock.now() + AGAIN_S)
        for session in sessions:
            at, name = self._at(session), session.request.session
            too_soon = self._clock.now() - self._failed_at.get(name, float("-inf")) < AGAIN_S
            if at not in draining or too_soon or self._is_moving(session):
                continue
            choice = self._choose_away(session, frozenset(draining))
            if choice is None:
                continue
            try:
                self._begin(session, choice, "drain")
            except SllmError as error:
                log.info("session not moved", extra={"session": name, "error": str(error)})

    def _choose_away(self, session: Carried, draining: frozenset[NodeId]) -> Choice | None:
        """Return where a session goes from a node that drains: where it was refused only if nowhere else."""
        refused = self._failed_to.get(session.request.session, set())
        choice = self._choose(session, draining | refused)
        if choice is None and refused:
            refused.clear()
            choice = self._choose(session, draining)
        return choice

    def close(self) -> None:
        """Begin no more moves."""
        self._again.set(None)

    def told(self, report: MoveReport) -> None:
        """Take note of how a move ended."""
        metrics = self._metrics
        metrics.migrations.labels(report.outcome, report.reason).inc()
        if report.outcome == "moved":
            metrics.migration_rounds.observe(report.rounds + 1)
            metrics.migration_round_tokens.observe(report.last)
            metrics.migration_bytes.inc(report.bytes_sent)
            if report.gap_s is not None:
                metrics.migration_gap_seconds.observe(report.gap_s)
            self._failed_at.pop(report.session, None)
        elif report.outcome == "failed":
            now = self._clock.now()
            recent = {name: at for name, at in self._failed_at.items() if now - at < AGAIN_S}
            self._failed_at = {**recent, report.session: now}
            self._failed_to.setdefault(report.session, set()).add(report.to)
            if report.vacate:
                self.on_failed(report.session, report.origin, report.error)
        else:
            self._failed_at.pop(report.session, None)
        gap_s = None if report.gap_s is None else round(report.gap_s, 4)
        fields = {**report.fields(), "outcome": report.outcome, "gap_s": gap_s}
        if report.error:
            fields["error"] = report.error
        log.info("session move ended", extra=fields)

    def recent(self) -> list[dict[str, Any]]:
        """Return the last moves, the newest first."""
        return [asdict(report) for report in reversed(self._recent)]

    def _begin(self, session: Carried, choice: Choice, reason: str, vacate: str = "") -> str:
        """Begin a move, logged under the session's request whoever wants it."""
        with logs.of_request(request_of(session.request.session)):
            return self._begin_logged(session, choice, reason, vacate)

    def _begin_logged(self, session: Carried, choice: Choice, reason: str, vacate: str) -> str:
        fit = self._fit(session, choice.node)
        if isinstance(session, HomeStream) and session.routed is None:
            if session.is_moving:
                raise MoveRefusedError(session.request.session, "it is moving already")
            number = f"{session.request.session}.2"
            report = MoveReport(
                number, session.request.session, self._peers.me, choice.node, reason, vacate=vacate
            )
            session.when_routed(lambda routed: self._start(routed, choice, fit, report))
            return number
        routed = session.routed if isinstance(session, HomeStream) else session
        assert routed is not None
        report = routed.move(choice, reason, fit, vacate)
        self._recent.append(report)
        return report.id

    def _start(
        self, routed: RoutedStream | None, choice: Choice, fit: ResumeFit | None, wished: MoveReport
    ) -> None:
        """Begin a move that was asked for before a routed stream was there; None: it has ended."""
        try:
            if routed is None:
                raise MoveRefusedError(wished.session, "it has ended")
            self._recent.append(routed.move(choice, wished.reason, fit, wished.vacate))
        except SllmError as error:
            wished.outcome, wished.error = "ended" if routed is None else "failed", str(error)
            self._recent.append(wished)
            self.told(wished)

    def _choose(self, session: Carried, excluded: frozenset[NodeId]) -> Choice | None:
        view = self._peers.view
        asked = asked_for(view, session.as_it_stands())
        return choose(view, asked, self._peers.me, self._clock.now(), excluded)

    def _at(self, session: Carried) -> NodeId:
        if isinstance(session, HomeStream):
            return self._peers.me if session.routed is None else session.routed.node
        return session.node

    def _is_moving(self, session: Carried) -> bool:
        if isinstance(session, HomeStream):
            return session.is_moving
        return not session.can_move

    def _is_under_way(self, session: Carried) -> bool:
        """Tell whether a move of it is asked for, or has begun."""
        if isinstance(session, HomeStream):
            routed = session.routed
            return session.is_moving or (routed is not None and routed.migration is not None)
        return session.migration is not None

    def _fit(self, session: Carried, node: NodeId) -> ResumeFit | None:
        found = self._peers.view.nodes.get(node)
        held = None if found is None else found.held.get(session.request.model)
        return None if held is None else held.resume
