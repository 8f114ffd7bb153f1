import asyncio
import contextlib

import orjson
import pytest
from aiohttp import web

from sllm_node.core.errors import EngineError
from sllm_node.server.stream import EventWriter, items, merged
from tests.unit.server.fake_service import FakeStream, chunks_of, status_of


class FakeResponse(web.StreamResponse):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.writes = []

    async def write(self, data):
        self.writes.append(data)


async def read(streams):
    async with merged(streams, 1.0) as queue:
        return [batch async for batch in items(queue, streams, 1.0)]


async def test_what_has_come_together_is_taken_together():
    gate = asyncio.Event()
    streams = [FakeStream([gate, *chunks_of(text)]) for text in ("ab", "cd", "ef")]
    asyncio.get_running_loop().call_soon(gate.set)
    batches = await read(streams)
    assert len(batches) < sum(len(batch) for batch in batches)
    text = [
        "".join(c.text for batch in batches for i, c in batch if i == choice) for choice in range(3)
    ]
    assert text == ["ab", "cd", "ef"]


async def test_what_came_before_a_failure_is_shown():
    streams = [FakeStream([*chunks_of("ab")[:2], EngineError("m", "broke")]) for _ in range(2)]
    seen = ""
    with contextlib.suppress(EngineError):
        async with merged(streams, 1.0) as queue:
            async for batch in items(queue, streams, 1.0):
                assert isinstance(batch, list)
                seen += "".join(chunk.text for i, chunk in batch if i == 0)
        pytest.fail("the failure was not raised")
    assert seen == "ab"


async def test_events_that_are_there_together_leave_in_one_write():
    response = FakeResponse()
    writer = EventWriter(response)
    await writer.data({"a": 1}, {"b": 2})
    await writer.data()
    (written,) = response.writes
    assert [orjson.loads(line[6:]) for line in written.split(b"\n\n")[:-1]] == [{"a": 1}, {"b": 2}]


class LosesItsNode(FakeStream):
    """Gives chunks, and waits again at an event in their middle."""

    def __init__(self, chunks, lost):
        super().__init__(chunks)
        self.lost = lost

    def status(self):
        return status_of() if self.lost.is_set() else None


async def test_a_stream_that_waits_again_in_its_middle_says_so():
    lost, found = asyncio.Event(), asyncio.Event()
    chunks = chunks_of("ab")
    stream = LosesItsNode([chunks[0], found, *chunks[1:]], lost)
    seen = []
    async with merged([stream], 0.001) as queue:
        async for item in items(queue, [stream], 0.001):
            if not isinstance(item, list):
                seen.append("waits")
                lost.clear()
                found.set()
                continue
            seen += [chunk.text for _, chunk in item]
            if not found.is_set():
                lost.set()
    assert seen[:2] == ["a", "waits"]
    assert "".join(text for text in seen if text != "waits") == "ab"
