"""Carries the autoscaler out: once a second, the demand for each scaled model, and what follows from it.

Each node looks at the cluster as its own view has it; only a model's home acts. It asks the node where
startup is shortest to load the model, or one that has a replica to let it go; the node asked checks that
on its own state. While a model is scaled, its keep-alive on each node does not count.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final, Literal

from sllm_node.cluster.autoscale import (
    Action,
    Autoscaler,
    Demand,
    ScaleOptions,
    StartReplica,
)
from sllm_node.cluster.choice import request_for
from sllm_node.cluster.demand import demand_of, load_of
from sllm_node.cluster.fetching import Fetching
from sllm_node.cluster.packing import pack
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.records import Desired
from sllm_node.cluster.scale_messages import ScaleAnswer, ScaleAsk, unpack_answer, unpack_ask
from sllm_node.cluster.transport import Client, Handler, Reply
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId
from sllm_node.schedule.driver import Service

log = logging.getLogger(__name__)

SCALE: Final = "scale"
ROUND_S: Final = 1.0
_REFUSAL_S: Final = 0.5
"""A load that has not failed by then is under way."""
_NO_ROOM: Final = "there is no room for it any more"


class Scaling:
    """The autoscaler of this node, from `start` to `close`."""

    def __init__(
        self,
        service: Service[Any],
        peers: Peers,
        desired: Callable[[], Iterable[Desired]],
        clock: Clock,
        metrics: Metrics,
        fetching: Fetching | None = None,
    ) -> None:
        dead_s = peers.cluster.timing.dead_s
        options = ScaleOptions(settle_s=1.5 * dead_s, pending_s=max(60.0, 6 * dead_s))
        self._scaler = Autoscaler(peers.me, options)
        self._service = service
        self._fetching = fetching
        self._peers = peers
        self._desired = desired
        self._clock = clock
        self._metrics = metrics
        self._silence_s = dead_s
        self._alarm = Alarm(clock, self._on_timer)
        self._client: Client
        self._tasks: set[asyncio.Task[Any]] = set()
        self._scaled: frozenset[ModelId] = frozenset()

    # --- life ---------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Begin to look."""
        self._client = client
        self._on_timer()

    async def close(self) -> None:
        """Look no more; loads under way go on until the service ends."""
        self._alarm.set(None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def handlers(self) -> Mapping[str, Handler]:
        """Return what answers homes of models."""
        return {SCALE: self.answer}

    def status(self) -> list[dict[str, Any]]:
        """Return each scaled model's replicas, wanted and actual, as this node sees them."""
        return [asdict(scaling) for scaling in self._scaler.status()]

    # --- rounds -------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        self._alarm.set(self._clock.now() + ROUND_S)
        self._look()

    def _look(self) -> None:
        """See what is there, and act for the models whose home this node is: none while it drains."""
        now, desired = self._clock.now(), tuple(self._desired())
        models = frozenset(wish.model for wish in desired)
        if models != self._scaled:
            self._scaled = models
            self._service.scaled(models)
        self._peers.refresh()
        view = self._peers.view
        alive = [name for name, node in view.nodes.items() if not node.state.is_draining]
        self._scaler.on_alive(alive, now, is_draining=self._service.is_draining)
        self._scaler.on_desired(desired, now)
        kept = self._kept(desired)
        for wish in desired:
            for action in self._scaler.on_demand(self._demand(wish.model, kept), now):
                self._begin(action)
        self._tell()

    def _kept(self, desired: Iterable[Desired]) -> frozenset[ModelId]:
        """Return the models of which no more than the minimum is there: they make no room for others."""
        count = Counter(
            replica.model
            for node in self._peers.view.nodes.values()
            for replica in node.state.replicas
            if not (replica.is_leaving or node.state.is_draining)
        )
        return frozenset(wish.model for wish in desired if count[wish.model] <= wish.minimum)

    def _demand(self, model: ModelId, kept: frozenset[ModelId]) -> Demand:
        view, slots = self._peers.view, self._service.outlook.slots
        request, load = request_for(view, model), load_of(view, model)
        return demand_of(view, request, load, slots, self._clock.now(), kept)

    def _has_room(self, model: ModelId) -> bool:
        """Tell whether this node could start a replica now, or has one."""
        me, state = self._peers.me, self._peers.refresh()
        starts = self._demand(model, self._kept(self._desired())).starts
        is_here = any(replica.model == model for replica in state.replicas)
        return is_here or any(start.node == me for start in starts)

    def _tell(self) -> None:
        self._metrics.replicas.clear()
        for scaling in self._scaler.status():
            for state in ("wanted", "ready", "starting", "leaving"):
                self._metrics.replicas.labels(scaling.model, state).set(getattr(scaling, state))

    # --- acting -------------------------------------------------------------------------------

    def _begin(self, action: Action) -> None:
        task = asyncio.create_task(self._act(action), name=f"scale {action.model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _act(self, action: Action) -> None:
        word: Literal["start", "retire"]
        word = "start" if isinstance(action, StartReplica) else "retire"
        try:
            problem = await self._ask(action.node, ScaleAsk(word, action.model))
        except SllmError as error:
            problem = str(error)
        self._metrics.scalings.labels(word, "refused" if problem else "ok").inc()
        fields = {"model": action.model, "node": action.node, "action": word}
        if not problem:
            log.info("replica scaled", extra=fields)
            return
        log.warning("replica not scaled", extra={**fields, "problem": problem})
        if isinstance(action, StartReplica):
            self._scaler.on_refused(action.model, action.node, self._clock.now())

    async def _ask(self, node: NodeId, ask: ScaleAsk) -> str:
        if node == self._peers.me:
            return await self._take(ask)
        answer = await self._client.ask(node, SCALE, pack(ask), self._silence_s)
        return unpack_answer(answer).problem

    # --- being asked --------------------------------------------------------------------------

    async def answer(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Start or retire a replica here, as its model's home asks."""
        ask = unpack_ask(payload)
        problem = await self._take(ask)
        fields = {"model": ask.model, "action": ask.what, "home": sender, "problem": problem}
        log.info("asked to scale", extra=fields)
        await reply.send(pack(ScaleAnswer(problem)))

    async def _take(self, ask: ScaleAsk) -> str:
        """Do it, or begin to; return what is in the way."""
        model = ModelId(ask.model)
        try:
            if ask.what == "retire":
                self._service.retire(model)
                return ""
            return await self._load(model)
        except SllmError as error:
            return str(error)

    async def _load(self, model: ModelId) -> str:
        task = asyncio.create_task(self._see_to(model), name=f"load {model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(_REFUSAL_S):
                return await asyncio.shield(task)
        except TimeoutError:
            return ""

    async def _see_to(self, model: ModelId) -> str:
        """Load it; return what came in the way. What is looked at and done is one turn of the loop."""
        try:
            if self._fetching is not None and self._has_room(model):
                await self._fetching.ensure(model)
            if not self._has_room(model):
                return _NO_ROOM
            await self._service.load(model)
        except SllmError as error:
            log.warning("load for a replica failed", extra={"model": model, "error": str(error)})
            return str(error)
        return ""
