"""A session of this node's reader that this node serves: the service's own stream, until it has to move.

Nothing but a count of its tokens is added to its path. The first move, and what refuses it before it began (a
drain, room that it was promised in vain, senders of its model's bytes that are gone, too little KV memory), make a `RoutedStream` of it,
which takes the stream over as it is. A reader that waits for the next chunk gets it first: so the two never read at once.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.ways import Begun
from sllm_node.core.errors import (
    DrainingError,
    GivenBackError,
    PromptTooLongError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    SessionStatus,
    Startup,
)
from sllm_node.schedule.stream import Stream

Routing = Callable[["HomeStream", Begun | SllmError | None], RoutedStream]
"""Makes the routed stream: of one that runs here, or to be placed anew; an error: after it has failed here."""
Wish = Callable[[RoutedStream | None], object]
"""What is to be done with the routed stream; None: there will be none, the session has ended."""

_ELSEWHERE = (PromptTooLongError, RemoteUnreachableError)
"""Before it began here, another node may do better."""


class HomeStream:
    """The chunks of one session; iterate once, and `cancel` if not to the end."""

    def __init__(
        self, stream: Stream, keep_alive_s: float | None, route: Routing,
        on_ended: Callable[["HomeStream"], None],
    ) -> None:  # fmt: skip
        self.keep_alive_s = keep_alive_s
        self.choice: Choice | None = None
        """Why it is here."""
        self.routed: RoutedStream | None = None
        """Who carries it since it moved."""
        self._stream = stream
        self._route = route
        self._on_ended = on_ended
        self._tokens: list[int] = []
        self._cached: int | None = None
        self._is_reading = False
        self._wishes: list[Wish] = []

    @property
    def request(self) -> GenerationRequest:
        """Its request, with the weights that it began with."""
        return replace(self._stream.request, weights=self._stream.weights)

    def as_it_stands(self) -> GenerationRequest:
        """Return its request with the tokens so far."""
        if self.routed is not None:
            return self.routed.as_it_stands()
        request = self.request
        return replace(request, resumed=(*request.resumed, *self._tokens))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self.routed is not None:
            return await self.routed.__anext__()
        self._is_reading = True
        try:
            chunk = await self._stream.__anext__()
        except (DrainingError, GivenBackError, *_ELSEWHERE) as error:
            if self._stream.is_granted:
                self._ended()
                raise
            before = error if isinstance(error, _ELSEWHERE) else None
            return await self._carry(before).__anext__()
        except BaseException as error:
            if isinstance(error, Exception):
                self._ended()
            raise
        finally:
            self._is_reading = False
        self._tokens += chunk.tokens
        self._cached = chunk.cached_tokens
        if chunk.finish is not None:
            self._ended()
        elif self._wishes:
            self._carry(self._begun())
        return chunk

    def cancel(self) -> None:
        """End the session for a reader that went away; a second call does nothing."""
        if self.routed is not None:
            self.routed.cancel()
        else:
            self._stream.cancel()
            self._ended()

    def status(self) -> ModelStatus | None:
        """Return how the model stands while the session waits for it, else None."""
        return self._stream.status() if self.routed is None else self.routed.status()

    def startup(self) -> Startup:
        """Return how it came to run, as far as that is known."""
        if self.routed is not None:
            return self.routed.startup()
        return startup_of(self.choice, self._stream.startup().startup_s)

    def waited_s(self, now: float) -> float:
        """Return how long it has waited for its turn: its age in the queue goes with it."""
        return self.request.waited_s + now - self._stream.opened

    def passed_on(self) -> None:
        """Take note that its client has what it gave so far."""
        if self.routed is not None:
            self.routed.passed_on()

    def session_status(self) -> SessionStatus:
        """Return what `status` shows of the session."""
        return (self.routed or self._stream).session_status()

    @property
    def is_moving(self) -> bool:
        """Whether a move was asked for that has not begun."""
        return bool(self._wishes)

    def when_routed(self, wish: Wish) -> None:
        """Have `wish` come true as soon as a routed stream carries it: now, or with its next chunk."""
        self._wishes.append(wish)
        if not self._is_reading:
            self._carry(self._begun())

    def _begun(self) -> Begun:
        return Begun(self._stream, tuple(self._tokens), self._cached, self.startup())

    def _carry(self, before: Begun | SllmError | None) -> RoutedStream:
        self.routed = routed = self._route(self, before)
        self._tell_wishes()
        return routed

    def _ended(self) -> None:
        self._on_ended(self)
        self._tell_wishes()

    def _tell_wishes(self) -> None:
        wishes, self._wishes = self._wishes, []
        for wish in wishes:
            wish(self.routed)
