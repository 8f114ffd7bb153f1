"""What the HTTP edge asks of the node behind it; `schedule.driver.Service` satisfies it by shape."""

from collections.abc import Sequence
from typing import Any, Protocol

from sllm_node.cluster.records import Desired, Registration
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    SessionStatus,
    Startup,
    TokenIds,
)


class TextCodec(Protocol):
    """A model's tokenizer and chat template. Called from worker threads."""

    @property
    def vocabulary_size(self) -> int: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> TokenIds:
        """Return the tokens of `text`.

        Raises:
            PromptTooLongError: it is so long that they must be more than `limit`.
        """

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, limit: int | None = None
    ) -> TokenIds:
        """Return the tokens of the conversation, up to where the assistant speaks.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
            PromptTooLongError: it is so long that they must be more than `limit`.
        """

    def decode(self, tokens: TokenIds, *, with_special: bool = False) -> str:
        """Return the text of `tokens`, special ones left out unless they are asked for."""


class Stream(Protocol):
    """The chunks of one session; iterate once, and `cancel` if not to the end."""

    async def __anext__(self) -> GenerationChunk: ...

    def cancel(self) -> None:
        """End the session; a second call does nothing."""

    def status(self) -> ModelStatus | None:
        """Return how the model stands while the session waits for it, else None."""

    def startup(self) -> Startup:
        """Return how it came to run, as far as that is known."""

    def passed_on(self) -> None:
        """Take note that all that it gave so far was written to its client."""


class Wishes(Protocol):
    """What operators wish for, and what holds of it; `cluster.wishes.Wishes` satisfies it.

    Wishing returns the peers that do not know of it yet.
    """

    def resolve(self, name: str) -> str:
        """Return the model that clients mean by `name`."""

    def aliases(self) -> dict[str, str]:
        """Return the model behind each alias that counts."""

    def hidden(self) -> dict[str, str]:
        """Return the model behind each alias that does not count, as a model is called so."""

    def desired(self) -> tuple[Desired, ...]: ...

    async def set_alias(self, name: str, model: str) -> list[str]: ...

    async def drop_alias(self, name: str) -> list[str]: ...

    async def register(self, registration: Registration) -> None: ...

    async def unregister(self, model: str) -> None: ...

    async def scale(self, desired: Desired) -> list[str]: ...

    async def unscale(self, model: str) -> list[str]: ...


class GenerationService(Protocol):
    """The node."""

    @property
    def is_draining(self) -> bool: ...

    def expect(self, model: str, characters: int) -> None:
        """Take note of a request whose text becomes tokens now; its model's load may begin meanwhile."""

    async def prepare(self, model: str) -> TextCodec:
        """Return the codec of `model`.

        Raises:
            ModelNotFoundError: there is no such checkpoint.
        """

    def context_limit(self, model: str) -> int:
        """Return how many tokens, prompt and output, one session can have here."""

    @property
    def session_limit(self) -> int:
        """How many sessions of a model are taken at once if nobody else has any."""

    def check_room(self, model: str, sessions: int) -> None:
        """Refuse so many sessions of `model` that there is surely no room for all of them.

        Raises:
            NodeFullError: before any is opened.
        """

    def open(self, request: GenerationRequest, *, keep_alive_s: float | None = None) -> Stream:
        """Take a request, or raise why it is refused."""

    def models(self) -> list[ModelStatus]: ...

    def status(self, model: str) -> ModelStatus: ...

    def sessions(self) -> list[SessionStatus]: ...

    def cancel_request(self, request_id: str) -> int:
        """End the sessions of a request, by its id or its client's own; return how many there were."""

    def move(self, session: str, to: str) -> dict[str, str]:
        """Begin to move a session to the node `to`; tell the move's id.

        Raises:
            MoveRefusedError: it can't be moved.
        """

    async def load(self, model: str) -> None: ...

    async def unload(self, model: str, *, force: bool = False) -> None: ...

    async def pin(self, model: str) -> None: ...

    async def unpin(self, model: str) -> None: ...

    def drain(self) -> None: ...

    def undrain(self) -> None:
        """Take a drain back.

        Raises:
            StoppingError: the node stops.
        """
