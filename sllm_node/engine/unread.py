"""What one session gave and its reader has not taken: joined when the reader lags."""

import asyncio
from typing import Self

from sllm_node.core.errors import SllmError
from sllm_node.core.types import GenerationChunk


class Unread:
    """The chunks of a session; iterate once. An error comes after what is unread."""

    def __init__(self) -> None:
        self._chunks: list[GenerationChunk] = []
        self._error: SllmError | None = None
        self._is_ended = False
        self._news = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        chunks, self._chunks = self._chunks, []
        return _joined(chunks)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._is_ended

    def add(self, chunk: GenerationChunk) -> None:
        """Keep a chunk for the reader."""
        self._chunks.append(chunk)
        self._news.set()

    def clear(self) -> None:
        """Drop what nobody reads any more."""
        self._chunks.clear()

    def end(self, error: SllmError | None = None) -> None:
        """Give nothing more behind what is unread, but for `error`."""
        self._error = error
        self._is_ended = True
        self._news.set()


def _joined(chunks: list[GenerationChunk]) -> GenerationChunk:
    """Return one chunk that says what `chunks` say, one after another."""
    if len(chunks) == 1:
        return chunks[0]
    return GenerationChunk(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        chunks[-1].finish,
        chunks[-1].stop_text,
        chunks[-1].cached_tokens,
    )
