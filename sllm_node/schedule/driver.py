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
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Generic

from sllm_node.checkpoint.cards import PEERS
from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.config import Config
from sllm_node.core.errors import (
    DrainingError,
    EngineError,
    ModelNotFoundError,
    MoveRefusedError,
    NotServableError,
    SllmError,
    StoppingError,
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
    Ticket,
    TicketId,
)
from sllm_node.schedule.early import EarlySessions
from sllm_node.schedule.estimate import LoadEstimator
from sllm_node.schedule.hints import LONG_CHARACTERS, Hints
from sllm_node.schedule.outlook import Outlook, Sources
from sllm_node.schedule.ports import CodecT, Engines, Pins, Replica, WeightStore
from sllm_node.schedule.replicas import Hosted, Replicas
from sllm_node.schedule.scheduler import Scheduler
from sllm_node.schedule.sessions import Sessions
from sllm_node.schedule.status import model_status
from sllm_node.schedule.stream import Outcome, Stream
from sllm_node.schedule.telemetry import Telemetry

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
        self._last_ticket = 0
        self._sessions = Sessions()
        self._early = EarlySessions(config.engine.max_sessions)
        self._load_waiters: dict[TicketId, asyncio.Future[None]] = {}
        self._departures: dict[ModelId, asyncio.Future[None]] = {}
        self._failures: dict[ModelId, tuple[SllmError, float]] = {}
        """Of models whose last load failed: why and when."""
        self._evicting: dict[ModelId, float] = {}
        """When evictions under way began."""
        self._actions: deque[Action] = deque()
        self._is_acting = False
        self._alarm = Alarm(clock, self._on_timer)
        self._drain_end = Alarm(clock, self._on_drain_end)
        self._ended_by_drain = 0
        self._is_stopping = False
        """The process ends after the drain."""
        self._telemetry = Telemetry(metrics, self._scheduler.view, self._kv_usage)
        self._hints = Hints(self._scheduler, clock, metrics, self._ask_ahead, self._drop_ahead)
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
        return await self._replicas.codecs.get(self._servable(ModelId(model)))

    def context_limit(self, model: str) -> int:
        """Return how many tokens, prompt and output, one session can have here.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        return self._engines.context_limit(self._servable(ModelId(model)))

    def session_limit(self, model: str) -> int:
        """Return how many sessions of `model` could be taken now if nobody else had any."""
        is_ready = self._scheduler.view(ModelId(model)).state is ModelState.READY
        slots = self._config.engine.max_sessions if is_ready else 0
        return self._config.schedule.max_queue + slots

    def open(self, request: GenerationRequest, *, keep_alive_s: float | None = None) -> Stream:
        """Take a request: its session runs at once or when its turn comes.

        Raises:
            SllmError: it is refused at once, with the reason.
        """
        checkpoint = self._servable(request.model)
        self._engines.check_request(request, checkpoint)
        ticket = self._ticket(checkpoint, priority=request.priority, keep_alive_s=keep_alive_s)
        ticket = replace(ticket, waited_s=request.waited_s)
        stream = Stream(
            ticket.number,
            request,
            self._clock,
            partial(self._status_or_none, checkpoint),
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
        return self._scheduler.running_on(device)

    # --- models -------------------------------------------------------------------------------

    def models(self) -> list[ModelStatus]:
        """Return all models whose checkpoints lie in the store folder now."""
        self._catalog.scan()
        present = self._catalog.models()
        self._replicas.forget_removed({*present, *map(ModelId, self._catalog.problems)})
        statuses = []
        for model in present:
            with suppress(SllmError):  # gone since the scan
                statuses.append(self.status(model))
        return statuses

    def status(self, model: str) -> ModelStatus:
        """Return how `model` stands.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """
        return self._model_status(self._checkpoint(ModelId(model)))

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
        if self._scheduler.view(name).state is ModelState.IDLE:
            self._checkpoint(name)
        self._do(self._scheduler.on_unload_request(name, self._clock.now(), force=force))
        if self._scheduler.view(name).state is ModelState.EVICTING:
            departure = self._departures.setdefault(name, self._loop.create_future())
            await asyncio.shield(departure)
        if self._scheduler.view(name).state is ModelState.IDLE:
            self._store.evict(name, Tier.DEVICE, "operator")  # what it left as a cache, too

    async def pin(self, model: str) -> None:
        """Keep `model` on the device from when it is there, and after a restart.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
            SllmError: it can't be kept for after a restart.
        """
        name = self._checkpoint(ModelId(model)).model
        if self.pins is not None:
            await self.pins.keep(name)
        self._do(self._scheduler.on_pin(name, self._clock.now()))

    async def unpin(self, model: str) -> None:
        """Let `model` be evicted again."""
        name = ModelId(model)
        if not self._scheduler.view(name).pinned:
            self._checkpoint(name)
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
        if self._scheduler.view(model).state is ModelState.QUEUED:
            self._sessions.give_back_all(model, error)

    # --- the node -----------------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the node stops."""
        return self._scheduler.is_draining

    def drain_refusal(self) -> DrainingError:
        """Return what a request is told while this node drains."""
        return DrainingError(self._config.node.drain_s)

    def failures(self) -> list[dict[str, object]]:
        """Return the models whose last load failed, why, and how long ago."""
        now, present = self._clock.now(), set(self._catalog.models())
        return [
            {"model": model, "error": str(error), "code": error.code, "age_s": round(now - at, 1)}
            for model, (error, at) in sorted(self._failures.items())
            if model in present
        ]

    def health(self) -> dict[str, object]:
        """Return a few figures of the whole node."""
        return {
            "draining": self.is_draining,
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "device_bytes": self._scheduler.device_bytes,
            "device_bytes_total": sum(self._capacities.values()),
        }

    def drain(self) -> None:
        """Refuse new requests from now on; what runs has `node.drain_s`. A second call does nothing."""
        if self.is_draining:
            return
        figures = self.health()
        del figures["draining"]  # from here on
        log.info("drain started", extra=figures)
        self._telemetry.draining(is_draining=True)
        self._drain_end.set(self._clock.now() + self._config.node.drain_s)
        self._do(self._scheduler.on_drain(self._clock.now()))

    def undrain(self) -> None:
        """Take new requests again; what the drain has not ended goes on. Nothing if there is none.

        Raises:
            StoppingError: the node stops.
        """
        if self._is_stopping:
            raise StoppingError
        if not self.is_draining:
            return
        log.info("drain taken back", extra={"sessions_ended": self._ended_by_drain})
        self._telemetry.draining(is_draining=False)
        self._drain_end.set(None)
        self._ended_by_drain = 0
        self._do(self._scheduler.on_undrain(self._clock.now()))

    async def drained(self, limit_s: float) -> int:
        """Wait until no session is left; end those that are left after `limit_s`. No drain is taken back now.

        Returns how many had to be ended since the drain began.
        """
        self._is_stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._sessions.quiet()
        self._on_drain_end()
        return self._ended_by_drain

    async def close(self) -> None:
        """End all sessions, loads and replicas."""
        self._hints.close()
        self._do(self._scheduler.on_drain(self._clock.now()))
        self._drain_end.set(None)
        self._on_drain_end()
        self._alarm.set(None)
        await self._replicas.close()
        error = self._drain_error()
        for waiter in self._load_waiters.values():
            if not waiter.done():
                waiter.set_exception(error)
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
        self._failures.pop(model, None)
        hosted = self._replicas.get(model)
        if hosted is not None and hosted.lease.report is not None:
            is_peer = hosted.lease.checkpoint.remote == PEERS
            self._estimator.observe(hosted.lease.report, is_peer=is_peer, is_alone=hosted.was_alone)
            if hosted.was_alone:  # or it may have waited for others
                self._estimator.observe_whole(
                    hosted.lease.report, hosted.elapsed_s, is_kept=hosted.was_kept
                )
        with suppress(SllmError):  # removed meanwhile: those who wait are served
            if hosted is not None and self._is_outdated(hosted, self._catalog.get(model)):
                self._do(self._scheduler.on_replaced(model, self._clock.now()))
        self._do(self._scheduler.on_loaded(model, self._clock.now()))
        self._early.close(model)

    def on_load_failed(self, model: ModelId, error: SllmError) -> None:
        """For `Replicas`: a load gave up."""
        self._failures[model] = (error, self._clock.now())
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

    def _on_drain_end(self) -> None:
        self._ended_by_drain += self._sessions.stop_all(self._drain_error())

    def _drain_error(self) -> DrainingError:
        return DrainingError(self._config.node.drain_s, was_running=True)

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
            case Grant(ticket, model) if ticket in self._load_waiters:
                self._load_waiters.pop(ticket).set_result(None)
            case Grant(ticket, model):
                self._grant(self._sessions.get(ticket), model)
            case Refuse(ticket, error) if ticket in self._load_waiters:
                self._load_waiters.pop(ticket).set_exception(error)
            case Refuse(ticket, error):
                self._end(ticket, error, Outcome.REFUSED)
            case GiveWay(ticket, model):
                self._load_waiters.pop(ticket).cancel()
                self._hints.gave_way(model)
            case Stop(ticket, error):
                self._end(ticket, error, Outcome.STOPPED)

    def _grant(self, stream: Stream, model: ModelId) -> None:
        hosted = self._replicas.get(model)
        assert hosted is not None
        try:
            early = self._early.take(stream)
            generation = early or hosted.replica.submit(stream.request)
        except SllmError as error:
            failure = error
        except Exception as error:
            log.exception("engine took no request", extra={"model": model})
            failure = EngineError(model, f"{type(error).__name__}: {error}")
        else:
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

    def _checkpoint(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint as it is on disk now; a replica of another one is on its way out."""
        hosted = self._replicas.get(model)
        try:
            checkpoint = self._catalog.get(model)
        except ModelNotFoundError:
            if hosted is not None:
                self._do(self._scheduler.on_replaced(model, self._clock.now()))
            raise
        if hosted is not None and self._is_outdated(hosted, checkpoint):
            self._do(self._scheduler.on_replaced(model, self._clock.now()))
        return checkpoint

    def _is_outdated(self, hosted: Hosted, checkpoint: Checkpoint) -> bool:
        return hosted.lease.checkpoint.identities != checkpoint.identities

    def _servable(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint of `model`, or raise NotServableError if it is none of a model."""
        checkpoint = self._checkpoint(model)
        if not checkpoint.index.is_model:
            raise NotServableError(model)
        return checkpoint

    def _ticket(
        self,
        checkpoint: Checkpoint,
        *,
        priority: int = 0,
        keep_alive_s: float | None = None,
        is_session: bool = True,
        is_hint: bool = False,
    ) -> Ticket:
        model = checkpoint.model
        self._telemetry.watch(model)
        self._last_ticket += 1
        residency = self._store.residency(model)
        size, stored = checkpoint.index.size, checkpoint.index.file_size
        in_dram = residency.get(Tier.DRAM, 0) * size // stored  # as what it decodes to
        on_nvme = residency.get(Tier.NVME, stored) * size // stored
        bytes_moved = max(0, size - residency.get(Tier.DEVICE, 0))
        from_nvme = max(0, bytes_moved - in_dram)
        from_remote = min(from_nvme, size - on_nvme)
        is_encoded, is_peer = checkpoint.index.is_encoded, checkpoint.remote == PEERS
        load_s = self._estimator.load_s(
            bytes_moved, from_nvme, from_remote, is_encoded=is_encoded, is_peer=is_peer
        )
        beside_s = self._estimator.beside_s(is_kept=self._engines.is_kept(checkpoint))
        return Ticket(
            TicketId(self._last_ticket),
            model,
            self._engines.shares(checkpoint),
            load_s + beside_s,
            priority,
            keep_alive_s,
            is_session,
            is_hint,
            beside_s,
        )

    def _want(self, model: ModelId) -> asyncio.Future[None]:
        """Ask for `model` to be on the device; the future ends when it is, or can't be."""
        return self._ask_with(self._ticket(self._servable(model), is_session=False))

    def _ask_with(self, ticket: Ticket) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = self._loop.create_future()
        # Looked at even when the caller is gone.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._load_waiters[ticket.number] = waiter
        self._do(self._scheduler.on_request(ticket, self._clock.now()))
        return waiter

    def _ask_ahead(self, model: ModelId) -> TicketId | None:
        """Ask for a model that nobody waits for yet; None: its load could not begin."""
        ticket = self._ticket(self._servable(model), is_session=False, is_hint=True)
        if not self._scheduler.can_begin(ticket, self._clock.now()):
            return None
        _ = self._ask_with(ticket)  # its end is nobody's news
        return ticket.number

    def _drop_ahead(self, model: ModelId, ticket: TicketId) -> None:
        """Take a ticket back that nobody waits for; one that was granted leaves its model idle."""
        now = self._clock.now()
        if self._load_waiters.pop(ticket, None) is not None:
            self._do(self._scheduler.on_cancel(ticket, now))
        else:
            self._do(self._scheduler.on_unused(model, now))

    def _model_status(self, checkpoint: Checkpoint) -> ModelStatus:
        model, hosted = checkpoint.model, self._replicas.get(checkpoint.model)
        status = model_status(
            checkpoint,
            self._scheduler.view(model),
            self._store.residency(model),
            self._store.progress(model),
            self._clock.now(),
            None if hosted is None else hosted.replica.stalled_s,
        )
        return replace(status, context_tokens=self._engines.context_limit(checkpoint))

    def _status_or_none(self, checkpoint: Checkpoint) -> ModelStatus | None:
        try:
            return self._model_status(checkpoint)
        except SllmError:  # removed in the meantime
            return None

    def _kv_usage(self, model: ModelId) -> float:
        hosted = self._replicas.get(model)
        return 0.0 if hosted is None else hosted.replica.kv_usage


def _log_preload(name: str) -> Callable[[asyncio.Future[None]], None]:
    def ended(waiter: asyncio.Future[None]) -> None:
        if not waiter.cancelled() and (error := waiter.exception()) is not None:
            log.warning("preload failed", extra={"model": name, "error": str(error)})

    return ended
