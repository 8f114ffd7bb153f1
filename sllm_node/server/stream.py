"""Server-sent events: tokens as they come, comments while a model loads, an end in every case.

One task a session reads its stream into a queue of the request, so that choices interleave as they
come; the queue is bounded, and the engine joins chunks for a reader that lags. The reader's
connection is written by one task, which takes all that is queued at once; `connection` drops a reader
that takes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import orjson
from aiohttp import web

from sllm_node.core.errors import SllmError
from sllm_node.core.types import GenerationChunk, ModelStatus
from sllm_node.core.units import format_size
from sllm_node.server.service import Stream

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

Item = tuple[int, GenerationChunk | BaseException | None]
"""Choice, and its next chunk; None: it has ended; an error: it has failed."""
_TICK: Final[Item] = (-1, None)
"""Nothing came for long: a stream may wait again, as its node was lost."""


class EventWriter:
    """Writes events to one client."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    async def data(self, *values: dict[str, Any]) -> None:
        """Write events: all at once, because a write costs more than what makes its bytes."""
        if values:
            await self._response.write(b"".join(b"data: %b\n\n" % orjson.dumps(v) for v in values))

    async def comment(self, text: str) -> None:
        """Write a line that clients skip: it keeps the connection alive."""
        await self._response.write(b": " + text.encode() + b"\n\n")

    async def done(self) -> None:
        """Write OpenAI's end mark."""
        await self._response.write(b"data: [DONE]\n\n")


@asynccontextmanager
async def merged(
    streams: Sequence[Stream], interval_s: float
) -> "AsyncIterator[asyncio.Queue[Item]]":
    """Read all `streams` into one queue; on leaving, cancel what is not at its end."""
    queue: asyncio.Queue[Item] = asyncio.Queue(len(streams))
    tasks = [asyncio.create_task(_read(i, s, queue)) for i, s in enumerate(streams)]
    try:
        with _ticking(queue, interval_s):
            yield queue
    finally:
        for stream in streams:
            stream.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _ticking(queue: "asyncio.Queue[Item]", interval_s: float) -> Iterator[None]:
    """Wake who waits at `queue` now and then: one timer for all waits, as each would cost a token's time."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def tick() -> None:
        if queue.empty():
            queue.put_nowait(_TICK)
        timers[:] = [loop.call_later(interval_s, tick)]

    timers.append(loop.call_later(interval_s, tick))
    try:
        yield
    finally:
        timers[0].cancel()


async def _read(index: int, stream: Stream, queue: "asyncio.Queue[Item]") -> None:
    try:
        while True:
            await queue.put((index, await stream.__anext__()))
    except StopAsyncIteration:
        await queue.put((index, None))
    except SllmError as error:
        await queue.put((index, error))
    except Exception as error:  # noqa: BLE001 - the task's root: raised again by whoever reads the queue
        await queue.put((index, error))


async def items(
    queue: "asyncio.Queue[Item]", streams: Sequence[Stream], interval_s: float
) -> AsyncIterator[list[tuple[int, GenerationChunk]] | ModelStatus]:
    """Yield chunks as they come, until all streams have ended; while one waits, how its model stands.

    Raises:
        SllmError: a stream failed; what came before it was yielded.
    """
    left = len(streams)
    waiting = list(streams)
    while left:
        status = next((s for stream in waiting if (s := stream.status()) is not None), None)
        waiting = [] if status is None else waiting
        first = await (queue.get() if status is None else _get(queue, interval_s))
        if first is None:
            assert status is not None
            yield status
            continue
        chunks: list[tuple[int, GenerationChunk]] = []
        for index, item in _queued(first, queue):
            if index < 0:
                waiting = list(streams)
                continue
            if isinstance(item, BaseException):
                if chunks:
                    yield chunks
                raise item
            if item is None:
                left -= 1
            else:
                chunks.append((index, item))
        if chunks:
            yield chunks


async def _get(queue: "asyncio.Queue[Item]", limit_s: float) -> Item | None:
    """Return what comes next; None: nothing for so long."""
    try:
        async with asyncio.timeout(limit_s):
            return await queue.get()
    except TimeoutError:
        return None


def _queued(first: Item, queue: "asyncio.Queue[Item]") -> list[Item]:
    """Return `first` and all that is there already."""
    found = [first]
    while not queue.empty():
        found.append(queue.get_nowait())
    return found


def progress_text(status: ModelStatus) -> str:
    """Return one line on how far a model is, for a comment."""
    progress = status.progress
    if progress is None:
        return f"{status.model} {status.state.value}, {status.waiting} waiting"
    share = 100 * progress.bytes_done / max(1, progress.bytes_total)
    left = "" if progress.eta_s is None else f", {progress.eta_s:.1f} s left"
    sizes = f"{format_size(progress.bytes_done)} of {format_size(progress.bytes_total)}"
    return f"{status.model} loading from {progress.source.value}: {share:.0f} %, {sizes}{left}"
