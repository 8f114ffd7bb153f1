"""A node's side of somebody's session in one epoch: destination until the grant, source from then on.

`cluster/migration.py` has the theory and the table. Actions and messages are left in `outbox`. All
that a holder has on its node hangs on one `Acquire`, and `Free` gives all of it back, exactly once,
however it ends.
"""

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

from sllm_node.cluster.migration import (
    DESTINATION,
    HOLDER,
    Acquire,
    Action,
    Compute,
    ComputePart,
    Decode,
    Free,
    HolderEvent,
    HolderState,
    MigrationLimits,
    Send,
)
from sllm_node.cluster.migration_messages import (
    PIECES_MAX,
    Accepted,
    Attempt,
    Dropped,
    Grant,
    Message,
    Move,
    Piece,
    Prepare,
    Reason,
    Round,
    Standing,
    Tokens,
)
from sllm_node.core.types import GenerationRequest, NodeId, SessionId


@dataclass(frozen=True, slots=True)
class Task:
    """What a holder is there for."""

    entry: NodeId
    session: SessionId
    epoch: int
    attempt: Attempt
    request: GenerationRequest
    """Without tokens."""
    prompt_tokens: int
    reservation: str

    @classmethod
    def of(cls, entry: NodeId, message: Prepare, attempt: Attempt) -> "Task":
        """Return what the entry asks for."""
        return cls(
            entry, SessionId(message.session), message.epoch, attempt, message.request,
            message.prompt_tokens, message.reservation,
        )  # fmt: skip


