"""Which sessions step together. Pure.

A step has room for `max_step_tokens` tokens. Sessions that decode come first, one token each, so
that nobody's stream stalls behind a prompt; what is left of the budget goes to prompts, in order of
priority and arrival, long ones in pieces over several steps. Where more sessions decode than wait for
their first token, prompts get no more than `prefill_beside_tokens`, or three tokens for each that decodes
where that is more: a step's time grows with its tokens, and readers wait for it, but a step of many
sessions takes longer anyway, and takes more beside it in the same proportion. `beside` makes that less
where steps were seen to take too long for readers. While readers of other
models wait, `turns` sets a limit too. A waiting session is admitted when
there are blocks for all its tokens and one more; nobody behind it overtakes it, or a long one would
never start. It begins behind the blocks that it finds cached, so that these are not computed again;
one token at least is, because the next is drawn from its logits. When a running session needs a
block and there is none, the youngest of the lowest priority gives its blocks back and waits again;
those that are full stay cached for it, until others take them; or all are copied first, where `offload`
says so, and come back when it is admitted again.

A session that is replayed computes output tokens one a step, those that are known too, so that the
same kernels see them as when they were generated. Of blocks with output tokens it takes only such as
were computed so, behind a prompt of the same length: values that a prefill made would not have the
same last bits.

Where every layer has a window, a session leaves the blocks behind that no later token looks at.

A block can be found by others when the step that fills it has ended, and not before: sessions that
are admitted together compute what they share once each, and share it from then on.

A step can be planned while the one before it is under way. A session that decodes then has a token
coming: its place is planned, its value is the other step's business. Whether the session ends with
that token shows too late; what the planned step computes for it is thrown away. Steps run in order,
each with the tables as they were when it was planned. So tables may change while it is under way:
a block that is let go meanwhile is only written to by a later step. Blocks become known as far as
the tokens in them are part of the session. Who has penalties is planned when its last token is known
and so sits out the step between; where that would be half of the sessions, all wait instead. Nobody
is preempted while a step is under way: without blocks, the next is planned when that one has ended.

A session that holds (it moves here, and another node still decodes) computes all its tokens but the
last, and rests until more come or it is let go.
"""

from bisect import insort
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final

from sllm_node.engine.beside import Beside
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.offload import NoOffload, Offload
from sllm_node.engine.session import Session, SessionEvent, SessionState

_BESIDE_EACH: Final = 3
"""Tokens of prompts for each session that decodes. With 128 sessions that makes 512 tokens a step, the
most for which `mixed` captures graphs; a step of 32 stays at the default of `prefill_beside_tokens`."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a step does for one session: computes `count` tokens from `start` on."""

    session: Session
    start: int
    count: int
    is_last: bool
    """The next token is drawn after it."""
    is_ahead: bool
    """Its token is the one that the step before draws."""


def prompt_tokens(parts: Sequence[Part]) -> int:
    """Return how many tokens of a step are of prompts."""
    return sum(part.count for part in parts if part.count > 1)


def becoming_due(parts: Sequence[Part]) -> int:
    """Return how many sessions wait for one more token when the oldest step under way has ended."""
    sessions = [part.session for part in parts if part.is_last]
    return sum(
        session.state is SessionState.RUNNING
        and len(session.output) + 1 < session.request.max_tokens
        for session in sessions
    )


