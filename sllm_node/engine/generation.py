"""One session's way out of the engine: chunks for its reader, joined when the reader lags.

One that holds gives no chunks: tokens of another node are added (`extend`), until it is let go.
"""

import asyncio
from collections.abc import Callable
from typing import Self

from sllm_node.core.errors import PromptTooLongError, SllmError
from sllm_node.core.types import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    TokenIds,
    TokenLogprob,
)
from sllm_node.engine.sampling import Drawn
from sllm_node.engine.session import Session, SessionState
from sllm_node.engine.text import TextState
from sllm_node.engine.unread import Unread


class Generation:
    """The chunks of a session; iterate once.

    What is not read yet is given as one chunk when its reader comes.
    """

    def __init__(
        self,
        session: Session,
        text: TextState,
        on_cancel: Callable[["Generation"], None],
        on_work: Callable[[], None] = lambda: None,
    ) -> None:
        self.session = session
        self.text = text
        self.last_token_at: float | None = None
        self._on_cancel = on_cancel
        self._on_work = on_work
        self._held_at = -1
        """Output tokens that all before the last of are computed of, while it holds."""
        self._looked = asyncio.Event()
        self._unread = Unread()

    @property
    def tokens(self) -> TokenIds:
        """All output tokens so far, resumed ones included."""
        return tuple(self.session.output)

    @property
    def due_since(self) -> float | None:
        """When it had its last token, if its next one is due; None: it computes tokens known before."""
        session = self.session
        is_decoding = session.state is SessionState.RUNNING and session.due <= 1
        return self.last_token_at if is_decoding and not session.is_resting else None

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._unread.is_ended

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        return await anext(self._unread)

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if not self.is_ended:
            self._end()
            self._unread.clear()
            self._on_cancel(self)

    # --- while it holds -----------------------------------------------------------------------

    async def standing(self, told: int) -> int | None:
        """Wait until more output tokens than `told` are computed, but for the last; return how many.

        None: it does not hold any more.
        """
        while self.session.is_holding and not self.is_ended:
            if self._held_at > told:
                return self._held_at
            self._looked.clear()
            await self._looked.wait()
        return None

    def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Take output tokens from `position` on that were generated elsewhere; known ones change nothing.

        `lets_go`: go on behind them.
        """
        session = self.session
        if not session.is_holding or self.is_ended:
            return
        assert position <= len(session.output)
        for token in tokens[len(session.output) - position :]:
            session.output.append(token)
            self.text.add(token)
        if len(session.output) >= session.request.max_tokens:  # more than fits here
            self._end_full(lets_go=lets_go)
            return
        session.is_holding = not lets_go
        self._looked.set()
        self._on_work()

    def _end_full(self, *, lets_go: bool) -> None:
        """End a session that has no room for one more token: who has it goes on with it, unless this one has."""
        if lets_go:
            self.end_at_once("length")
        else:
            known, room = self.session.length, self.session.room_tokens
            self._end(
                PromptTooLongError(known + 1, room, "the node that it moves to", param="prompt")
            )
        self._on_cancel(self)

    def look(self) -> None:
        """See how far it is, after a step or new tokens."""
        session = self.session
        is_done = session.computed >= session.length - 1 or (
            session.is_resting and not session.output
        )
        if session.is_holding and is_done and self._held_at < len(session.output):
            self._held_at = len(session.output)
            self._looked.set()

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
        self._unread.add(
            GenerationChunk(text, (token,), logprobs, finish, stop_text, self.session.cached_tokens)
        )
        if finish is not None:
            self._end()

    def end_at_once(self, finish: FinishReason = "stop") -> None:
        """End a session whose resumed tokens are a whole answer already."""
        text = self.text.flush() if finish == "length" else ""
        stop_text = self.text.scanner.found
        self._unread.add(GenerationChunk(text, (), (), "stop" if stop_text else finish, stop_text))
        self._end()

    def fail(self, error: SllmError) -> None:
        """End with an error, after what is unread."""
        if not self.is_ended:
            self._end(error)

    def _end(self, error: SllmError | None = None) -> None:
        self._unread.end(error)
        self._looked.set()


def finish_of(generation: Generation, context_tokens: int, *, is_eos: bool) -> FinishReason | None:
    """Return why a session ends with its last token; None: it goes on."""
    session = generation.session
    if is_eos or generation.text.scanner.found is not None:
        return "stop"
    is_full = session.length >= context_tokens
    if is_full or len(session.output) >= session.request.max_tokens:
        return "length"
    return None


def logprob_of(
    request: GenerationRequest, drawn: Drawn, offset: int, name: Callable[[int], str]
) -> TokenLogprob | None:
    """Return what `request` wants to know of a token, named by `name`; None: nothing."""
    if request.logprobs is None:
        return None
    top = tuple((token, name(token), value) for token, value in drawn.top)
    return TokenLogprob(drawn.token, name(drawn.token), drawn.logprob, top, offset)
