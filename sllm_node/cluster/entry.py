"""The entry's side of one session: who owns it, what has come of it, and its way to another owner.

`cluster/migration.py` has the theory and the table. Every method takes `now` and leaves actions and
messages in `outbox`. What has no meaning in the present state (late, a copy, of an epoch that is
over) changes nothing; whoever sends from an epoch that is over is told to let go.
"""

from typing import Final

from sllm_node.cluster.migration import (
    ENTRY,
    Action,
    End,
    EntryEvent,
    EntryState,
    MigrationLimits,
    MigrationOutcome,
    Seek,
    Send,
    Show,
)
from sllm_node.cluster.migration_messages import (
    TOKENS_MAX,
    Accepted,
    Dropped,
    Grant,
    Message,
    Move,
    MoveOutcome,
    Prepare,
    Reason,
    Release,
    Round,
    Standing,
    Tokens,
)
from sllm_node.cluster.pace import Pace
from sllm_node.cluster.proposal import Owner, Proposal, Target
from sllm_node.cluster.session import EntrySession
from sllm_node.core.errors import SessionLostError, SllmError
from sllm_node.core.types import NodeId

_DECODED: Final = frozenset({EntryState.SERVING, EntryState.PREPARING, EntryState.RESUMING})
"""Somebody owns it and was heard."""
_SHIPPED: Final = frozenset({EntryState.PREPARING, EntryState.RESUMING, EntryState.REVIVING})
"""Somebody is to become the owner."""


