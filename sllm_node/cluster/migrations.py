"""All sessions of this node's readers, and all that it holds for readers anywhere: the five verbs.

`receive(sender, message, now)`, `to_send()`, `next_timer()`, `on_timer(now)`, `actions()`; besides, what
happens on this node (`begin`, `placed`, `acquired`, `generated` and so on) is told by methods of the
same names as the answers that the actions ask for. An answer that comes late, of a session that
is no more, changes nothing. Where entry and holder are one node, the messages are the same and the shell
brings them straight back.
"""

from collections.abc import Iterable

from sllm_node.cluster.entry import Entry
from sllm_node.cluster.holder import Holder, Task
from sllm_node.cluster.migration import (
    Action,
    Compute,
    EntryState,
    HolderState,
    MigrationLimits,
    Send,
    Told,
)
from sllm_node.cluster.migration_messages import (
    Accepted,
    Attempt,
    Dropped,
    Grant,
    Message,
    Move,
    Moved,
    MoveOutcome,
    Piece,
    Prepare,
    Reason,
    Release,
    Round,
    Standing,
    Tokens,
)
from sllm_node.cluster.proposal import Target
from sllm_node.cluster.session import EntrySession
from sllm_node.core.errors import MoveRefusedError
from sllm_node.core.types import GenerationRequest, ModelId, NodeId, SessionId

_Key = tuple[SessionId, int]


