"""What this node does for its peers: takes heartbeats, serves sessions, holds some, describes models.

A forwarded session is checked against this node's own state, as it is now, and begun in the same turn of
the event loop; so what the asker counted on is either still true, or it gets a refusal with the newer
state, and no promise has to be kept in between. It is served here or not at all: nothing is passed on twice.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.cluster.document import encode_state
from sllm_node.cluster.fetching import Fetching
from sllm_node.cluster.heartbeats import HEARTBEAT
from sllm_node.cluster.packing import pack
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.reservations import Ask, Refused, Reservations
from sllm_node.cluster.state import NodeState
from sllm_node.cluster.transport import Handler, Reply
from sllm_node.cluster.vacate import joined
from sllm_node.cluster.wire import (
    HOPS_MAX,
    Described,
    Granted,
    Leave,
    Standing,
    Tokens,
    Waiting,
    failed,
    unpack_describe,
    unpack_extend,
    unpack_forward,
    unpack_left,
)
from sllm_node.cluster.wire import Refusal as RefusalRecord
from sllm_node.core import log as logs
from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    EngineError,
    GivenBackError,
    HopLimitError,
    MoveRefusedError,
    SllmError,
)
from sllm_node.core.types import ModelId, NodeId, SessionId
from sllm_node.schedule.driver import Service
from sllm_node.schedule.stream import Stream, client_id_of, request_of

log = logging.getLogger(__name__)

GENERATE: Final = "generate"
EXTEND: Final = "extend"
LEFT: Final = "left"
DESCRIBE: Final = "describe"
_PIECE_BYTES: Final = 1 << 20


class Vacating(Protocol):
    """Who makes room by moves; `vacating.Vacating` satisfies it."""

    def objection(self, ask: Ask, state: NodeState) -> str | None:
        """Return why the sessions that an ask names can't leave, if so."""

    def begin(self, ask: Ask, stream: Stream) -> None:
        """Make the room for a session that waits here, if its ask names sessions that leave."""

    def wish_for(self, session: SessionId) -> Leave | None:
        """Return what a session's entry is to be told next, once."""