class Holder:
    """A session here, in one epoch."""

    def __init__(self, task: Task, limits: MigrationLimits, now: float) -> None:
        self.task = task
        self.limits = limits
        self.state = HolderState.PREPARING
        self.tokens: list[int] = []
        """Held ones, as the entry sent them; dropped once it decodes."""
        self.computed = 0
        self.sent_from = 0
        """Position of the first piece that is not known to be taken."""
        self.unsent: deque[Piece] = deque()
        """Pieces from there on."""
        self.is_leaving = False
        """The node drains: the entry is asked to move it."""
        self.heard_at = now
        self.said_at = now
        """When the entry was last told how far the destination is, or asked to move the session."""
        self.waits_since = now
        """When the oldest unsent piece was sent last, or became the oldest."""
        self.outbox: list[Action | Send] = [
            Acquire(task.session, task.epoch, task.request, task.prompt_tokens, task.reservation)
        ]

    # --- from the entry -------------------------------------------------------------------------

    def on_prepare(self, now: float) -> None:
        """Take a copy of the message that began it."""
        self.heard_at = now
        if self.state in DESTINATION:
            self._stand(now)

    def on_round(self, message: Round, now: float) -> None:
        """Take tokens to compute."""
        self.heard_at = now
        if self.state in DESTINATION:
            self._hold(message)
            self._compute()
            self._stand(now)

    def on_grant(self, message: Grant, now: float) -> None:
        """Own the session, and go on with it; a copy is answered by what came since."""
        self.heard_at = now
        is_ready = self.state in (HolderState.HOLDING, HolderState.RESUMING)
        if is_ready and message.position <= len(self.tokens):
            self._hold(message)
            self._happen(HolderEvent.GRANTED)
            self.sent_from = len(self.tokens)
            self.outbox.append(Decode(self.task.session, self.task.epoch, self._request()))
            self.tokens.clear()
        if self.state in (HolderState.DECODING, HolderState.FINISHED):
            self._send_tokens(now)

    def on_accepted(self, message: Accepted, now: float) -> None:
        """Forget what the entry has taken."""
        self.heard_at = now
        before = self.sent_from
        while self.unsent and self.unsent[0].finish is None:
            end = self.sent_from + len(self.unsent[0].tokens)
            if end > message.position:
                break
            self.sent_from = end
            self.unsent.popleft()
        if self.sent_from > before:
            self.waits_since = now
        if message.asks and self.state in (HolderState.DECODING, HolderState.FINISHED):
            self._send_tokens(now)

    def release(self) -> None:
        """End it: the entry says that the epoch is over."""
        self._end(HolderEvent.RELEASED)

    def entry_lost(self) -> None:
        """End it: there is nobody to generate for."""
        self._end(HolderEvent.ENTRY_LOST)

    # --- from this node -------------------------------------------------------------------------

    def acquired(self, now: float) -> None:
        """Take the news that there is a place, and the model is ready."""
        if self.state is HolderState.PREPARING:
            self._happen(HolderEvent.ACQUIRED)
            self._stand(now)

    def calculated(self, position: int, now: float) -> None:
        """Take the news that all tokens before `position` are computed."""
        if self.state is HolderState.RESUMING:
            self._happen(HolderEvent.COMPUTED)
            self.computed = max(self.computed, position)
            self._compute()
            self._stand(now)

    def generated(self, piece: Piece, now: float) -> None:
        """Pass on what the engine made; the last piece has `finish`."""
        if self.state is not HolderState.DECODING:
            return
        if not self.unsent:
            self.waits_since = now
        self.unsent.append(piece)
        if piece.finish is not None:
            self._happen(HolderEvent.FINISHED)
            self._free()
        position = self.sent_from + sum(len(p.tokens) for p in self.unsent) - len(piece.tokens)
        self._tell(Tokens(self.task.session, self.task.epoch, position, (piece,)))

    def failed(self, reason: Reason) -> None:
        """End it and tell the entry why; what is finished stays until the entry has it."""
        if HolderEvent.FAILED in HOLDER[self.state]:
            task = self.task
            dropped = Dropped(task.session, task.epoch, task.attempt, reason)
            self._tell(dropped)
            self._end(HolderEvent.FAILED)

    def leave(self, now: float) -> None:
        """Get rid of it, as the node drains: refuse what has not begun, ask to move what runs."""
        if self.state in DESTINATION:
            self.failed(Reason.DRAINING)
        elif self.state is HolderState.DECODING and not self.is_leaving:
            self.is_leaving = True
            self._ask_to_leave(now)

    def on_timer(self, now: float) -> None:
        """Send again what was not answered; give up if the entry is silent for too long."""
        if now - self.heard_at >= self.limits.lost_s:
            self.entry_lost()
            return
        is_due = now - self.said_at >= self.limits.resend_s
        if is_due and self.state in DESTINATION:
            self._stand(now)
        if is_due and self.is_leaving and self.state is HolderState.DECODING:
            self._ask_to_leave(now)
        if self.unsent and now - self.waits_since >= self.limits.resend_s:
            self._send_tokens(now)

    def forgive(self, late_s: float) -> None:
        """Don't count time in which this node did not run as the entry's silence."""
        self.heard_at += late_s

    # --- inside ---------------------------------------------------------------------------------

    def _happen(self, event: HolderEvent) -> None:
        following = HOLDER[self.state].get(event)
        assert following is not None, f"{event.value} in state {self.state.value}"
        self.state = following

    def _hold(self, message: Round | Grant) -> None:
        if message.position <= len(self.tokens):
            self.tokens += message.tokens[len(self.tokens) - message.position :]

    def _compute(self) -> None:
        if self.state is HolderState.HOLDING and len(self.tokens) > self.computed:
            self._happen(HolderEvent.ROUND)
            part = ComputePart(
                self.task.session, self.task.epoch, self._request(), start=self.computed
            )
            self.outbox.append(Compute(self.task.request.model, (part,)))

    def _request(self) -> GenerationRequest:
        count = self.task.prompt_tokens
        prompt, resumed = self.tokens[:count], self.tokens[count:]
        return replace(self.task.request, prompt=tuple(prompt), resumed=tuple(resumed))

    def _stand(self, now: float) -> None:
        task = self.task
        is_ready = self.state is not HolderState.PREPARING
        held = len(self.tokens)
        standing = Standing(task.session, task.epoch, task.attempt, is_ready, held, self.computed)
        self.said_at = now
        self._tell(standing)

    def _send_tokens(self, now: float) -> None:
        self.waits_since = now
        pieces = tuple(islice(self.unsent, PIECES_MAX))
        self._tell(Tokens(self.task.session, self.task.epoch, self.sent_from, pieces))

    def _ask_to_leave(self, now: float) -> None:
        self.said_at = now
        self._tell(Move(self.task.session, self.task.epoch, reason="drain"))

    def _tell(self, message: Message) -> None:
        self.outbox.append(Send(self.task.entry, message))

    def _end(self, event: HolderEvent) -> None:
        has_place = self.state is not HolderState.FINISHED
        self._happen(event)
        if has_place:
            self._free()

    def _free(self) -> None:
        self.outbox.append(Free(self.task.session, self.task.epoch))
