"""Heartbeats on their way: one task for each, and a peer that has not answered yet gets no other."""

import asyncio
import logging
from functools import partial
from typing import Final

from sllm_node.cluster.refusals import Refusals
from sllm_node.cluster.transport import Client
from sllm_node.core.clock import Clock
from sllm_node.core.errors import SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import NodeId

log = logging.getLogger(__name__)

HEARTBEAT: Final = "heartbeat"


class Heartbeats:
    """Sends what is due, and tells metrics and `refusals` how that went."""

    def __init__(self, clock: Clock, metrics: Metrics, refusals: Refusals) -> None:
        self._clock = clock
        self._metrics = metrics
        self._refusals = refusals
        self._sending: dict[NodeId, asyncio.Task[None]] = {}

    def is_sending(self, peer: NodeId) -> bool:
        """Tell whether `peer` has one to answer."""
        return peer in self._sending

    def send(self, client: Client, peer: NodeId, data: bytes, silence_s: float) -> None:
        """Begin to send one to a peer that has none to answer."""
        assert not self.is_sending(peer)
        task = asyncio.create_task(
            self._send(client, peer, data, silence_s), name=f"heartbeat {peer}"
        )
        self._sending[peer] = task
        task.add_done_callback(partial(self._sent, peer))

    async def drop(self) -> None:
        """End what is on its way."""
        for task in list(self._sending.values()):
            task.cancel()
        await self.answered()
        self._sending.clear()

    async def answered(self) -> None:
        """Wait until none is on its way."""
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    def _sent(self, peer: NodeId, _: asyncio.Task[None]) -> None:
        self._sending.pop(peer, None)

    async def _send(self, client: Client, peer: NodeId, data: bytes, silence_s: float) -> None:
        asked = self._clock.now()
        try:
            await client.ask(peer, HEARTBEAT, data, silence_s)
        except SllmError as error:
            self._metrics.heartbeats.labels("failed").inc()
            log.debug("heartbeat failed", extra={"peer": peer, "error": str(error)})
            self._refusals.failed(peer, error)
        else:
            self._refusals.taken(peer)
            self._metrics.heartbeats.labels("sent").inc()
            self._metrics.peer_round_trip_seconds.labels(peer).observe(self._clock.now() - asked)
