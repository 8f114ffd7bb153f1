import asyncio
from typing import cast

from sllm_node.cluster.part import TOLD_S, LocalSource
from sllm_node.cluster.wire import Granted, Tokens, Waiting
from sllm_node.schedule.stream import Stream
from tests.sim.loop import run
from tests.unit.server.fake_service import FakeStream, chunks_of, status_of


class LoadingStream(FakeStream):
    """A session of this node whose model loads."""

    is_granted, waited, weights, position = True, None, None, 1

    def __init__(self):
        super().__init__(chunks_of("a"))
        self.started = asyncio.Event()

    def __aiter__(self):
        return self

    def status(self):
        return None if self.started.is_set() else status_of("m")

    async def standing(self, told):
        return None


def test_a_session_that_waits_here_tells_again_and_again_how_its_load_stands():
    async def play():
        stream = LoadingStream()
        asyncio.get_running_loop().call_later(2.5 * TOLD_S, stream.started.set)
        return [record async for record in LocalSource(stream=cast(Stream, stream)).records()]

    first, second, third, *rest = run(play())
    assert [first, second] == [Waiting(status_of("m"))] * 2
    assert third == Waiting()
    assert isinstance(rest[0], Granted)
    assert isinstance(rest[-1], Tokens)
