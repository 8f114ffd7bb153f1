"""A session of this node's reader that this node serves: the service's own stream, until it has to move.

Nothing but a count of its tokens is added to its path. The first move makes a `RoutedStream` of it, which takes
the stream over as it is; so does what goes wrong here and may go right at another node. Before it began that is
a drain, room that it was promised in vain, or too little KV memory, and at any time whatever is no fault of the
caller: a damaged or removed checkpoint, a remote that is down, a failed step. If no other node can have it, its
reader gets the error as from a node without peers. A reader that waits for the next chunk gets it first: so the
two never read at once.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.retries import may_pass
from sllm_node.cluster.ways import Begun, Lost
from sllm_node.core.errors import (
    CancelledByOperatorError,
    DrainingError,
    Fault,
    GivenBackError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueTimeoutError,
    SllmError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelStatus,
    NodeId,
    SessionStatus,
    Startup,
)
from sllm_node.schedule.stream import Stream

Routing = Callable[["HomeStream", Begun | SllmError | None], RoutedStream]
"""Makes the routed stream: of one that runs here, or to be placed anew; an error: after it has failed here.

Raises that error if no other node can have it.
"""
Wish = Callable[[RoutedStream | None], object]
"""What is to be done with the routed stream; None: there will be none, the session has ended."""

_FINAL = (CancelledByOperatorError, QueueTimeoutError)
"""An operator's word, and a wait as long as one may be: no other node is asked."""


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
        except SllmError as error:
            return await self._after(error).__anext__()
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
            self._carry(self.begun())
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
            self._carry(self.begun())

    def begun(self) -> Begun:
        """Return what it is until now."""
        return Begun(self._stream, tuple(self._tokens), self._cached, self.startup())

    def _after(self, error: SllmError) -> RoutedStream:
        """Return who goes on with it after an error here, or raise that."""
        is_placed_anew = isinstance(error, (DrainingError, GivenBackError))
        if is_placed_anew or isinstance(error, PromptTooLongError):
            is_final = self._stream.is_granted
        else:
            is_callers = error.fault is Fault.CALLER and not isinstance(error, ModelNotFoundError)
            is_final = is_callers or isinstance(error, _FINAL)
        try:
            if is_final:
                raise error
            return self._carry(None if is_placed_anew else error)
        except SllmError:
            self._ended()
            raise

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


Onward = tuple[GenerationRequest, Choice | None, Begun | Lost | None]
"""What a routed stream is made of: the request, where it goes first, and what was before."""


def onward(
    home: HomeStream, before: Begun | SllmError | None, me: NodeId,
    choose: Callable[[GenerationRequest, frozenset[NodeId]], Choice | None],
    now: float, *, is_draining: bool,
) -> Onward:  # fmt: skip
    """Return how a session goes on that its node, `me`, has served by itself, or does not take any more.

    Raises:
        SllmError: `before`, as no other node can have it.
    """
    if isinstance(before, Begun):
        return home.request, Choice(me, "here", "it runs here"), before
    request = replace(home.request, waited_s=home.waited_s(now))
    if before is None:
        return request, choose(request, frozenset({me}) if is_draining else frozenset()), None
    begun = home.begun()
    asked = home.as_it_stands() if begun.tokens else replace(request, weights=None)
    if not may_pass(before) and choose(asked, frozenset({me})) is None:
        raise before
    here = Choice(me, "load", "it was to be loaded here")
    return request, None, Lost(here, before, begun if begun.stream.is_granted else None)
