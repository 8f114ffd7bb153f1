"""One session's way out of the engine: chunks for its reader, joined when the reader lags."""

import asyncio
from collections.abc import Callable
from typing import Self

from sllm_node.core.errors import SllmError
from sllm_node.core.types import FinishReason, GenerationChunk, TokenIds, TokenLogprob
from sllm_node.engine.session import Session
from sllm_node.engine.text import TextState


class Generation:
    """The chunks of a session; iterate once.

    What is not read yet is given as one chunk when its reader comes.
    """

    def __init__(
        self, session: Session, text: TextState, on_cancel: Callable[["Generation"], None]
    ) -> None:
        self.session = session
        self.text = text
        self.last_token_at: float | None = None
        self._on_cancel = on_cancel
        self._unread: list[GenerationChunk] = []
        self._error: SllmError | None = None
        self._is_ended = False
        self._news = asyncio.Event()

    @property
    def tokens(self) -> TokenIds:
        """All output tokens so far, resumed ones included."""
        return tuple(self.session.output)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._is_ended

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        unread, self._unread = self._unread, []
        return _joined(unread)

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if not self._is_ended:
            self._end()
            self._unread.clear()
            self._on_cancel(self)

    # --- for the engine -----------------------------------------------------------------------

    def give(
        self,
        text: str,
        token: int,
        logprob: TokenLogprob | None,
        finish: FinishReason | None,
    ) -> None:
        """Hand over what one token brought."""
        logprobs = () if logprob is None else (logprob,)
        stop_text = self.text.scanner.found if finish == "stop" else None
        self._unread.append(
            GenerationChunk(text, (token,), logprobs, finish, stop_text, self.session.cached_tokens)
        )
        if finish is not None:
            self._end()
        self._news.set()

    def end_at_once(self) -> None:
        """End a session whose resumed tokens are a whole answer already."""
        self._unread.append(GenerationChunk("", (), (), "stop", self.text.scanner.found))
        self._end()

    def fail(self, error: SllmError) -> None:
        """End with an error, after what is unread."""
        if not self._is_ended:
            self._error = error
            self._end()

    def _end(self) -> None:
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
