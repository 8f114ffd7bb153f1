"""The node as its server sees it when there are others: each request goes where it starts soonest.

It has the shape of `schedule.driver.Service` and stands before it. A request is placed once it is tokens:
here, and it is the service's; or at a peer, and a `RoutedStream` carries it. Models are those of all
nodes. What an operator does to models (load, pin, unload) is this node's alone.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Any, Generic

from sllm_node.cluster import shown
from sllm_node.cluster.acts import Acts
from sllm_node.cluster.carried import Carried
from sllm_node.cluster.choice import Choice, placed_fields
from sllm_node.cluster.elsewhere import Elsewhere
from sllm_node.cluster.fetching import Fetching
from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.hints import Hinting
from sllm_node.cluster.home import HomeStream, onward
from sllm_node.cluster.move import MoveReport
from sllm_node.cluster.movers import Movers
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.placing import Placing
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.texts import Texts
from sllm_node.cluster.transport import Client
from sllm_node.cluster.vacating import Vacating
from sllm_node.cluster.ways import Begun, Limits, Lost, Tools
from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    CancelledByOperatorError,
    CheckpointError,
    DrainingError,
    Fault,
    ModelNotFoundError,
    PromptTooLongError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, ModelStatus, NodeId, SessionStatus
from sllm_node.schedule.driver import Service
from sllm_node.schedule.hints import LONG_CHARACTERS
from sllm_node.schedule.ports import CodecT
from sllm_node.schedule.stream import Stream

log = logging.getLogger(__name__)

_ELSEWHERE = (ModelNotFoundError, PromptTooLongError)


class Router(Generic[CodecT]):
    """Places the requests of this node's clients."""

    def __init__(
        self,
        service: Service[CodecT],
        peers: Peers,
        client: Client,
        texts: Texts[CodecT],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.fetching: Fetching | None = None
        """Makes models of peers known here; None: none are loaded from peers."""
        self._service = service
        self._peers = peers
        self._clock = clock
        self._metrics = metrics
        timing = peers.cluster.timing
        self._tools = Tools(client, clock, Limits(timing.dead_s, timing.waits_s))
        patience_s = self._tools.limits.patience_s
        self.elsewhere = Elsewhere(peers, texts, clock, self.changed, patience_s)
        self._carried = Carried()
        self._news = asyncio.Event()
        self._watching: set[asyncio.Task[None]] = set()
        peers.on_change = self._on_change
        self.hints = Hinting(service, peers, client, clock)
        self.movers = self._movers = Movers(peers, metrics, clock, self._carried.all)
        self.vacating = Vacating(service, peers, self._movers, client, clock, metrics)
        service.on_change = self._on_service_change
        self.leave = self.vacating.asked
        self.placing = placing = Placing(peers, lambda: self.vacating.gain_s, clock, metrics)
        self.choose, self.ask, self.started = placing.choose, placing.ask, placing.started
        self.acts = acts = Acts(service, self.elsewhere, self.ensure)
        self.load, self.unload, self.pin, self.unpin = acts.load, acts.unload, acts.pin, acts.unpin
        self.check_room = acts.check_room

    # --- sessions -----------------------------------------------------------------------------

    def expect(self, model: str, characters: int) -> None:
        """Take note of a request whose text becomes tokens now: its model's load may begin meanwhile."""
        name = ModelId(model)
        is_slow = self._service.is_slow_to_read(name, characters)
        if is_slow and characters < LONG_CHARACTERS:  # its tokenizer is not this node's own
            is_slow = not self.elsewhere.is_read(name)
        if is_slow and not self._service.is_draining:
            self.hints.give(name)

    async def prepare(self, model: str) -> CodecT:
        """Return the codec of `model`, fetched from a peer if only peers have it, or what lies here is of no use.

        Raises:
            ModelNotFoundError: no node has such a checkpoint.
            DrainingError: only peers have it, and this node drains.
            SllmError: what lies here can't be used, and no peer has it.
        """
        try:
            return await self._service.prepare(model)
        except SllmError as error:
            if error.fault is Fault.CALLER and not isinstance(error, ModelNotFoundError):
                raise
            if self.is_draining and self.elsewhere.find(ModelId(model))[0] is not None:
                raise self._service.drain_refusal() from error
            return await self.acts.codec(model, error)

    def context_limit(self, model: str) -> int:
        """Return how many tokens, prompt and output, one session can have where most fit."""
        here: int | None = None
        with suppress(ModelNotFoundError, CheckpointError):
            here = self._service.context_limit(model)
        limit = self.elsewhere.context_limit(ModelId(model), here)
        if limit is None:
            raise self.acts.unknown(model)
        return limit

    @property
    def session_limit(self) -> int:
        """How many sessions one request may ask for."""
        return self._service.session_limit

    def open(
        self, request: GenerationRequest, *, keep_alive_s: float | None = None
    ) -> Stream | HomeStream | RoutedStream:
        """Take a request: it runs where it starts soonest.

        Raises:
            SllmError: it is refused at once, with the reason.
        """
        if self._service.is_draining:
            try:
                return self._service.open(request, keep_alive_s=keep_alive_s)  # which says so
            except ModelNotFoundError as error:  # peers have it, or `prepare` had said so
                raise self._service.drain_refusal() from error
        excluded: frozenset[NodeId] = frozenset()
        choice = self.choose(request, excluded)
        choice = choice and self.hints.followed(request, choice)
        is_absent = choice is None and self.elsewhere.is_absent(
            request.model, request.tokens_needed
        )
        is_mine = choice is None or choice.node == self._peers.me
        if not is_absent and is_mine and not self._comes_from_peer(request.model, choice):
            try:
                return self._open_here(request, keep_alive_s, choice)
            except SllmError as error:
                if error.fault is Fault.CALLER and not isinstance(error, _ELSEWHERE):
                    raise
                excluded = frozenset({self._peers.me})
                choice = self.choose(request, excluded)
                if choice is None:
                    raise
        if choice is not None:
            log.info("request placed", extra=placed_fields(request, choice))
        return self._route(request, keep_alive_s, choice)

    def _comes_from_peer(self, model: ModelId, choice: Choice | None) -> bool:
        """Tell whether this node is to load what it does not know yet."""
        if choice is None or choice.candidate is None or self.fetching is None:
            return False
        return not self.fetching.is_here(model)

    def _route(
        self,
        request: GenerationRequest,
        keep_alive_s: float | None,
        choice: Choice | None,
        before: Begun | Lost | None = None,
    ) -> RoutedStream:
        stream = RoutedStream(request, keep_alive_s, choice, self, self._tools, before)
        self._carried.add(stream)
        return stream

    def _carry(self, home: HomeStream, before: Begun | SllmError | None) -> RoutedStream:
        """Carry a session that this node has served by itself until now, or does not take any more.

        Raises:
            SllmError: it has failed here, and no other node can have it.
        """
        request, choice, how = onward(
            home, before, self._peers.me, self.choose, self._clock.now(),
            is_draining=self.is_draining,
        )  # fmt: skip
        self._carried.leaves_home(home)
        return self._route(request, home.keep_alive_s, choice, how)

    def _open_here(
        self, request: GenerationRequest, keep_alive_s: float | None, choice: Choice | None
    ) -> HomeStream:
        stream = self.open_local(request, keep_alive_s, choice)
        home = HomeStream(stream, keep_alive_s, self._carry, self._carried.ended)
        self._carried.add(home)
        home.choice = choice
        if choice is not None and choice.startup_s is not None:
            log.info("request placed", extra=placed_fields(request, choice))
            task = asyncio.create_task(self._watch(stream, choice), name="startup")
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)
        return home

    async def _watch(self, stream: Stream, choice: Choice) -> None:
        await stream.started.wait()
        if stream.granted is not None:
            seconds = stream.granted - stream.opened
            self.started(choice, stream.request.model, seconds, stream.waited)

    def ended(self, stream: RoutedStream) -> None:
        """Forget a session that has ended."""
        self._carried.ended(stream)

    # --- what sessions ask (forward.Ways) -----------------------------------------------------

    async def ensure(self, model: str) -> None:
        """Know a model of peers that is to be loaded or pulled here; nothing if it is known.

        Raises:
            SllmError: no peer has all of it, or gives it.
        """
        if self.fetching is not None:
            await self.fetching.ensure(model)

    def open_local(
        self, request: GenerationRequest, keep_alive_s: float | None, choice: Choice | None
    ) -> Stream:
        """Begin a session here, with the moves that its placement counts on."""
        if choice is None or not choice.moves:
            return self._service.open(request, keep_alive_s=keep_alive_s)
        ask = self.placing.ask_in_full(choice, request)
        return self.vacating.open(request, keep_alive_s, ask)

    def standing(self, model: ModelId) -> ModelStatus | None:
        """Return how a model stands that a session waits for; None: nobody tells of it any more."""
        try:
            return self.status(model)
        except SllmError:
            return None

    def learn(self, state: NodeState) -> None:
        """Take the state that came with a refusal."""
        self._peers.learn(state)

    def lost(self, node: NodeId, error: SllmError) -> None:
        """Take note that a node can't be reached."""
        log.warning("peer lost", extra={"peer": node, "error": str(error)})
        self._peers.lost(node)

    def passed_on(self, node: NodeId, seconds: float) -> None:
        """Count what this node added to tokens of a peer."""
        if node != self._peers.me:
            self._metrics.forward_added_seconds.labels(node).observe(seconds)

    def left(self, choice: Choice, model: str, outcome: str) -> None:
        """Count how a node's part in a session ended."""
        self._metrics.forwards.labels(choice.node, outcome).inc()
        if outcome == "failed":
            self._metrics.resumptions.labels(model).inc()

    def moved(self, report: MoveReport) -> None:
        """Count how a move ended."""
        self._movers.told(report)

    async def changed(self, timeout_s: float) -> bool:
        """Wait until something is heard of the cluster."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _on_change(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
        self._movers.evacuate()

    def _on_service_change(self) -> None:
        self._peers.changed()
        self.vacating.look()

    # --- moves --------------------------------------------------------------------------------

    def move(self, session: str, to: str) -> dict[str, str]:
        """Begin to move a session of a client of this node to the node `to`; tell the move's id.

        Raises:
            MoveRefusedError: there is no such session, or it can't go there now.
        """
        return self._movers.move(session, NodeId(to), "operator")

    def moves(self) -> list[dict[str, Any]]:
        """Return the last moves, the newest first."""
        return self._movers.recent()

    def drain(self) -> None:
        """Take no new requests, and move what runs here to peers; what can't move has its time."""
        self._service.drain()
        self._peers.drain()
        self._peers.refresh()
        self._movers.evacuate()

    def undrain(self) -> None:
        """Take new requests again, and tell peers; what has moved to them stays there.

        Raises:
            StoppingError: the node stops.
        """
        self._service.undrain()
        self._peers.undrain()
        self._peers.refresh()

    # --- models -------------------------------------------------------------------------------

    def models(self) -> list[ModelStatus]:
        """Return the models of all nodes."""
        here = {status.model: status for status in self._service.models()}
        for name in self.elsewhere.names() - here.keys():
            status = self.elsewhere.status(name)
            if status is not None:
                here[name] = status
        return [here[name] for name in sorted(here)]

    def status(self, model: str) -> ModelStatus:
        """Return how `model` stands, here or elsewhere.

        Raises:
            ModelNotFoundError: no node has such a checkpoint.
        """
        try:
            return self._service.status(model)
        except (ModelNotFoundError, CheckpointError) as error:
            status = self.elsewhere.status(ModelId(model))
            if status is None:
                self.acts.refuse(model, error)
        return status

    # --- operators ----------------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the node stops."""
        return self._service.is_draining

    def sessions(self) -> list[SessionStatus]:
        """Return who waits and who runs, here or for clients of this node elsewhere."""
        return self._carried.shown(self._service.sessions(), self._peers.me)

    def cancel_request(self, request_id: str) -> int:
        """End the sessions of a request, wherever they run; return how many there were."""
        error = CancelledByOperatorError("an operator ended it")
        return self._carried.stop_request(request_id, error) + self._service.cancel_request(
            request_id
        )

    def explain(self, model: str) -> dict[str, Any]:
        """Return where a request for `model` would go now, and what all ways were estimated at."""
        self._peers.refresh()
        return shown.explanation(
            self._peers.view, ModelId(model), self._peers.me, self._clock.now(),
            self.vacating.gain_s,
        )  # fmt: skip

    async def drained(self, limit_s: float) -> int:
        """Wait until no session of this node's clients is left anywhere; return how many were ended."""
        deadline = self._clock.now() + limit_s
        ended = await self._service.drained(limit_s)
        if not await self._carried.quiet(max(0.0, deadline - self._clock.now())):
            ended += self._carried.stop_routed(DrainingError(limit_s, was_running=True))
        return ended

    async def close(self) -> None:
        """End what is routed."""
        self._movers.close()
        self._carried.cancel_routed()
        for task in list(self._watching):
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.vacating.close()
        await self.hints.close()