class Batch:
    """The sessions of one engine."""

    def __init__(
        self,
        blocks: Blocks,
        max_sessions: int,
        max_step_tokens: int,
        window: int | None = None,
        prefill_beside_tokens: int | None = None,
        prefill_beside_ratio: float = 0.0,
    ) -> None:
        """Make one without sessions.

        `prefill_beside_tokens`: of prompts, in a step with few sessions that decode; None: all.
        `prefill_beside_ratio`: as for `Beside`.
        """
        self.blocks = blocks
        self.offload: Offload | NoOffload = NoOffload()
        """What keeps the blocks of preempted sessions. Set before any comes."""
        self.preemptions = 0
        self.asked_tokens = 0
        """Tokens of sessions that were admitted for the first time."""
        self.found_tokens = 0
        """Of these: those that were cached."""
        self._max_sessions = min(max_sessions, max_step_tokens)  # so that all fit into a step
        self._max_step_tokens = max_step_tokens
        self._prefill_beside_tokens = prefill_beside_tokens or max_step_tokens
        self._beside = Beside(self._prefill_beside_tokens, prefill_beside_ratio)
        self._window = window
        self._waiting: list[Session] = []
        self._running: list[Session] = []
        self._under_way = 0
        """Steps that are planned and have not ended."""

    @property
    def waiting(self) -> int:
        """Sessions without blocks."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sessions with blocks."""
        return len(self._running)

    @property
    def is_decoding(self) -> bool:
        """Whether all that is to be computed is one token each of sessions that have their blocks."""
        return all(session.is_resting for session in self._waiting) and all(
            session.due <= 1 for session in self._running
        )

    def sessions(self) -> list[Session]:
        """Return all sessions that have not ended."""
        return [*self._running, *self._waiting]

    def add(self, session: Session) -> None:
        """Take a new session in."""
        assert session.state is SessionState.WAITING
        insort(self._waiting, session, key=Session.sort_key)

    def end(self, session: Session) -> None:
        """Let a session go; its blocks are free at once, or when no step works on them."""
        if session.state is SessionState.ENDED:
            return
        (self._running if session.state is SessionState.RUNNING else self._waiting).remove(session)
        session.happen(SessionEvent.ENDED)
        self.offload.drop(session)
        if not session.in_flight:
            self.blocks.give_back(session.table)

    def plan(self, prompt_tokens: int | None = None) -> list[Part]:
        """Return the next step; empty when there is nothing to do before another one has ended.

        `prompt_tokens`: the most of prompts that others' readers can wait for; None: any number.
        """
        budget = self._max_step_tokens
        most = budget if prompt_tokens is None else prompt_tokens
        counts: dict[Session, int] = {}
        going = [s for s in self._running if not s.is_ending and not s.is_resting]
        ready = [session for session in going if not session.is_held]
        if len(ready) < len(going) and 2 * len(ready) <= len(going):
            return []  # better one step with all of them
        for session in sorted(ready, key=lambda s: (s.due > 1, *s.sort_key())):
            if session.due > 1:
                budget = self._left(budget, counts, most)
            if session.state is SessionState.RUNNING and budget > 0:
                count = min(session.due, budget)
                if self._grow(session, count, counts):
                    counts[session] = count
                    budget -= count
                elif self._under_way:
                    return []
        budget = self._left(budget, counts, most)
        while budget > 0 and (admitted := self._admit()) is not None:
            if not admitted.is_resting:  # it found all of it
                counts[admitted] = min(admitted.due, budget)
                budget -= counts[admitted]
        self._under_way += bool(counts)
        return [_begun(session, count) for session, count in counts.items()]

    def _left(self, budget: int, counts: dict[Session, int], most: int) -> int:
        """Return what is left for prompts, at most `most`, after what is planned for others."""
        decoding = sum(count == 1 for count in counts.values())
        starting = len(self._waiting) + sum(s.due > 1 for s in self._running)
        if decoding > starting:
            usual = max(self._prefill_beside_tokens, _BESIDE_EACH * decoding)
            most = min(most, self._beside.tokens(decoding, usual))
        prompts = sum(count for count in counts.values() if count > 1)
        return max(0, min(budget, most - prompts))

    def stepped(self, parts: list[Part], took_s: float = 0.0) -> None:
        """Take note that the oldest step has ended, before its tokens are added.

        `took_s`: how long it took; 0: that is not known.
        """
        self._under_way -= 1
        if decoding := sum(part.count == 1 for part in parts):
            self._beside.learn(prompt_tokens(parts), decoding, took_s)
        for part in parts:
            session = part.session
            self._landed(part)
            session.computed = part.start + part.count
            restored = self.offload.landed(session)
            self._fill(session, part.start if restored is None else restored)
            if session.state is not SessionState.ENDED:
                self._leave(session)
            elif not session.in_flight:
                self.blocks.give_back(session.table)

    def failed(self, parts: list[Part]) -> None:
        """Take note that a step has ended and may have written anything to its sessions' blocks.

        Its sessions must end. Nothing stays cached or in the pool: who knows what else went wrong.
        """
        self._under_way -= 1
        self.blocks.forget()
        self.offload.close()
        for part in parts:
            session = part.session
            self._landed(part)
            if session.state is SessionState.ENDED and not session.in_flight:
                self.blocks.give_back(session.table)

    def forget(self) -> None:
        """Let no session begin behind what was computed: some of it may be no numbers."""
        self.blocks.forget()
        self.offload.forget()

    def _landed(self, part: Part) -> None:
        part.session.in_flight -= 1
        part.session.coming -= part.is_last

    def _fill(self, session: Session, start: int) -> None:
        """Make the blocks known that are full since a step that began at token `start`."""
        size, passed = self.blocks.block_tokens, session.passed_blocks
        parent = session.key(passed - 1, size) if passed else None
        # A step that was planned ahead may have computed a token too many for a session that ended.
        end = min(session.computed, session.length)
        for index in range(start // size, end // size):
            key, origin = session.key(index, size), session.origin(index, size)
            self.blocks.fill(session.table, index - passed, key, parent, origin)

    def _leave(self, session: Session) -> None:
        """Leave the blocks behind that the window of the next token has passed."""
        if self._window is None:
            return
        passed = (session.computed + 1 - self._window) // self.blocks.block_tokens
        if passed > session.passed_blocks:
            self.blocks.leave(session.table, passed - session.passed_blocks)
            session.passed_blocks = passed

    def _admit(self) -> Session | None:
        session = next((s for s in self._waiting if not s.is_resting), None)
        if session is None or len(self._running) >= self._max_sessions:
            return None
        size = self.blocks.block_tokens
        passed = self.offload.passed_blocks(session)
        found = [] if passed else self._find(session)
        if not self.blocks.begin(session.table, found, session.length + 1 - passed * size):
            return None
        self._waiting.remove(session)
        session.computed = self.offload.restore(session, len(found), size)
        session.planned, session.passed_blocks = session.computed, passed
        if session.found is None:
            session.found = session.computed
            self.asked_tokens += session.length
            self.found_tokens += session.computed
        session.happen(SessionEvent.ADMITTED)
        self._running.append(session)
        return session

    def _find(self, session: Session) -> list[int]:
        """Return the cached blocks that a session can begin behind."""
        size = self.blocks.block_tokens
        full = range((session.length - 1) // size)
        found = self.blocks.find(session.key(index, size) for index in full)
        for index, block in enumerate(found):
            if not self.blocks.is_of(block, session.origin(index, size)):
                return found[:index]
        return found

    def _grow(self, session: Session, count: int, busy: Container[Session]) -> bool:
        """Get the blocks for the next `count` tokens, from others if need be and no step runs."""
        end = session.planned + count - session.passed_blocks * self.blocks.block_tokens
        while not self.blocks.grow(session.table, end):
            if self._under_way:
                return False
            victim = max(
                (s for s in self._running if s not in busy), key=Session.sort_key, default=session
            )
            self._preempt(victim)
            if victim is session:
                return False
        return True

    def _preempt(self, session: Session) -> None:
        self.offload.pause(session, self.blocks.block_tokens)
        self.blocks.give_back(session.table)
        session.computed = session.planned = session.passed_blocks = 0
        session.happen(SessionEvent.PREEMPTED)
        self._running.remove(session)
        insort(self._waiting, session, key=Session.sort_key)
        self.preemptions += 1


def _begun(session: Session, count: int) -> Part:
    """Return the part that takes `count` more tokens, and put it under way."""
    start, length = session.planned, session.length
    end = start + count
    part = Part(session, start, count, end == length + session.coming, start == length)
    session.planned = end
    session.coming += part.is_last
    session.in_flight += 1
    return part
