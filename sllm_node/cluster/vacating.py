"""Carries out moves for placement's sake, at both ends: the node that is to get room, and the entries.

`Vacates` decides at the node where a model waits for room. Its wishes go to the entries on the connections
that bring them the sessions' tokens anyway (`wire.Leave`), and to this node's own `Movers` for readers
that are here. An entry that does not move a session, or fails to, says so by a request (`wire.Stays`).
"""

import asyncio
import logging
from collections import deque
from typing import Any, Final

from sllm_node.cluster.movers import Movers
from sllm_node.cluster.packing import pack
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.reservations import Ask
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.transport import Client, Handler, Reply
from sllm_node.cluster.vacate import (
    Action,
    AskToLeave,
    Vacate,
    VacateLimits,
    Vacates,
    joined,
    objection,
)
from sllm_node.cluster.wire import Leave, Stays, unpack_stays
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import GivenBackError, MoveRefusedError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, ModelState, NodeId, SessionId
from sllm_node.schedule.driver import Service
from sllm_node.schedule.stream import Stream

log = logging.getLogger(__name__)

STAYS: Final = "stays"
RECENT: Final = 100
"""Vacates that the status tells of."""
_OFF: Final = "the cluster file has placement.moves = false"


class Vacating:
    """Those of one node, and its part in those of others."""

    def __init__(
        self, service: Service[Any], peers: Peers, movers: Movers, client: Client, clock: Clock,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._service = service
        self._peers = peers
        self._movers = movers
        self._client = client
        self._clock = clock
        self._metrics = metrics
        self._vacates = Vacates(service.outlook.slots)
        self._wishes: dict[SessionId, Leave] = {}
        """For sessions of peers' readers, to be told with their next token."""
        self._recent: deque[Vacate] = deque(maxlen=RECENT)
        self._alarm = Alarm(clock, self._on_timer)
        self._telling: set[asyncio.Task[None]] = set()
        movers.on_failed = self._on_failed
        peers.show_as(self._shown)

    # --- for placements -----------------------------------------------------------------------

    @property
    def gain_s(self) -> float | None:
        """How much sooner a start with moves has to be; None: none is made."""
        return self._peers.cluster.placement.least_gain_s

    def objection(self, ask: Ask, state: NodeState) -> str | None:
        """Return why the sessions that an ask names can't leave, if so."""
        if ask.aways and self.gain_s is None:
            return _OFF
        return objection(ask, state)

    def open(self, request: GenerationRequest, keep_alive_s: float | None, ask: Ask) -> Stream:
        """Begin a session of this node's own reader, and make the room that it is to have.

        It is checked against the state as it is now, as `Serving` does for peers: the choice may be older.

        Raises:
            GivenBackError: the sessions that the ask names can't leave any more.
            SllmError: it is refused at once, with the reason.
        """
        state = self._peers.refresh()
        ask = joined(ask, request.model, state)
        if (why := self.objection(ask, state)) is not None:
            raise GivenBackError(request.model, why)
        stream = self._service.open(request, keep_alive_s=keep_alive_s)
        try:
            self.begin(ask, stream)
        except BaseException:
            stream.cancel()
            raise
        return stream

    def begin(self, ask: Ask, stream: Stream) -> None:
        """Make the room for a session that waits here; `objection` had nothing against it in this turn.

        Nothing is made if there is room since: the model loads already, or is there.
        """
        model, now = stream.request.model, self._clock.now()
        if not ask.aways or model in self._vacates.active:
            return
        if self._service.outlook.view(model).state is not ModelState.QUEUED:
            return
        state = self._peers.refresh()
        names = set(ask.frees)
        models = {r.model for r in state.replicas if r.replica in names}
        actions = self._vacates.begin(ask, model, state, self._limits, now)
        log.info("sessions asked to leave", extra={
            "vacate": str(ask.id), "model": model, "replicas": sorted(names),
            "sessions": len(actions),
        })  # fmt: skip
        if self._service.promise(model, models):
            self._do(actions)
        else:
            why = f"{', '.join(sorted(names))} can't make room for it: pinned, or of a higher priority"
            self._do(self._vacates.refuse(model, why, now))
        self.look()

    def look(self) -> None:
        """See what has become of the models that wait for room; called at each change."""
        for model in self._vacates.active:
            view = self._service.outlook.view(model)
            if model in self._vacates.active:
                self._do(self._vacates.on_news(model, view, self._clock.now()))

    def under_way(self) -> frozenset[ModelId]:
        """Return the models that room is made for."""
        return frozenset(self._vacates.active)

    def recent(self) -> list[dict[str, Any]]:
        """Return the vacates under way, then the last ones, the newest first."""
        shown = (*self._vacates.under_way(), *reversed(self._recent))
        return [vacate.fields() for vacate in shown]

    # --- for those who pass sessions on -------------------------------------------------------

    def wish_for(self, session: SessionId) -> Leave | None:
        """Return what a session's entry is to be told next, once."""
        return self._wishes.pop(session, None) if self._wishes else None

    async def stays(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Take an entry's word that a session does not leave."""
        told = unpack_stays(payload)
        await reply.send(b"")
        self._on_stays(SessionId(told.session), f"{sender}: {told.reason}")

    def handlers(self) -> dict[str, Handler]:
        """Return what answers entries."""
        return {STAYS: self.stays}

    # --- for entries --------------------------------------------------------------------------

    def asked(self, session: SessionId, node: NodeId, wish: Leave) -> None:
        """Move a session of this node's reader, as the node that serves it asks; or say that it stays."""
        try:
            if self.gain_s is None:
                raise MoveRefusedError(session, _OFF)
            if not self._movers.is_on_its_way(session):
                self._movers.move(session, NodeId(wish.to), "placement", wish.vacate)
        except SllmError as error:
            log.info("session stays", extra={
                "session": session, "vacate": wish.vacate, "error": str(error),
            })  # fmt: skip
            self._tell(node, session, str(error))

    def _on_failed(self, session: SessionId, node: NodeId, reason: str) -> None:
        """Take note that a move for placement's sake failed."""
        self._tell(node, session, reason)

    def _tell(self, node: NodeId, session: SessionId, reason: str) -> None:
        if node == self._peers.me:
            self._on_stays(session, reason)
            return
        task = asyncio.create_task(self._ask(node, Stays(session, reason)), name=f"stays {session}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _ask(self, node: NodeId, stays: Stays) -> None:
        try:
            await self._client.ask(node, STAYS, pack(stays), self._peers.cluster.timing.dead_s)
        except SllmError as error:  # it will find out by its limit of time
            log.info("peer not told", extra={"peer": node, "error": str(error)})

    # --- carrying out -------------------------------------------------------------------------

    @property
    def _limits(self) -> VacateLimits:
        config = self._peers.cluster.placement
        return VacateLimits(config.vacate_s, config.settle_s, config.max_sessions)

    def _shown(self, state: NodeState, now: float) -> NodeState:
        self._vacates.limit(self._limits)
        return self._vacates.shown(state, now)

    def _on_stays(self, session: SessionId, reason: str) -> None:
        state = self._peers.refresh()
        if any(one.session == session for r in state.replicas for one in r.sessions):
            self._do(self._vacates.on_stays(session, reason, self._clock.now()))

    def _on_timer(self) -> None:
        self._do(self._vacates.on_timer(self._clock.now()))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, AskToLeave):
                self._ask_to_leave(action)
            else:
                self._ended(action.vacate)
        self._alarm.set(self._vacates.next_timer())

    def _ask_to_leave(self, action: AskToLeave) -> None:
        session, wish = action.session, Leave(action.to, action.vacate)
        if not self._vacates.is_leaving(session, action.vacate):
            return  # the one before it has failed, and with it all
        if self._movers.has(session):
            self.asked(session, self._peers.me, wish)
        else:
            self._wishes[session] = wish

    def _ended(self, vacate: Vacate) -> None:
        for session in vacate.sessions:
            self._wishes.pop(session, None)
        self._recent.append(vacate)
        self._metrics.vacates.labels(vacate.outcome).inc()
        if vacate.outcome == "freed":
            self._metrics.vacate_seconds.observe(vacate.seconds)
        log.info("sessions have left" if vacate.outcome == "freed" else "vacate given up",
                 extra=vacate.fields())  # fmt: skip
        if vacate.outcome in ("refused", "late"):
            self._service.promise(vacate.model, frozenset())
            # Whoever else waits was sent here for the same room, or may find a better place by now.
            self._service.give_back_all(vacate.model, GivenBackError(vacate.model, vacate.reason))

    async def close(self) -> None:
        """Wait for nothing any more."""
        self._alarm.set(None)
        for task in list(self._telling):
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