class Migrations:
    """One node's part in all migrations."""

    def __init__(self, me: NodeId, boot: int, limits: MigrationLimits, now: float = 0.0) -> None:
        self._me = me
        self._boot = boot
        self._limits = limits
        self._attempts = 0
        self._is_draining = False
        self._timer = now + limits.resend_s
        self.entries: dict[SessionId, Entry] = {}
        self.holders: dict[_Key, Holder] = {}
        self._sends: list[Send] = []
        self._actions: list[Action] = []

    # --- the five verbs -------------------------------------------------------------------------

    def receive(self, sender: NodeId, message: Message, now: float) -> None:
        """Take a message of `sender`, which the transport vouches for."""
        match message:
            case Prepare():
                self._on_prepare(sender, message, now)
            case Round() | Grant() | Accepted():
                self._to_holder(sender, message, now)
            case Release():
                self._on_release(sender, message)
            case Standing() | Tokens() | Dropped():
                self._to_entry(sender, message, now)
            case Move():
                self._on_move(sender, message, now)
            case Moved():
                self._actions.append(Told(SessionId(message.session), message.outcome))

    def to_send(self) -> tuple[Send, ...]:
        """Return the messages that are due, and count them as sent."""
        sends, self._sends = tuple(self._sends), []
        return sends

    def next_timer(self) -> float:
        """Return when to call `on_timer`."""
        return self._timer

    def on_timer(self, now: float) -> None:
        """Send again what was not answered, and judge silence."""
        if now < self._timer:
            return
        late_s = now - self._timer
        is_pause = late_s > self._limits.resend_s
        self._timer = now + self._limits.resend_s / 2
        machines: list[Entry | Holder] = [*self.entries.values(), *self.holders.values()]
        for machine in machines:
            if is_pause:
                machine.forgive(late_s)
            machine.on_timer(now)
            self._gather(machine)

    def actions(self) -> tuple[Action, ...]:
        """Return what the shell is to do, in order; computations of one model go together, last."""
        actions, self._actions = self._actions, []
        computations: dict[ModelId, Compute] = {}
        others: list[Action] = []
        for action in actions:
            if isinstance(action, Compute):
                before = computations.get(action.model)
                parts = before.parts + action.parts if before else action.parts
                computations[action.model] = Compute(action.model, parts)
            else:
                others.append(action)
        return (*others, *computations.values())

    # --- readers of this node -------------------------------------------------------------------

    def begin(self, request: GenerationRequest, now: float, to: Target | None = None) -> None:
        """Begin a session whose reader is here; `to`: its first owner, else one is sought."""
        assert request.session not in self.entries
        entry = Entry(EntrySession.begin(request), self._limits, now)
        self.entries[request.session] = entry
        if to is None:
            entry.begin()
        else:
            entry.is_seeking = True
            entry.placed(to, now)
        self._gather(entry)

    def move(self, session: SessionId, to: Target | None, reason: str, now: float) -> None:
        """Move a session of a reader here; `to`: none, if placement is to say.

        Raises:
            MoveRefusedError: it can't be moved now.
        """
        entry = self.entries.get(session)
        if entry is None:
            raise MoveRefusedError(session, MoveOutcome.UNKNOWN)
        outcome = entry.seek() if to is None else entry.move(to, reason, now)
        self._gather(entry)
        if outcome not in (MoveOutcome.STARTED, MoveOutcome.SEEKING):
            raise MoveRefusedError(session, outcome)

    def placed(self, session: SessionId, to: Target, now: float) -> None:
        """Answer a `Seek`."""
        if (entry := self.entries.get(session)) is not None:
            entry.placed(to, now)
            self._gather(entry)

    def no_place(self, session: SessionId) -> None:
        """Answer a `Seek` for which there is no node, now or soon."""
        if (entry := self.entries.get(session)) is not None:
            entry.no_place()
            self._gather(entry)

    def cancel(self, session: SessionId) -> None:
        """End a session whose reader went away."""
        if (entry := self.entries.get(session)) is not None:
            entry.cancel()
            self._gather(entry)

    def peer_lost(self, node: NodeId, now: float) -> None:
        """Take membership's news that a node is dead, gone, or began a new life."""
        for entry in tuple(self.entries.values()):
            entry.peer_lost(node, now)
            self._gather(entry)
        for holder in tuple(self.holders.values()):
            if holder.task.entry == node:
                holder.entry_lost()
                self._gather(holder)

    # --- what this node holds -------------------------------------------------------------------

    def acquired(self, session: SessionId, epoch: int, now: float) -> None:
        """Answer an `Acquire`: there is a place, and the model is on its device."""
        if (holder := self.holders.get((session, epoch))) is not None:
            holder.acquired(now)
            self._gather(holder)

    def computed(self, session: SessionId, epoch: int, position: int, now: float) -> None:
        """Answer a part of a `Compute`: all tokens before `position` are computed."""
        if (holder := self.holders.get((session, epoch))) is not None:
            holder.calculated(position, now)
            self._gather(holder)

    def generated(self, session: SessionId, epoch: int, piece: Piece, now: float) -> None:
        """Answer a `Decode`: the next chunk; the last one has `finish`."""
        if (holder := self.holders.get((session, epoch))) is not None:
            holder.generated(piece, now)
            self._gather(holder)

    def failed(self, session: SessionId, epoch: int, reason: Reason) -> None:
        """Answer any of them: it can't be done, or not be gone on with."""
        if (holder := self.holders.get((session, epoch))) is not None:
            holder.failed(reason)
            self._gather(holder)

    def drain(self, now: float, sessions: Iterable[SessionId] | None = None) -> None:
        """Get rid of what this node holds: of `sessions` only, or of everything, and take no more."""
        if sessions is None:
            self._is_draining = True
        chosen = None if sessions is None else frozenset(sessions)
        for holder in tuple(self.holders.values()):
            if chosen is None or holder.task.session in chosen:
                holder.leave(now)
                self._gather(holder)

    # --- inside ---------------------------------------------------------------------------------

    def _on_prepare(self, sender: NodeId, message: Prepare, now: float) -> None:
        session = SessionId(message.session)
        epochs = [epoch for held, epoch in self.holders if held == session]
        if max(epochs, default=0) > message.epoch:
            return
        if (holder := self.holders.get((session, message.epoch))) is not None:
            if holder.task.entry == sender:
                holder.on_prepare(now)
                self._gather(holder)
            return
        self._on_release(sender, Release(session, message.epoch))
        self._attempts += 1
        attempt = Attempt(self._boot, self._attempts)
        reason = self._objection()
        if reason is not None:
            self._send(sender, Dropped(session, message.epoch, attempt, reason))
            return
        holder = Holder(Task.of(sender, message, attempt), self._limits, now)
        self.holders[session, message.epoch] = holder
        self._gather(holder)

    def _objection(self) -> Reason | None:
        if self._is_draining:
            return Reason.DRAINING
        return Reason.MEMORY if len(self.holders) >= self._limits.sessions_max else None

    def _to_holder(self, sender: NodeId, message: Round | Grant | Accepted, now: float) -> None:
        session = SessionId(message.session)
        holder = self.holders.get((session, message.epoch))
        if holder is None or holder.task.attempt != message.attempt:
            unknown = Dropped(session, message.epoch, message.attempt, Reason.UNKNOWN)
            self._send(sender, unknown)
            return
        if holder.task.entry != sender:
            return
        match message:
            case Round():
                holder.on_round(message, now)
            case Grant():
                holder.on_grant(message, now)
            case Accepted():
                holder.on_accepted(message, now)
        self._gather(holder)

    def _on_release(self, sender: NodeId, message: Release) -> None:
        for (session, epoch), holder in tuple(self.holders.items()):
            is_over = session == message.session and epoch <= message.epoch
            if is_over and holder.task.entry == sender:
                holder.release()
                self._gather(holder)

    def _to_entry(self, sender: NodeId, message: Standing | Tokens | Dropped, now: float) -> None:
        entry = self.entries.get(SessionId(message.session))
        if entry is None:
            if not isinstance(message, Dropped):
                self._send(sender, Release(message.session, message.epoch))
            return
        match message:
            case Standing():
                entry.on_standing(sender, message, now)
            case Tokens():
                entry.on_tokens(sender, message, now)
            case Dropped():
                entry.on_dropped(sender, message, now)
        self._gather(entry)

    def _on_move(self, sender: NodeId, message: Move, now: float) -> None:
        entry = self.entries.get(SessionId(message.session))
        outcome = MoveOutcome.UNKNOWN if entry is None else entry.on_move(message, now)
        if entry is not None:
            self._gather(entry)
        self._send(sender, Moved(message.session, message.epoch, outcome))

    def _send(self, to: NodeId, message: Message) -> None:
        self._sends.append(Send(to, message))

    def _gather(self, machine: Entry | Holder) -> None:
        """Take what a machine leaves, and forget it if it has ended."""
        for item in machine.outbox:
            if isinstance(item, Send):
                self._sends.append(item)
            else:
                self._actions.append(item)
        machine.outbox.clear()
        if machine.state is EntryState.ENDED and isinstance(machine, Entry):
            self.entries.pop(machine.id, None)
        elif machine.state is HolderState.ENDED and isinstance(machine, Holder):
            self.holders.pop((machine.task.session, machine.task.epoch), None)