class Serving:
    """The handlers of the listener."""

    def __init__(
        self, service: Service[Any], peers: Peers, vacating: Vacating, clock: Clock, ping_s: float,
        fetching: Fetching | None = None,
    ) -> None:  # fmt: skip
        self._service = service
        self._peers = peers
        self._vacating = vacating
        self._clock = clock
        self._fetching = fetching
        self._ping_s = ping_s
        """A peer that waits hears something this often."""
        self._reservations = Reservations(ttl_s=ping_s)
        self._served: dict[tuple[NodeId, str, int], Stream] = {}
        """Sessions of peers' clients, by entry, session and epoch."""

    def handlers(self) -> Mapping[str, Handler]:
        """Return what answers which request."""
        return {
            HEARTBEAT: self.heartbeat, GENERATE: self.generate, EXTEND: self.extend,
            LEFT: self.left, DESCRIBE: self.describe,
        }  # fmt: skip

    def entry_of(self, name: str) -> NodeId | None:
        """Return the node whose client has a session that is served here; None: there is none."""
        keys = ((entry, SessionId(session)) for entry, session, _ in self._served)
        found = (e for e, s in keys if name in (s, request_of(s), client_id_of(request_of(s))))
        return next(found, None)

    async def heartbeat(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Take a heartbeat."""
        await self._peers.receive(sender, payload)
        await reply.send(b"")

    async def generate(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Serve a session for a peer that has its client."""
        forward = unpack_forward(payload)
        if forward.hops > HOPS_MAX:
            raise HopLimitError(forward.hops, HOPS_MAX)
        request = forward.request
        logs.request_id.set(request_of(request.session))
        logs.model_id.set(request.model)
        fields = {"session": request.session, "entry": sender, "why": forward.why}
        if forward.migration:
            fields["migration"] = forward.migration
        if forward.ask.shares and (problem := await self._learn(request.model, reply)):
            await reply.send(pack(failed(problem)))
            return
        state = self._peers.refresh()
        ask = joined(forward.ask, request.model, state)
        if (refused := self._refusal(ask, state)) is not None:
            log.info("forwarded session refused", extra={**fields, "reason": refused.reason})
            await reply.send(pack(refused))
            return
        try:
            stream = self._service.open(request, keep_alive_s=forward.keep_alive_s)
        except SllmError as error:
            log.info("forwarded session refused", extra={**fields, "reason": str(error)})
            await reply.send(pack(failed(error)))
            return
        log.info("forwarded session taken", extra={**fields, "resumed": len(request.resumed)})
        stream.entry = sender
        key = (sender, str(request.session), forward.epoch)
        self._served[key] = stream
        try:
            self._vacating.begin(ask, stream)
            await self._pass_on(stream, _Heard(reply, sender, self._peers))
        finally:
            if self._served.get(key) is stream:  # not a later try's, of the same epoch
                del self._served[key]
            stream.cancel()  # the peer went away, or it has ended
            log.info("forwarded session left", extra={**fields, "tokens": stream.tokens})

    async def extend(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Add tokens to a session that moves here; the last ones let it go."""
        told = unpack_extend(payload)
        stream = self._served.get((sender, told.session, told.epoch))
        if stream is None or not stream.request.held or told.position > stream.position:
            await reply.send(pack(failed(MoveRefusedError(told.session, "it is not held here"))))
            return
        stream.extend(told.position, told.tokens, lets_go=told.lets_go)
        await reply.send(pack(Granted()))

    async def left(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """End a session that another node goes on with."""
        told = unpack_left(payload)
        await reply.send(pack(Granted()))
        if (stream := self._served.get((sender, told.session, told.epoch))) is not None:
            stream.leave(told.migration)

    async def _learn(self, model: ModelId, reply: Reply) -> SllmError | None:
        """Know a model that is to be loaded from a peer, with signs of life; return what is in the way."""
        if self._fetching is None or self._fetching.is_here(model):
            return None
        while True:
            try:
                async with asyncio.timeout(self._ping_s):
                    await self._fetching.ensure(model)
            except TimeoutError:
                await reply.send(pack(Waiting()))
            except SllmError as error:
                return error
            else:
                return None

    def _refusal(self, ask: Ask, state: NodeState) -> RefusalRecord | None:
        answer = self._reservations.ask(ask, state, self._clock.now())
        self._reservations.release(ask.id)  # used at once: the state tells of it from now on
        if isinstance(answer, Refused):
            return self._refuse(answer.reason, answer.state)
        why = self._vacating.objection(ask, state)
        return None if why is None else self._refuse(why, state)

    def _refuse(self, reason: str, state: NodeState) -> RefusalRecord:
        limit = int(self._peers.cluster.limits.document_bytes)
        return RefusalRecord(reason, encode_state(state, limit))

    async def _pass_on(self, stream: Stream, reply: "_Heard") -> None:
        if not stream.started.is_set():
            await self._service.begun()
        while not stream.started.is_set():
            await reply.send(pack(Waiting(stream.status())))
            try:
                async with asyncio.timeout(self._ping_s):
                    await stream.started.wait()
            except TimeoutError:
                continue
        if stream.is_granted:
            await reply.send(pack(Granted(stream.waited, stream.weights)))
        try:
            await self._pass_standing(stream, reply)
            while not await self._pass_chunk(stream, reply):
                pass
        except StopAsyncIteration:
            error: SllmError = EngineError(stream.request.model, "the session ended without an end")
        except SllmError as found:
            error = found
        else:
            return
        if isinstance(error, GivenBackError):  # it has not begun: to be placed anew
            await reply.send(pack(self._refuse(str(error), self._peers.refresh())))
        else:
            await reply.send(pack(failed(error)))

    async def _pass_standing(self, stream: Stream, reply: "_Heard") -> None:
        """Tell how far a session is that holds, until it does not any more."""
        told: int | None = -1
        while told is not None:
            try:
                async with asyncio.timeout(self._ping_s):
                    told = await stream.standing(told)
            except TimeoutError:
                await reply.send(pack(Waiting()))
            else:
                if told is not None:
                    await reply.send(pack(Standing(told)))

    async def _pass_chunk(self, stream: Stream, reply: "_Heard") -> bool:
        """Send what comes next, or a sign of life; return whether it was the last."""
        if (leave := self._vacating.wish_for(stream.request.session)) is not None:
            await reply.send(pack(leave))
        try:
            async with asyncio.timeout(self._ping_s):
                chunk = await stream.__anext__()
        except TimeoutError:
            await reply.send(pack(Waiting()))
            return False
        await reply.send(pack(Tokens(chunk, stream.position - len(chunk.tokens))))
        return chunk.finish is not None

    async def describe(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Send what a peer must know of a model to take requests for it."""
        model = unpack_describe(payload).model
        log.info("model described", extra={"model": model, "peer": sender})
        try:
            await self._service.prepare(model)
            tokens = self._service.context_limit(model)
            folder = self._service.outlook.folder(ModelId(model))
            found = await asyncio.to_thread(
                lambda: [(p.name, p.read_bytes()) for p in map(folder.joinpath, TEXT_FILES) if p.is_file()]
            )  # fmt: skip
        except (SllmError, OSError) as error:
            told = error if isinstance(error, SllmError) else EngineError(model, str(error))
            await reply.send(pack(failed(told)))
            return
        await reply.send(pack(Described(tokens, tuple((name, len(data)) for name, data in found))))
        for _, data in found:
            for at in range(0, len(data), _PIECE_BYTES):
                await reply.send(data[at : at + _PIECE_BYTES])


class _Heard:
    """A reply to a peer for as long as that is heard: what is sent to one cut off ends nowhere, and nobody says so."""

    def __init__(self, reply: Reply, peer: NodeId, peers: Peers) -> None:
        self._reply = reply
        self._peer = peer
        self._peers = peers

    async def send(self, payload: bytes) -> None:
        """Send a frame, or drop the connection."""
        if self._peers.is_dead(self._peer):
            raise ConnectionResetError(f"peer {self._peer} is dead to this node")
        await self._reply.send(payload)
