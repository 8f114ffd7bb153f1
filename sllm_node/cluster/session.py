"""What the node with the reader keeps of a session: all that another node needs to go on with it.

A session is its request and its output tokens, nothing else. Random numbers follow from (seed, token
index), penalties, detokeniser and stop strings from the tokens; so `continuation` is a whole session,
and the next owner's text goes on with the very character, and its stop strings with the very letter,
at which the last one's stopped. The choices of one request (`n` > 1) are separate sessions.
"""

from dataclasses import dataclass, field, replace

from sllm_node.cluster.migration_messages import Piece
from sllm_node.core.types import FinishReason, GenerationRequest, TokenIds


@dataclass(slots=True)
class EntrySession:
    """A session as its entry has it; it is only ever extended."""

    request: GenerationRequest
    """As the client asked, with the output that it came with."""
    output: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    """Of the prompt, that its first owner's prefix cache had."""

    @classmethod
    def begin(cls, request: GenerationRequest) -> "EntrySession":
        """Return a session with what is known of its output."""
        return cls(request, list(request.resumed))

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, for usage: each once, whoever generated it."""
        return len(self.output)

    def tokens(self, start: int, count: int) -> TokenIds:
        """Return `count` of its tokens from `start` on, or as many as there are."""
        prompt = self.request.prompt
        first = max(0, start - len(prompt))
        head = prompt[start : start + count]
        return head + tuple(self.output[first : first + count - len(head)])

    def take(self, piece: Piece) -> None:
        """Extend it."""
        assert self.finish is None, "the last piece has come"
        if len(self.output) == len(self.request.resumed):
            self.cached_tokens = piece.cached_tokens
        self.output += piece.tokens
        self.finish = piece.finish

    def continuation(self) -> GenerationRequest:
        """Return the request with which another node goes on."""
        return replace(self.request, resumed=tuple(self.output))

    def without_tokens(self) -> GenerationRequest:
        """Return the request as it is told before the tokens are."""
        return replace(self.request, prompt=(), resumed=())
