"""One generation: its tokens, how much of them is in KV memory, and its state.

WAITING -> RUNNING -> ENDED
   ^          |
   +----------+  preempted: the blocks are given back; what is not found cached is computed again

While steps are under way for it, more is planned than computed, and tokens are coming: their number
is known, their values are not.
"""

from enum import Enum
from typing import Final

from sllm_node.core.types import GenerationRequest, ResumeMode, TokenIds
from sllm_node.engine.adjustments import Adjuster, Adjustments, has_penalties, is_adjusted
from sllm_node.engine.blocks import BlockKey, block_key, root_key


class SessionState(Enum):
    """Where a session is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class SessionEvent(Enum):
    """What moves it on."""

    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    ENDED = "ended"


TRANSITIONS: Final[dict[SessionState, dict[SessionEvent, SessionState]]] = {
    SessionState.WAITING: {
        SessionEvent.ADMITTED: SessionState.RUNNING,
        SessionEvent.ENDED: SessionState.ENDED,
    },
    SessionState.RUNNING: {
        SessionEvent.PREEMPTED: SessionState.WAITING,
        SessionEvent.ENDED: SessionState.ENDED,
    },
    SessionState.ENDED: {},
}


class Session:
    """The engine's side of one `GenerationRequest`."""

    def __init__(
        self, request: GenerationRequest, number: int, default: ResumeMode = "fast"
    ) -> None:
        self.request = request
        self.is_replayed = (request.resume or default) == "replay"
        """Output tokens are only ever computed by decode steps, those that are known too."""
        self.number = number
        """Order of arrival."""
        self.state = SessionState.WAITING
        self.output = list(request.resumed)
        self.is_holding = request.held
        """The last known token is not computed, so that none is drawn; more come from elsewhere."""
        self.computed = 0
        """Tokens whose keys and values are in KV memory."""
        self.planned = 0
        """Those, and the ones that steps under way compute."""
        self.coming = 0
        """Tokens that steps under way draw."""
        self.in_flight = 0
        """Steps under way that work on it: its blocks must stay until the last of them ends."""
        self.table: list[int] = []
        """Blocks, in the order of the tokens, without those that it left behind."""
        self.passed_blocks = 0
        """Blocks left behind: no later token looks at theirs."""
        self.found: int | None = None
        """Tokens that were cached when it was first admitted; None: it was not."""
        self._keys: list[BlockKey] = []
        sampling = request.sampling
        self._adjuster = Adjuster(sampling, request.prompt) if is_adjusted(sampling) else None
        self._needs_values = has_penalties(sampling)

    def happen(self, event: SessionEvent) -> None:
        """Change the state by the table."""
        following = TRANSITIONS[self.state].get(event)
        assert following is not None, f"{event.value} in state {self.state.value}"
        self.state = following

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def room_tokens(self) -> int:
        """Tokens that it may have: prompt and output."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def pending(self) -> int:
        """Tokens that are known or coming and not planned; 1 while it decodes."""
        return self.length + self.coming - self.planned - self.is_holding

    @property
    def is_resting(self) -> bool:
        """Whether it holds and has nothing to compute.

        A replayed one begins with its first output token, so that its prompt is computed as it was.
        """
        return self.is_holding and (self.pending <= 0 or (self.is_replayed and not self.output))

    @property
    def is_ending(self) -> bool:
        """Whether the last token that it may have is coming."""
        return bool(self.coming) and len(self.output) + self.coming >= self.request.max_tokens

    @property
    def is_held(self) -> bool:
        """Whether its next step needs the value of a token that is coming."""
        return bool(self.coming) and self._needs_values and not self.is_ending

    @property
    def due(self) -> int:
        """Tokens that may go into one step: all pending ones, but one of a replay's output."""
        if not self.is_replayed:
            return self.pending
        return min(self.pending, max(1, len(self.request.prompt) - self.planned))

    def origin(self, index: int, block_tokens: int) -> int | None:
        """Return how the values of its block `index` come to be; None: anyhow.

        A block with output tokens of a session that is replayed: by decode steps from this token on.
        """
        prompt = len(self.request.prompt)
        is_output = (index + 1) * block_tokens > prompt
        return prompt if self.is_replayed and is_output else None

    def tokens(self, start: int, count: int) -> TokenIds:
        """Return `count` of its tokens from `start` on."""
        prompt = self.request.prompt
        if start >= len(prompt):
            first = start - len(prompt)
            return tuple(self.output[first : first + count])
        head = prompt[start : start + count]
        return head + tuple(self.output[: count - len(head)])

    def key(self, index: int, block_tokens: int) -> BlockKey:
        """Return the key of its block `index`, all of whose tokens are known."""
        keys = self._keys
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(self.request.cache_salt)
            keys.append(block_key(parent, self.tokens(len(keys) * block_tokens, block_tokens)))
        return keys[index]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were cached when it was first admitted."""
        return min(self.found or 0, len(self.request.prompt))

    def adjustments(self) -> Adjustments | None:
        """Return what changes about the logits of its next token; None: nothing."""
        return None if self._adjuster is None else self._adjuster.after(self.output)

    def sort_key(self) -> tuple[int, int]:
        """Order by priority, then by arrival."""
        return (-self.request.priority, self.number)
