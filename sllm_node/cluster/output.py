"""The output of one session: its tokens, and when they came to its entry and went to its client. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from sllm_node.core.types import GenerationChunk


class Output:
    """All tokens so far, resumed tokens of the request not included."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._cached: int | None = None
        self._last_at: float | None = None
        """When its last token came."""
        self._held_since: float | None = None
        """When the first token came that its client does not have."""

    def begin_with(self, tokens: Sequence[int], cached: int | None, now: float) -> None:
        """Take what was given before anybody looked here; its client has it."""
        self.tokens += tokens
        self._cached = cached
        self._last_at = now if tokens else None

    def gap_s(self, now: float) -> float | None:
        """Return how long ago its last token came; None: there was none."""
        return None if self._last_at is None else now - self._last_at

    def take(self, chunk: GenerationChunk, now: float) -> GenerationChunk:
        """Take a chunk; return it as its client is to see it."""
        if self._cached is None:
            self._cached = chunk.cached_tokens
        self.tokens += chunk.tokens
        self._last_at = now
        self._held_since = now if self._held_since is None else self._held_since
        # What a resumed part found cached is of its own making: a prompt counts as it was first met.
        return replace(chunk, cached_tokens=self._cached)

    def passed_on(self, now: float, *, is_all: bool) -> float | None:
        """Take note that its client has it, all or but for the last; return for how long it was held."""
        if self._held_since is None:
            return None
        held_s = now - self._held_since
        self._held_since = None if is_all else self._last_at
        return held_s
