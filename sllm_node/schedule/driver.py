"""What the server talks to: carries the scheduler's actions out, and tells it what happened.

`Service` is the asyncio shell around `Scheduler`: it holds the streams of the sessions, starts loads
and evictions through `Replicas`, and keeps one timer. Everything runs on the event loop, so actions
are carried out in the order in which they were decided; what happens meanwhile (a session that the
engine refuses when it is granted) only adds actions behind them.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import Generic

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.config import Config
from sllm_node.core.errors import (
    DrainingError,
    EngineError,
    MoveRefusedError,
    OtherWeightsError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    ModelState,
    ModelStatus,
    SessionId,
    SessionStatus,
    Tier,
)
from sllm_node.schedule.actions import (
    AbortLoad,
    Action,
    Evict,
    GiveWay,
    Grant,
    Refuse,
    StartLoad,
    Stop,
    TicketId,
)
from sllm_node.schedule.asked import AskedLoads
from sllm_node.schedule.draining import Drain
from sllm_node.schedule.early import EarlySessions
from sllm_node.schedule.estimate import LoadEstimator
from sllm_node.schedule.hints import LONG_CHARACTERS, Hints
from sllm_node.schedule.models import Models
from sllm_node.schedule.outlook import Outlook, Sources
from sllm_node.schedule.ports import CodecT, Engines, Pins, Replica, WeightStore
from sllm_node.schedule.replicas import Replicas
from sllm_node.schedule.scheduler import Scheduler
from sllm_node.schedule.sessions import Sessions
from sllm_node.schedule.stream import Outcome, Stream
from sllm_node.schedule.telemetry import Telemetry
from sllm_node.schedule.tickets import Tickets

log = logging.getLogger(__name__)


class Service(Generic[CodecT]):
    """The models of this node, as the server sees them. Make it inside a running event loop."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        store: WeightStore,
        engines: Engines[CodecT],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._capacities = store.capacities()
        self._catalog = catalog
        self._store = store
        self._engines = engines
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._replicas = Replicas(
            catalog, store, engines, clock, overlap=config.engine.overlap_load
        )
        self._estimator = LoadEstimator()
        self._scheduler = Scheduler(
            config.schedule,
            config.models,
            capacities=self._capacities,
            max_sessions=config.engine.max_sessions,
            drain_s=config.node.drain_s,
        )
        self._sessions = Sessions()
        self._early = EarlySessions(config.engine.max_sessions)
        self._departures: dict[ModelId, asyncio.Future[None]] = {}
        self._evicting: dict[ModelId, float] = {}
        """When evictions under way began."""
        self._actions: deque[Action] = deque()
        self._is_acting = False
        self._alarm = Alarm(clock, self._on_timer)
        self._telemetry = Telemetry(metrics, self._scheduler.roster.view, self._kv_usage)
        self._drain = Drain(
            config.node.drain_s, self._scheduler, self._sessions, self._telemetry, clock, self._do
        )
        self._models = Models(
            catalog,
            store,
            engines,
            self._replicas,
            self._scheduler.roster,
            clock,
            replaced=self._replaced,
        )
        self._tickets = Tickets(store, engines, self._estimator, self._telemetry.watch)
        self._asked = AskedLoads(self._scheduler, self._tickets, clock, self._do)
        self._hints = Hints(
            self._scheduler, clock, metrics, self._ask_ahead, self._asked.drop_ahead
        )
        self.on_change: Callable[[], None] = lambda: None
        """Called when something may have changed that other nodes place requests by."""
        self.on_session_end: Callable[[Stream], None] = lambda _: None
        """Called with each session that ended here."""
        self.pins: Pins | None = None
        """Where pins outlive this process, if anywhere."""
        self.outlook = Outlook(
            Sources(catalog, store, engines),
            self._scheduler,
            self._sessions,
            self._estimator,
            config,
        )

    # --- sessions -----------------------------------------------------------------------------

    def expect(self, model: str, characters: int) -> None:
        """Take note of a request whose text becomes tokens now: its model's load may begin meanwhile."""
        if self.is_slow_to_read(ModelId(model), characters):
            self.hint(ModelId(model))

    def is_slow_to_read(self, model: ModelId, characters: int) -> bool:
        """Tell whether a load gains from beginning before so long a prompt is tokens."""
        return characters >= LONG_CHARACTERS or not self._replicas.codecs.has(model)

    def hint(self, model: ModelId) -> bool:
        """Begin a load for a session to come, if it can begin at once; tell whether it is on its way."""
        return self._hints.take(model)

    async def begun(self) -> None:
        """Let loads begin that are about to: for who has other things to do for a session that waits."""
        await self._replicas.beginnings.over()

    async def prepare(self, model: str) -> CodecT:
        """Return the codec of `model`.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            SllmError: it can't be used.
        """
        return await self._replicas.codecs.get(self._models.servable(ModelId(model)))

    def context_limit(self, model: str) -> int:
        """Return how many tokens, prompt and output, one session can have here.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        return self._engines.context_limit(self._models.servable(ModelId(model)))

    @property
    def session_limit(self) -> int:
        """How many sessions of a model are taken at once if nobody else has any."""
        return self._config.schedule.max_queue + self._config.engine.max_sessions

    def check_room(self, model: str, sessions: int) -> None:
        """Refuse a request for so many sessions of `model` before the first is opened, if they don't fit all.

        Raises:
            NodeFullError: the queue can't take them now.
        """
        ticket = self._tickets.make(self._models.servable(ModelId(model)))
        if (error := self._scheduler.crowding(ticket, sessions, self._clock.now())) is not None:
            self._telemetry.refused(ticket.model, sessions)
            raise error

    def open(self, request: GenerationRequest, *, keep_alive_s: float | None = None) -> Stream:
        """Take a request: its session runs at once or when its turn comes.

        Raises:
            SllmError: it is refused at once, with the reason.
        """
        checkpoint = self._models.servable(request.model)
        self._engines.check_request(request, checkpoint)
        _check_weights(request, checkpoint)
        ticket = self._tickets.make(
            checkpoint, priority=request.priority, keep_alive_s=keep_alive_s
        )
        ticket = replace(ticket, waited_s=request.waited_s)
        stream = Stream(
            ticket.number,
            request,
            self._clock,
            partial(self._models.status_or_none, checkpoint),
            self._stream_ended,
        )
        self._sessions.add(stream)
        self._do(self._scheduler.on_request(ticket, self._clock.now()))
        self._hints.followed(request.model)
        if stream.error is not None:
            raise stream.error
        if not stream.is_granted:
            self._early.begin(stream)
        return stream

    def sessions(self) -> list[SessionStatus]:
        """Return who waits and who runs, in order of arrival."""
        return self._sessions.statuses()

    def cancel_request(self, request_id: str) -> int:
        """End the sessions of a request, by its id or its client's own; return how many there were."""
        return self._sessions.stop_request(request_id)

    def move(self, session: str, to: str) -> dict[str, str]:
        """Refuse: a node in no cluster has nowhere to move a session to."""
        raise MoveRefusedError(session, f"this node is in no cluster, so node {to!r} is unknown")

    def running_on(self, device: str) -> int:
        """Return how many sessions run on `device` now."""
        return self._scheduler.roster.running_on(device)

    # --- models -------------------------------------------------------------------------------

    def models(self) -> list[ModelStatus]:
        """Return all models whose checkpoints lie in the store folder now."""
        return self._models.all()

    def status(self, model: str) -> ModelStatus:
        """Return how `model` stands.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        return self._models.status_of(self._models.checkpoint(ModelId(model)))

    def preload(self, pinned: Iterable[ModelId] = ()) -> None:
        """Ask for the models that the config wants on the device from the start, and those pinned before."""
        for model in (pins := set(pinned)):
            self._do(self._scheduler.on_pin(model, self._clock.now()))
        for name in {name for name, c in self._config.models.items() if c.preload} | pins:
            try:
                self._want(ModelId(name)).add_done_callback(_log_preload(name))
            except SllmError as error:
                log.warning("preload failed", extra={"model": name, "error": str(error)})

    async def load(self, model: str) -> None:
        """Bring `model` to the device; returns when it can serve.

        A caller that is cancelled doesn't stop the load.

        Raises:
            SllmError: it is refused, or the load fails.
        """
        await asyncio.shield(self._want(ModelId(model)))

    async def unload(self, model: str, *, force: bool = False) -> None:
        """Take `model` off the device; returns when its memory is free.

        Raises:
            ModelBusyError: it is pinned, or in use and not forced.
            ModelNotFoundError: there is no such model.
        """
        name = ModelId(model)
        if self._scheduler.roster.view(name).state is ModelState.IDLE:
            self._models.checkpoint(name)
        self._do(self._scheduler.on_unload_request(name, self._clock.now(), force=force))
        if self._scheduler.roster.view(name).state is ModelState.EVICTING:
            departure = self._departures.setdefault(name, self._loop.create_future())
            await asyncio.shield(departure)
        if self._scheduler.roster.view(name).state is ModelState.IDLE:
            self._store.evict(name, Tier.DEVICE, "operator")  # what it left as a cache, too

    async def pin(self, model: str) -> None:
        """Keep `model` on the device from when it is there, and after a restart.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            SllmError: it can't be kept for after a restart.
        """
        name = self._models.checkpoint(ModelId(model)).model
        if self.pins is not None:
            await self.pins.keep(name)
        self._do(self._scheduler.on_pin(name, self._clock.now()))

    async def unpin(self, model: str) -> None:
        """Let `model` be evicted again."""
        name = ModelId(model)
        if not self._scheduler.roster.view(name).pinned:
            self._models.checkpoint(name)
        if self.pins is not None:
            await self.pins.drop(name)
        self._do(self._scheduler.on_unpin(name, self._clock.now()))

    # --- the cluster --------------------------------------------------------------------------

    def scaled(self, models: AbstractSet[ModelId]) -> None:
        """Take which models leave when the cluster says so, and not when they have been idle."""
        self._do(self._scheduler.on_scaled(models, self._clock.now()))

    def retire(self, model: ModelId) -> None:
        """Take no new sessions of `model`; it leaves the device when those that run have ended.

        Raises:
            ModelBusyError: it is pinned.
        """
        self._do(self._scheduler.on_retire(model, self._clock.now()))

    def promise(self, model: ModelId, others: AbstractSet[ModelId]) -> bool:
        """Let `model`, which waits, have the room of `others`, whose sessions move to other nodes.

        With no `others` that is taken back. False: it can't be.
        """
        actions = self._scheduler.on_promise(model, others, self._clock.now())
        self._do(actions or [])
        return actions is not None

    def give_back(self, session: SessionId, error: SllmError) -> bool:
        """End a session that waits, for its entry to place it anew; tell whether it still did."""
        return self._sessions.give_back(session, error)

    def give_back_all(self, model: ModelId, error: SllmError) -> None:
        """End all sessions that wait for a model that has no room, for their entries to place them anew."""
        if self._scheduler.roster.view(model).state is ModelState.QUEUED:
            self._sessions.give_back_all(model, error)

    # --- the node -----------------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the node stops."""
        return self._scheduler.is_draining

    def drain_refusal(self) -> DrainingError:
        """Return what a request is told while this node drains."""
        return self._drain.error()

    def failures(self) -> list[dict[str, object]]:
        """Return the models whose last load failed, why, and how long ago."""
        return self._models.failures()

    def health(self) -> dict[str, object]:
        """Return a few figures of the whole node."""
        return {
            "draining": self.is_draining,
            "running": self._scheduler.roster.running,
            "waiting": self._scheduler.roster.waiting,
            "device_bytes": self._scheduler.roster.device_bytes,
            "device_bytes_total": sum(self._capacities.values()),
        }

    def drain(self) -> None:
        """Refuse new requests from now on; what runs has `node.drain_s`. A second call does nothing."""
        figures = self.health()
        del figures["draining"]  # from here on
        self._drain.begin(figures)

    def begin_stop(self) -> None:
        """Let no drain be taken back from now on: the process ends after it."""
        self._drain.begin_stop()

    def undrain(self) -> None:
        """Take new requests again; what the drain has not ended goes on. Nothing if there is none.

        Raises:
            StoppingError: the node stops.
        """
        self._drain.take_back()

    async def drained(self, limit_s: float) -> int:
        """Wait until no session is left; end those that are left after `limit_s`.

        Returns how many had to be ended since the drain began.
        """
        return await self._drain.over(limit_s)

    async def close(self) -> None:
        """End all sessions, loads and replicas."""
        self._hints.close()
        self._drain.close()
        self._alarm.set(None)
        await self._replicas.close()
        self._asked.close(self._drain.error(was_running=True))
        for departure in self._departures.values():
            departure.set_result(None)
        self._departures.clear()

    # --- what happens -------------------------------------------------------------------------

    def on_opened(self, model: ModelId, replica: Replica) -> None:
        """For `Replicas`: sessions can begin while the load goes on."""
        self._early.open(model, replica)
        for stream in self._sessions.waiting_for(model):
            self._early.begin(stream)

    def on_closing(self, model: ModelId) -> None:
        """For `Replicas`: such a replica goes away; its sessions wait for what is told next."""
        self._early.close(model)

    def on_loaded(self, model: ModelId) -> None:
        """For `Replicas`: a load succeeded."""
        self._models.loaded(model)
        hosted = self._replicas.get(model)
        if hosted is not None:
            self._tickets.learn(hosted)
            if self._models.is_replaced(hosted):
                self._replaced(model)
        self._do(self._scheduler.on_loaded(model, self._clock.now()))
        self._early.close(model)

    def on_load_failed(self, model: ModelId, error: SllmError) -> None:
        """For `Replicas`: a load gave up."""
        self._models.failed(model, error)
        self._do(self._scheduler.on_load_failed(model, error, self._clock.now()))

    def on_evicted(self, model: ModelId) -> None:
        """For `Replicas`: a replica is gone."""
        if (began := self._evicting.pop(model, None)) is not None:
            self._estimator.observe_eviction(self._clock.now() - began)
        departure = self._departures.pop(model, None)
        if departure is not None:
            departure.set_result(None)
        self._do(self._scheduler.on_evicted(model, self._clock.now()))

    def _on_timer(self) -> None:
        self._do(self._scheduler.on_timer(self._clock.now()))

    def _stream_ended(self, stream: Stream, outcome: Outcome) -> None:
        self._telemetry.ended(stream, outcome, self._clock.now())
        self.on_session_end(stream)
        self._early.drop(stream)
        if self._sessions.take(stream.ticket) is None:
            return  # the scheduler's own decision
        now = self._clock.now()
        if not stream.is_granted:
            self._do(self._scheduler.on_cancel(stream.ticket, now))
            return
        self._do(self._scheduler.on_finished(stream.ticket, now))
        if isinstance(stream.error, EngineError):
            self._do(self._scheduler.on_failed(stream.request.model, now))

    # --- carrying out -------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        """Carry `actions` out, behind those under way."""
        self._actions.extend(actions)
        if self._is_acting:
            return
        self._is_acting = True
        try:
            while self._actions:
                self._act(self._actions.popleft())
        finally:
            self._is_acting = False
        self._alarm.set(self._scheduler.next_timer())
        self.on_change()

    def _act(self, action: Action) -> None:
        match action:
            case StartLoad(model, devices):
                self._replicas.start_load(model, devices, self)
            case AbortLoad(model):
                self._replicas.abort_load(model)
            case Evict(model, reason):
                self._evicting[model] = self._clock.now()
                self._replicas.start_eviction(model, reason, self)
            case Grant(ticket, model) if self._asked.has(ticket):
                self._asked.granted(ticket)
            case Grant(ticket, model):
                self._grant(self._sessions.get(ticket), model)
            case Refuse(ticket, error) if self._asked.has(ticket):
                self._asked.refused(ticket, error)
            case Refuse(ticket, error):
                self._end(ticket, error, Outcome.REFUSED)
            case GiveWay(ticket, model):
                self._asked.gave_way(ticket)
                self._hints.gave_way(model)
            case Stop(ticket, error):
                self._end(ticket, error, Outcome.STOPPED)

    def _grant(self, stream: Stream, model: ModelId) -> None:
        hosted = self._replicas.get(model)
        assert hosted is not None
        try:
            _check_weights(stream.request, hosted.lease.checkpoint)
            early = self._early.take(stream)
            generation = early or hosted.replica.submit(stream.request)
        except SllmError as error:
            failure = error
        except Exception as error:
            log.exception("engine took no request", extra={"model": model})
            failure = EngineError(model, f"{type(error).__name__}: {error}")
        else:
            stream.weights = hosted.lease.checkpoint.weights
            stream.grant(generation, is_early=early is not None, load=hosted.load)
            self._telemetry.granted(stream)
            return
        self._end(stream.ticket, failure, Outcome.REFUSED)
        now = self._clock.now()
        self._do(self._scheduler.on_finished(stream.ticket, now))
        if isinstance(failure, EngineError):
            self._do(self._scheduler.on_failed(model, now))

    def _end(self, ticket: TicketId, error: SllmError, outcome: Outcome) -> None:
        """End a stream of which the scheduler knows already that it ends."""
        stream = self._sessions.take(ticket)
        assert stream is not None
        stream.fail(error, outcome)

    # --- looking things up --------------------------------------------------------------------

    def _want(self, model: ModelId) -> asyncio.Future[None]:
        return self._asked.want(self._models.servable(model))

    def _ask_ahead(self, model: ModelId) -> TicketId | None:
        return self._asked.ask_ahead(self._models.servable(model))

    def _replaced(self, model: ModelId) -> None:
        self._do(self._scheduler.on_replaced(model, self._clock.now()))

    def _kv_usage(self, model: ModelId) -> float:
        hosted = self._replicas.get(model)
        return 0.0 if hosted is None else hosted.replica.kv_usage


def _log_preload(name: str) -> Callable[[asyncio.Future[None]], None]:
    def ended(waiter: asyncio.Future[None]) -> None:
        if not waiter.cancelled() and (error := waiter.exception()) is not None:
            log.warning("preload failed", extra={"model": name, "error": str(error)})

    return ended


def _check_weights(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Refuse to go on with a session that began with other weights."""
    if request.weights is not None and not request.weights.is_same(checkpoint.weights):
        raise OtherWeightsError(request.session, request.model)
