"""Where a session goes on after a node refused or failed: who is asked no more, and for how long it waits."""

import logging
from typing import Final

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.document import decode_state
from sllm_node.cluster.ways import Tools, Ways
from sllm_node.cluster.wire import Refusal
from sllm_node.core.errors import (
    CancelledByOperatorError,
    Fault,
    MessageError,
    ModelNotFoundError,
    NoPlaceError,
    NotVacatedError,
    PeerDeniedError,
    PeerUnreachableError,
    SllmError,
)
from sllm_node.core.types import GenerationRequest, NodeId

log = logging.getLogger(__name__)

REFUSALS_MAX: Final = 3
"""By one node in a row: then it is not asked again for this session."""
LOOK_S: Final = 1.0
"""After so long a session that waits looks for a node again, whatever it has heard."""
UNREACHABLE: Final = (PeerUnreachableError, PeerDeniedError, MessageError)
"""Whoever fails like this may be there again later."""


class RefusedError(Exception):
    """A node took no session, and told its state."""

    def __init__(self, record: Refusal) -> None:
        super().__init__(record.reason)
        self.record = record


class Retries:
    """What one session has met with."""

    def __init__(self, request: GenerationRequest, ways: Ways, tools: Tools) -> None:
        self._request = request
        self._ways = ways
        self._clock = tools.clock
        self._patience_s = tools.limits.patience_s
        self._excluded: set[NodeId] = set()
        self._refusals = 0
        self._waits_until: float | None = None

    def forget(self) -> None:
        """Take note that tokens come: what was is over, but for the nodes that failed."""
        self._refusals, self._waits_until = 0, None

    def refused(self, choice: Choice, record: Refusal) -> None:
        """Learn from a refusal."""
        self._refusals += 1
        log.info("placement refused", extra={
            "session": self._request.session, "node": choice.node, "reason": record.reason,
        })  # fmt: skip
        if self._refusals >= REFUSALS_MAX:
            self._excluded.add(choice.node)
        try:
            self._ways.learn(decode_state(record.document))
        except MessageError:
            self._excluded.add(choice.node)

    def failed(self, choice: Choice, error: SllmError, tokens: int) -> None:
        """Take note of who failed, or raise the error if nobody else can do better."""
        if isinstance(error, NotVacatedError):  # this node's own state says what can't be now
            self._refusals += 1
            if self._refusals >= REFUSALS_MAX:
                self._excluded.add(choice.node)
            return
        is_callers = error.fault is Fault.CALLER and not isinstance(error, ModelNotFoundError)
        is_final = is_callers and not tokens  # what one node took, a smaller one may refuse
        if is_final or isinstance(error, CancelledByOperatorError):
            raise error
        log.warning("session lost its node", extra={
            "session": self._request.session, "model": self._request.model, "node": choice.node,
            "tokens": tokens, "error": str(error),
        })  # fmt: skip
        self._excluded.add(choice.node)
        if isinstance(error, UNREACHABLE):
            self._ways.lost(choice.node, error)

    async def place_again(self, error: SllmError, *, has_tokens: bool) -> Choice:
        """Return where it goes on; wait for a node if none is left and one may come back.

        Raises:
            SllmError: `error`, as no node can take it.
        """
        while (choice := self._ways.choose(self._request, frozenset(self._excluded))) is None:
            if not (has_tokens or isinstance(error, (*UNREACHABLE, NoPlaceError))):
                raise error
            now = self._clock.now()
            if self._waits_until is None:
                self._waits_until = now + self._patience_s
            self._excluded.clear()
            left_s = self._waits_until - now
            if left_s <= 0:
                raise error
            await self._ways.changed(min(left_s, LOOK_S))  # nobody tells that this node can again
        return choice
