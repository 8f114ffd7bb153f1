"""Word to the node that will serve a request, before the request is tokens: its load may begin.

The entry places by the model's name alone and tells the node of its choice; what a hint may do there, and
for how long, is the node's own rule (`schedule.hints`). The answer is the node's state with the load in it,
so the placement that follows sees it coming. A hint that is late, lost or refused costs nothing: the
session itself asks for the load.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Any, Final

from sllm_node.cluster.choice import Choice, choose, request_for
from sllm_node.cluster.document import decode_state, encode_state
from sllm_node.cluster.packing import pack
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.transport import Client, Reply
from sllm_node.cluster.wire import Hint, unpack_hint
from sllm_node.core import log as logs
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.types import GenerationRequest, ModelId, NodeId, RequestId
from sllm_node.schedule.driver import Service
from sllm_node.schedule.stream import request_of

log = logging.getLogger(__name__)

HINT: Final = "hint"
_SENDING_MAX: Final = 32
"""Hints under way from here; of more, sessions ask by themselves."""
_GIVEN_MAX: Final = 1024
"""Requests whose hints are remembered."""
_WAYS: Final = ("load", "evict")


class Hinting:
    """Hints that this node gives and takes."""

    def __init__(self, service: Service[Any], peers: Peers, client: Client, clock: Clock) -> None:
        self._service = service
        self._peers = peers
        self._client = client
        self._clock = clock
        self._sending: set[asyncio.Task[None]] = set()
        self._given: dict[RequestId, tuple[Choice, float]] = {}
        """The last hints and when they were given, by request."""

    def give(self, model: ModelId) -> None:
        """Let the load of `model` begin where its request will go, if it needs one."""
        self._peers.refresh()
        view, me = self._peers.view, self._peers.me
        gain_s = self._peers.cluster.placement.least_gain_s
        choice = choose(view, request_for(view, model), me, self._clock.now(), gain_s=gain_s)
        if choice is None or choice.way not in _WAYS:
            return
        if choice.node == me:
            if self._service.hint(model):
                self._remember(choice)
        elif len(self._sending) < _SENDING_MAX:
            self._remember(choice)
            task = asyncio.create_task(self._send(choice.node, model), name=f"hint {choice.node}")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def followed(self, request: GenerationRequest, choice: Choice) -> Choice:
        """Return the choice with what the request's own hint began there, if it did."""
        began, at = self._given.get(request_of(request.session), (None, 0.0))
        if began is None or began.node != choice.node:
            return choice
        return replace(choice, began=began, began_s=self._clock.now() - at)

    def _remember(self, choice: Choice) -> None:
        if (request := logs.request_id.get()) is None:
            return
        self._given[RequestId(request)] = choice, self._clock.now()
        if len(self._given) > _GIVEN_MAX:
            del self._given[next(iter(self._given))]

    async def take(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Take a peer's hint, and answer with this node's state."""
        told = unpack_hint(payload)
        logs.request_id.set(told.request)
        is_coming = self._service.hint(ModelId(told.model))
        log.debug("hint taken", extra={"model": told.model, "peer": sender, "coming": is_coming})
        limit = int(self._peers.cluster.limits.document_bytes)
        await reply.send(encode_state(self._peers.refresh(), limit))

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _send(self, peer: NodeId, model: ModelId) -> None:
        payload = pack(Hint(model, logs.request_id.get() or ""))
        silence_s = self._peers.cluster.timing.suspect_s
        try:
            state = decode_state(await self._client.ask(peer, HINT, payload, silence_s))
        except SllmError as error:
            log.debug("hint lost", extra={"peer": peer, "error": str(error)})
            return
        known = self._peers.view.nodes.get(peer)
        if state.node == peer and known is not None and known.state.boot == state.boot:
            self._peers.view.update(state, self._clock.now())
