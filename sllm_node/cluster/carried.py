"""The sessions of this node's clients, here or at peers: who they are, and when none is left.

One is at home until it moves, and routed then (`home`); who is routed from the beginning was placed at a peer.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.home import HomeStream
from sllm_node.core.errors import SllmError
from sllm_node.core.types import NodeId, SessionStatus
from sllm_node.schedule.stream import sessions_of


class Carried:
    """Those that have not ended."""

    def __init__(self) -> None:
        self._routed: set[RoutedStream] = set()
        self._homes: set[HomeStream] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    def all(self) -> list[HomeStream | RoutedStream]:
        """Return them all, those at home first."""
        return [*self._homes, *self._routed]

    def add(self, stream: HomeStream | RoutedStream) -> None:
        """Take one that begins."""
        if isinstance(stream, HomeStream):
            self._homes.add(stream)
        else:
            self._routed.add(stream)
        self._quiet.clear()

    def leaves_home(self, stream: HomeStream) -> None:
        """Take that another stream carries its session from now on."""
        self._homes.discard(stream)

    def ended(self, stream: HomeStream | RoutedStream) -> None:
        """Forget one that has ended."""
        if isinstance(stream, HomeStream):
            self._homes.discard(stream)
        else:
            self._routed.discard(stream)
        if not self._routed and not self._homes:
            self._quiet.set()

    def shown(self, here: Sequence[SessionStatus], me: NodeId) -> list[SessionStatus]:
        """Return what `status` shows: those that are `here`, whoever's they are, and of the rest the routed."""
        known = {session.session for session in here}
        routed = [stream.session_status() for stream in self._routed]
        return [replace(one, entry=one.entry or me, node=me) for one in here] + [
            replace(one, entry=me) for one in routed if one.session not in known
        ]

    def stop_request(self, request_id: str, error: SllmError) -> int:
        """End the routed sessions of a request, by this node's name of it or else its client's; return how many."""
        mine = sessions_of(self._routed, request_id)
        for stream in mine:
            stream.stop(error)
        return len(mine)

    def stop_routed(self, error: SllmError) -> int:
        """End all that are routed, their readers get `error`; return how many there were."""
        routed = list(self._routed)
        for stream in routed:
            stream.stop(error)
        return len(routed)

    def cancel_routed(self) -> None:
        """End all that are routed, for readers that went away."""
        for stream in list(self._routed):
            stream.cancel()

    async def quiet(self, limit_s: float) -> bool:
        """Wait until there is none; False: there still are after so long."""
        try:
            async with asyncio.timeout(limit_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True
