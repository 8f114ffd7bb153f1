"""Where a session goes on after a node refused or failed: who is asked no more, and for how long it waits."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from sllm_node.checkpoint.cards import PEERS
from sllm_node.cluster.choice import Choice
from sllm_node.cluster.document import decode_state
from sllm_node.cluster.move import Move
from sllm_node.cluster.part import RefusedError
from sllm_node.cluster.ways import Lost, Tools, Ways
from sllm_node.core.errors import (
    CancelledByOperatorError,
    CheckpointFormatError,
    ChecksumError,
    DeviceError,
    EngineError,
    Fault,
    GivenBackError,
    KernelError,
    MessageError,
    ModelNotFoundError,
    NoPlaceError,
    OtherWeightsError,
    PeerDeniedError,
    PeerUnreachableError,
    PromptTooLongError,
    RemoteUnreachableError,
    SessionLostError,
    SllmError,
)
from sllm_node.core.types import GenerationRequest, NodeId

log = logging.getLogger(__name__)

REFUSALS_MAX: Final = 3
"""By one node, without a token since: then it is not asked again for this session, while there are others."""
REFUSED_S: Final = 1.0
"""After so long who was refused everywhere may try again."""
LOOK_S: Final = 1.0
"""After so long a session that waits looks for a node again, whatever it has heard."""
UNREACHABLE: Final = (PeerUnreachableError, PeerDeniedError, MessageError)
"""Whoever fails like this may be there again later."""
UNFIT: Final = (PromptTooLongError, OtherWeightsError)
"""Whoever refuses so is asked no more."""
DAMAGED: Final = (ChecksumError, CheckpointFormatError)
"""Whoever fails like this has bytes that no second try makes good."""
BROKEN: Final = (EngineError, DeviceError, KernelError)
"""What a session may have done itself, and would do wherever it goes."""
BROKEN_MAX: Final = 3
"""Nodes that may fail so in a row, without a token of it between: then no other one is put at risk."""
ABSENT: Final = "the nodes that have it can't be reached"


class Retries:
    """What one session has met with."""

    def __init__(
        self, request: GenerationRequest, stands: Callable[[], GenerationRequest],
        ways: Ways, tools: Tools,
    ) -> None:  # fmt: skip
        """`stands`: returns the request with what there is of its output by now."""
        self.request = request
        self._stands = stands
        self._ways = ways
        self._clock = tools.clock
        self._patience_s, self._silence_s = tools.limits.patience_s, tools.limits.silence_s
        self._excluded: set[NodeId] = set()
        self._unfit: set[NodeId] = set()
        """Where it can never run, whatever comes."""
        self._refusals: Counter[NodeId] = Counter()
        self._broken: set[NodeId] = set()
        """Where it failed as one of `BROKEN` since its last token."""
        self._waits_until: float | None = None
        self._failures = 0
        """Of nodes, since it began."""

    async def place(self, lost: Lost | None, tokens: int) -> Choice:
        """Return where it goes first, or on after `lost`, who has failed it.

        Raises:
            SllmError: as `failed` and `place_again` say.
        """
        error: SllmError = NoPlaceError(self.request.model, ABSENT, self._silence_s)
        if lost is not None:
            error = lost.error
            self.failed(lost.choice, error, tokens)
            if lost.begun is not None:
                self._ways.left(lost.choice, self.request.model, "failed")
        choice = await self.place_again(error, has_tokens=bool(tokens))
        if lost is not None:
            self.goes_on(lost.choice, choice, tokens)
        return choice

    def forget(self) -> None:
        """Take note that tokens come: what was is over, but for the nodes that failed."""
        self._refusals.clear()
        self._broken.clear()
        self._waits_until = None

    def refused(self, choice: Choice, end: RefusedError | GivenBackError) -> NoPlaceError:
        """Learn from a refusal; return what it means if nobody else takes the session."""
        if isinstance(end, GivenBackError):  # by this node, whose own state says what can't be now
            return self._note_refusal(choice, end.reason)
        error = self._note_refusal(choice, end.record.reason)
        try:
            self._ways.learn(decode_state(end.record.document))
        except MessageError:
            self._excluded.add(choice.node)
        return error

    def _note_refusal(self, choice: Choice, reason: str) -> NoPlaceError:
        log.info("placement refused", extra={
            "session": self.request.session, "node": choice.node, "reason": reason,
        })  # fmt: skip
        self._refusals[choice.node] += 1
        if self._refusals[choice.node] >= REFUSALS_MAX:
            self._excluded.add(choice.node)
        return NoPlaceError(self.request.model, reason, REFUSED_S)

    def failed(self, choice: Choice, error: SllmError, tokens: int) -> None:
        """Take note of who failed, or raise the error if nobody else can do better."""
        is_callers = error.fault is Fault.CALLER and not isinstance(error, ModelNotFoundError)
        if isinstance(error, UNFIT):  # what one node can't hold, a larger one may
            self._unfit.add(choice.node)
            self._note_refusal(choice, str(error))
            return
        is_final = is_callers and not tokens  # what one node took, another may refuse
        if is_final or isinstance(error, CancelledByOperatorError):
            raise error
        log.warning("session lost its node", extra={
            "session": self.request.session, "model": self.request.model, "node": choice.node,
            "tokens": tokens, "error": str(error),
        })  # fmt: skip
        self._excluded.add(choice.node)
        if isinstance(error, DAMAGED):
            self._unfit.add(choice.node)
        self._failures += 1
        if isinstance(error, UNREACHABLE):
            self._ways.lost(choice.node, error)
        if isinstance(error, BROKEN):
            self._broken.add(choice.node)
        if len(self._broken) >= BROKEN_MAX:
            problem = f"{BROKEN_MAX} nodes failed in a row; the last word was: {error}"
            raise self._as_lost(problem) if tokens else error

    async def outlast(self, move: Move) -> Choice | None:
        """Wait for a move whose source is lost; return where the session starts sooner, if it does: the move ends.

        None: the move has ended, or was given up as nothing came of it for as long as a session waits.
        """
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._find_sooner(move))
            await asyncio.gather(move.task, return_exceptions=True)
            looking.cancel()
        return None if looking.cancelled() else looking.result()

    async def _find_sooner(self, move: Move) -> Choice | None:
        to, lost_at, looked_at = move.part.choice.node, self._clock.now(), -math.inf
        while move.report.outcome == "moving":
            now = self._clock.now()
            if now - looked_at >= LOOK_S:
                looked_at = now
                found = self._find({*self._excluded, *self._unfit, to})
                startup_s = math.inf if found is None else found.startup_s
                if found and startup_s is not None and startup_s < move.needs_s(self._patience_s):
                    move.stop("failed", f"its source is lost, and node {found.node!r} is sooner")
                    return found
                if min(move.stands_s(), now - lost_at) >= self._patience_s:
                    why = f"its source is lost, and nothing came of it for {self._patience_s:g} s"
                    move.stop("failed", why)
                    self._waits_until = now
                    return None
                if found is None:
                    self._excluded.clear()  # who failed may be there again when it looks next
            await self._ways.changed(LOOK_S)
        return None

    def goes_on(self, before: Choice, after: Choice, tokens: int) -> None:
        """Tell where it goes on, and why there."""
        log.info("session goes on", extra={
            "session": self.request.session, "model": self.request.model, "node": after.node,
            "after": before.node, "way": after.way, "why": after.reason, "tokens": tokens,
        })  # fmt: skip

    async def place_again(self, error: SllmError, *, has_tokens: bool) -> Choice:
        """Return where it goes on; wait for a node if none is left and one may come back.

        Raises:
            SessionLostError: it has tokens, and no node could take it in time.
            SllmError: `error`, as no node can take it.
        """
        while (choice := self._find(self._excluded | self._unfit)) is None:
            error = self._as_absence(error)
            if not (has_tokens or may_pass(error)):
                raise error
            now = self._clock.now()
            if self._waits_until is None:
                self._waits_until = now + self._patience_s
            self._excluded.clear()
            left_s = self._waits_until - now
            if left_s <= 0:
                raise self._as_loss(error) if has_tokens else error
            await self._ways.changed(min(left_s, LOOK_S))  # nobody tells that this node can again
        return choice

    def _find(self, excluded: AbstractSet[NodeId]) -> Choice | None:
        return self._ways.choose(self._stands(), frozenset(excluded))

    def _as_loss(self, error: SllmError) -> SessionLostError:
        """Return what the reader of a session gets that no node went on with."""
        waited = f"no node took it within {self._patience_s:g} s (timing.patience_s)"
        return self._as_lost(f"{waited}; the last word was: {error}")

    def _as_lost(self, problem: str) -> SessionLostError:
        return SessionLostError(self.request.session, self._failures, problem)

    def _as_absence(self, error: SllmError) -> SllmError:
        """Return what it means that no node is left with a model that was there when the session came."""
        model = self.request.model
        if isinstance(error, PromptTooLongError):
            if self._find(self._unfit) is not None:
                return NoPlaceError(model, "the nodes where it fits can't take it now", REFUSED_S)
        elif isinstance(error, ModelNotFoundError) and self._ways.standing(model) is not None:
            return NoPlaceError(model, ABSENT, REFUSED_S)
        return error


def may_pass(error: SllmError) -> bool:
    """Tell whether who waits may do better: a node comes back, or one that can send the model's bytes."""
    if isinstance(error, RemoteUnreachableError):
        return error.remote == PEERS
    return isinstance(error, (*UNREACHABLE, NoPlaceError))