class Entry:
    """One session at the node of its reader."""

    def __init__(self, session: EntrySession, limits: MigrationLimits, now: float) -> None:
        self.session = session
        self.id = session.request.session
        self.limits = limits
        self.state = EntryState.ORPHANED
        self.owner: Owner | None = None
        self.proposal: Proposal | None = None
        """Kept after the handover until the first token has come."""
        self.pace = Pace()
        self.last_epoch = 0
        self.recoveries = 0
        self.is_seeking = False
        self.since = now
        """When it lost its last owner, or was begun; or when the handover began."""
        self.last_token_at: float | None = None
        self.outbox: list[Action | Send] = []

    def begin(self) -> None:
        """Ask placement for its first owner."""
        self._seek(frozenset())

    # --- from this node -------------------------------------------------------------------------

    def move(self, target: Target, reason: str, now: float) -> MoveOutcome:
        """Begin to move it to `target`, if it may move now."""
        if self.state is not EntryState.SERVING:
            return MoveOutcome.ALREADY_MOVING
        assert self.owner is not None
        self.is_seeking = False
        if target.node == self.owner.node:
            return MoveOutcome.ALREADY_THERE
        self._happen(EntryEvent.MOVE)
        self._propose(target, reason, now)
        return MoveOutcome.STARTED

    def seek(self) -> MoveOutcome:
        """Ask placement where it could go, if it may move now."""
        if self.state is not EntryState.SERVING:
            return MoveOutcome.ALREADY_MOVING
        assert self.owner is not None
        if not self.is_seeking:
            self._seek(frozenset({self.owner.node}))
        return MoveOutcome.SEEKING

    def placed(self, target: Target, now: float) -> None:
        """Take placement's answer to `Seek`."""
        if self.is_seeking and self.state is EntryState.ORPHANED:
            self.is_seeking = False
            self._happen(EntryEvent.PLACED)
            self._propose(target, "recovery" if self.last_epoch else "begin", now)
        elif self.is_seeking:
            self.move(target, "drain", now)

    def no_place(self) -> None:
        """Take placement's answer that no node can take it."""
        if self.is_seeking and self.state is EntryState.ORPHANED:
            self._give_up("no other node can take it")
        self.is_seeking = False

    def cancel(self) -> None:
        """End it: the reader went away."""
        if self.state is not EntryState.ENDED:
            self._end(EntryEvent.CANCELLED, MigrationOutcome.CANCELLED, None)

    def peer_lost(self, node: NodeId, now: float) -> None:
        """Take the news that a node is dead, or began a new life."""
        if self.state in _SHIPPED and self.proposal and self.proposal.target.node == node:
            self._lose_destination(Reason.SILENT, now)
        if self.owner is not None and self.owner.node == node:
            self._lose_owner(Reason.SILENT, now)

    # --- from holders ---------------------------------------------------------------------------

    def on_standing(self, sender: NodeId, message: Standing, now: float) -> None:
        """Take how far the destination is."""
        proposal = self.proposal
        if self._is_owner(sender, message.epoch):
            assert self.owner is not None
            if message.attempt > self.owner.attempt:
                self._lose_owner(Reason.UNKNOWN, now)
            return
        if (
            self.state not in _SHIPPED
            or proposal is None
            or not proposal.is_at(sender, message.epoch)
        ):
            self._release(sender, message.epoch)
            return
        if proposal.attempt is not None and message.attempt != proposal.attempt:
            if message.attempt > proposal.attempt:
                self._lose_destination(Reason.UNKNOWN, now)
            return
        proposal.hear(message, now)
        if proposal.is_ready:
            self._advance(proposal, now)

    def on_tokens(self, sender: NodeId, message: Tokens, now: float) -> None:
        """Take tokens of the owner, those that are next; nobody else's."""
        if not self._is_owner(sender, message.epoch):
            self._release(sender, message.epoch)
            return
        assert self.owner is not None
        self.owner.heard_at = now
        if self.state is EntryState.HANDOVER:
            self._happen(EntryEvent.CONFIRMED)
        before = self.session.length
        self._take(message)
        if self.session.length > before:
            self._note(self.session.length - before, now)
        if self.session.finish is not None:
            self._end(EntryEvent.FINISHED, MigrationOutcome.FINISHED, None)
        elif message.pieces:
            self._accept(now)

    def on_dropped(self, sender: NodeId, message: Dropped, now: float) -> None:
        """Take the news that an attempt is no more."""
        proposal = self.proposal
        if self._is_owner(sender, message.epoch):
            assert self.owner is not None
            if message.attempt == self.owner.attempt:
                self._lose_owner(message.reason, now)
            return
        if self.state not in _SHIPPED or proposal is None:
            return
        is_known = proposal.attempt in (None, message.attempt)
        if is_known and proposal.is_at(sender, message.epoch):
            self._lose_destination(message.reason, now)

    def on_move(self, message: Move, now: float) -> MoveOutcome:
        """Take a wish to move it; who asks must know the owner's epoch."""
        if self.owner is None or message.epoch != self.owner.epoch:
            return MoveOutcome.NOT_OWNER
        if not message.to:
            return self.seek()
        return self.move(Target(NodeId(message.to)), message.reason, now)

    # --- time -----------------------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """Send again what was not answered, and judge silence."""
        limits = self.limits
        if self.state is EntryState.ORPHANED and now - self.since >= limits.orphan_s:
            self._give_up(f"no node was found within {limits.orphan_s:g} s")
        elif self.state is EntryState.HANDOVER:
            self._watch_handover(now)
        if self.state in _DECODED:
            self._watch_owner(now)
        if self.state in _SHIPPED:
            self._watch_destination(now)

    def forgive(self, late_s: float) -> None:
        """Don't count time in which this node did not run as anybody's silence."""
        self.since += late_s
        for side in (self.owner, self.proposal):
            if side is not None:
                side.heard_at += late_s

    def _watch_owner(self, now: float) -> None:
        assert self.owner is not None
        if now - self.owner.heard_at >= self.limits.lost_s:
            self._lose_owner(Reason.SILENT, now)
        elif now - max(self.owner.heard_at, self.owner.said_at) >= self.limits.resend_s:
            self._accept(now, asks=True)

    def _watch_handover(self, now: float) -> None:
        assert self.owner is not None
        if now - self.since >= self.limits.handover_s:
            self._lose_owner(Reason.SLOW, now)
        elif now - self.owner.said_at >= self.limits.resend_s:
            self._grant(now)

    def _watch_destination(self, now: float) -> None:
        proposal = self.proposal
        assert proposal is not None
        if now - proposal.since >= self.limits.migrate_s:
            self._lose_destination(Reason.SLOW, now)
        elif now - proposal.heard_at >= self.limits.lost_s:
            self._lose_destination(Reason.SILENT, now)
        elif now - max(proposal.heard_at, proposal.said_at) >= self.limits.resend_s:
            if proposal.is_ready:
                self._ship(proposal, now)
            else:
                self._prepare(proposal, now)

    # --- to another owner -----------------------------------------------------------------------

    def _propose(self, target: Target, reason: str, now: float) -> None:
        self.last_epoch += 1
        source = self.owner.node if self.owner else None
        self._report(MigrationOutcome.MOVED, "moved on before its first token")
        self.pace.aim(target.fit, is_replayed=self.session.request.resume == "replay")
        self.proposal = Proposal(target, self.last_epoch, source, reason, now, now, now)
        self._prepare(self.proposal, now)

    def _prepare(self, proposal: Proposal, now: float) -> None:
        proposal.said_at = now
        bare, tokens = self.session.without_tokens(), len(self.session.request.prompt)
        message = Prepare(self.id, proposal.epoch, bare, tokens, proposal.target.reservation)
        self._send(proposal.target.node, message)

    def _advance(self, proposal: Proposal, now: float) -> None:
        """Hand over, or ship the next round, or wait for the one under way."""
        if self.state is EntryState.PREPARING:
            self._happen(EntryEvent.PREPARED)
        if proposal.end_round():
            self.pace.resumed(proposal.rounds[-1], now - proposal.round_at)
        if self._is_due(proposal):
            self._hand_over(proposal, now)
        elif not proposal.round_end:
            proposal.begin_round(self.session.length, now)
            self._ship(proposal, now)
        elif proposal.held < proposal.round_end:
            self._ship(proposal, now)

    def _is_due(self, proposal: Proposal) -> bool:
        """Tell whether the next message is the grant."""
        length = self.session.length
        if length - proposal.held > TOKENS_MAX:
            return False
        if self.state is EntryState.REVIVING:
            return True
        if proposal.round_end:
            return False
        is_spent = len(proposal.rounds) >= self.limits.rounds_max
        return is_spent or self.pace.is_last(length - proposal.computed)

    def _ship(self, proposal: Proposal, now: float) -> None:
        """Send the next tokens of the round; none, if it has them: that asks how far it is."""
        assert proposal.attempt is not None
        proposal.said_at = now
        count = min(TOKENS_MAX, max(0, proposal.round_end - proposal.held))
        tokens = self.session.tokens(proposal.held, count)
        message = Round(self.id, proposal.epoch, proposal.attempt, proposal.held, tokens)
        self._send(proposal.target.node, message)

    def _hand_over(self, proposal: Proposal, now: float) -> None:
        """Make the destination the owner, from this moment on."""
        assert proposal.attempt is not None
        self._happen(EntryEvent.HAND_OVER)
        if self.owner is not None:
            self._release(self.owner.node, self.owner.epoch)
        self.owner = Owner(proposal.target.node, proposal.epoch, proposal.attempt, now, now)
        self.since = now
        proposal.rounds.append(self.session.length - proposal.computed)
        self._grant(now)

    def _grant(self, now: float) -> None:
        owner, proposal = self.owner, self.proposal
        assert owner is not None
        assert proposal is not None
        owner.said_at = now
        tokens = self.session.tokens(proposal.held, TOKENS_MAX)
        message = Grant(self.id, owner.epoch, owner.attempt, proposal.held, tokens)
        self._send(owner.node, message)

    # --- losses and ends ------------------------------------------------------------------------

    def _lose_destination(self, reason: Reason, now: float) -> None:
        proposal = self.proposal
        assert proposal is not None
        self._happen(EntryEvent.DESTINATION_LOST)
        self._release(proposal.target.node, proposal.epoch)
        self._report(MigrationOutcome.FAILED, reason)
        if self.state is EntryState.ORPHANED:
            self._orphan(proposal.target.node, reason, now)

    def _lose_owner(self, reason: Reason, now: float) -> None:
        owner, self.owner = self.owner, None
        assert owner is not None
        self._happen(EntryEvent.OWNER_LOST)
        self._release(owner.node, owner.epoch)
        if self.state is EntryState.ORPHANED:
            self._report(MigrationOutcome.FAILED, reason)
            self._orphan(owner.node, reason, now)
        elif self.proposal is not None and self.proposal.is_ready:
            self._advance(self.proposal, now)

    def _orphan(self, lost: NodeId, reason: str, now: float) -> None:
        self.since = now
        self.recoveries += 1
        if self.recoveries > self.limits.recoveries_max:
            self._give_up(reason)
        else:
            self._seek(frozenset({lost}))

    def _seek(self, excluded: frozenset[NodeId]) -> None:
        self.is_seeking = True
        is_orphan = self.state is EntryState.ORPHANED
        self.outbox.append(Seek(self.id, self.session.continuation(), excluded, is_orphan))

    def _give_up(self, problem: str) -> None:
        lost = SessionLostError(self.id, self.recoveries, problem)
        self._end(EntryEvent.GIVEN_UP, MigrationOutcome.FAILED, lost)

    def _end(self, event: EntryEvent, outcome: MigrationOutcome, error: SllmError | None) -> None:
        is_moving = self.state in _SHIPPED
        self._happen(event)
        if self.owner is not None:
            self._release(self.owner.node, self.owner.epoch)
        if is_moving and self.proposal is not None:
            self._release(self.proposal.target.node, self.proposal.epoch)
        self._report(outcome, event.value)
        self.outbox.append(End(self.id, error))

    def _happen(self, event: EntryEvent) -> None:
        following = ENTRY[self.state].get(event)
        assert following is not None, f"{event.value} in state {self.state.value}"
        self.state = following

    def _is_owner(self, sender: NodeId, epoch: int) -> bool:
        return self.owner is not None and (self.owner.node, self.owner.epoch) == (sender, epoch)

    def _take(self, message: Tokens) -> None:
        position = message.position
        for piece in message.pieces:
            if position == self.session.length and (piece.tokens or piece.finish):
                self.session.take(piece)
                self.outbox.append(Show(self.id, piece))
                if piece.finish is not None:
                    return
            position += len(piece.tokens)

    def _note(self, tokens: int, now: float) -> None:
        """Learn the owner's pace; the first tokens behind a handover complete the migration."""
        elapsed_s = None if self.last_token_at is None else now - self.last_token_at
        self.last_token_at = now
        if self.state is EntryState.SERVING and self.proposal is not None:
            self._report(MigrationOutcome.MOVED, self.proposal.reason, elapsed_s)
        elif elapsed_s is not None:
            self.pace.came(tokens, elapsed_s)

    def _report(self, outcome: MigrationOutcome, reason: str, gap_s: float | None = None) -> None:
        proposal, self.proposal = self.proposal, None
        if proposal is not None:
            self.outbox.append(proposal.report(self.id, outcome, reason, gap_s))

    def _accept(self, now: float, *, asks: bool = False) -> None:
        owner = self.owner
        assert owner is not None
        owner.said_at = now
        message = Accepted(self.id, owner.epoch, owner.attempt, self.session.length, asks)
        self._send(owner.node, message)

    def _release(self, node: NodeId, epoch: int) -> None:
        self._send(node, Release(self.id, epoch))

    def _send(self, to: NodeId, message: Message) -> None:
        self.outbox.append(Send(to, message))
