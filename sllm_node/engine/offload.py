"""What of preempted sessions goes to the pinned pool, and comes back. Pure.

A session that is preempted gives its blocks back, and computes again what others have taken of them
until it is admitted again. Or its blocks are copied to chunks of the pinned pool before (`pause`),
and those that it does not find cached then come back (`restore`). Which of the two is a matter of time: so
many bytes out and back by what copies take, against so many tokens by what steps take (`is_faster`).
Without a measurement of either, it is tried. A model whose copies turned out slow is tried again now and then:
each time it computes instead, a copy is thought to take a little less.

Transfers are carried out before the step that was planned with them, those to the pool first (none reads what one
back writes: a session that comes back is not preempted before its step has ended), then those back, each in the order
in which they were decided; so what they read is there still, and what they write is there in time. A loan of chunks is given back
when nothing works on it any more: after the step behind the copy back; or when the session ends or
memory is forgotten, and a copy under way has ended.

A session that holds is never laid aside: it may have nothing to compute when it is back.

While a first copy works on a loan nothing else is decided about it: decisions are made between the jobs
that carry them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from sllm_node.engine.session import Session

_WEIGHT: Final = 0.5
"""Of the newest measurement in what is known."""
_DECLINED: Final = 0.95
"""What a copy is thought to take after one more that was not made, of what it was before."""
_LAUNCH_S: Final = 1e-4
"""A shorter step computed nothing: it was read when it had ended."""


class Loan(Protocol):
    """Chunks of the pinned pool, lent until they are given back."""

    @property
    def views(self) -> Sequence[memoryview]:
        """Each chunk's bytes, writable."""

    def close(self) -> None:
        """Give them back; a second call does nothing."""


class Pool(Protocol):
    """Who lends; the store satisfies it."""

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk."""

    def lend(self, count: int) -> Loan | None:
        """Lend so many chunks; None: there are not so many."""


class Room:
    """The chunks that all engines of a node may have together."""

    def __init__(self, pool: Pool, limit: int) -> None:
        """`limit`: in bytes."""
        self._pool = pool
        self._limit = limit // pool.chunk_bytes
        self.chunk_bytes = pool.chunk_bytes
        self.lent = 0
        """Chunks that are lent."""

    def lend(self, count: int) -> Loan | None:
        """Return a loan of `count` chunks, or None."""
        if self.lent + count > self._limit or (loan := self._pool.lend(count)) is None:
            return None
        self.lent += count
        return _Counted(self, loan)


class _Counted:
    """A loan that the room counts."""

    def __init__(self, room: Room, loan: Loan) -> None:
        self._room = room
        self._loan = loan
        self.views = loan.views

    def close(self) -> None:
        """Give it back, once."""
        if self.views:
            self._room.lent -= len(self.views)
            self.views = ()
            self._loan.close()


@dataclass(slots=True)
class Rates:
    """What steps and copies of one model take; 0: not known yet."""

    step_s: float = 0.0
    """A step without prompts."""
    token_s: float = 0.0
    """Each token of prompts adds."""
    byte_s: float = 0.0
    """Each byte that is copied."""

    def stepped(self, prompt_tokens: int, took_s: float) -> None:
        """Take note of a step."""
        if took_s < _LAUNCH_S:
            return
        if not prompt_tokens:
            self.step_s = _learned(self.step_s, took_s)
        elif took_s > self.step_s:
            self.token_s = _learned(self.token_s, (took_s - self.step_s) / prompt_tokens)

    def copied(self, size: int, took_s: float) -> None:
        """Take note of copies of `size` bytes."""
        self.byte_s = _learned(self.byte_s, took_s / size)

    def declined(self) -> None:
        """Take note that a copy was not made because it takes too long."""
        self.byte_s *= _DECLINED


def _learned(known: float, found: float) -> float:
    return known + _WEIGHT * (found - known) if known else found


def is_faster(rates: Rates, size: int, prompt_tokens: int, steps: int) -> bool:
    """Tell whether copying `size` bytes in all takes less than computing them again.

    That is as so many tokens of a prompt, and so many steps one after another. What is not known counts
    for the copy.
    """
    if (prompt_tokens and not rates.token_s) or (steps and not rates.step_s):
        return True
    return size * rates.byte_s < prompt_tokens * rates.token_s + steps * rates.step_s


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks of a session on their way to a loan, or back."""

    loan: Loan
    total: int
    """Blocks that the loan holds, which says where in it each of them lies."""
    first: int
    """Of these, the first one that is copied."""
    blocks: tuple[int, ...]
    """Where they are in KV memory."""
    is_back: bool


@dataclass(slots=True)
class _Aside:
    """What of a session lies in the pool."""

    loan: Loan
    blocks: int
    computed: int
    passed_blocks: int
    is_under_way: bool = True
    """A copy works on it, or will before the next step."""
    is_over: bool = False
    """Nobody wants it any more."""
    restored_from: int | None = None
    """The token from which on it came back."""
    is_doubted: bool = False
    """Nobody may find what came back."""


@dataclass(slots=True)
class Tally:
    """What was decided since it was last asked for, by name: copied, computed, no_room."""

    decisions: dict[str, int] = field(default_factory=dict)

    def add(self, decision: str) -> None:
        """Count one."""
        self.decisions[decision] = self.decisions.get(decision, 0) + 1

    def taken(self) -> dict[str, int]:
        """Return the counts, and begin anew."""
        taken, self.decisions = self.decisions, {}
        return taken


class Offload:
    """What of one engine's sessions lies in the pool."""

    def __init__(self, room: Room, block_bytes: int) -> None:
        self.rates = Rates()
        self.tally = Tally()
        self.block_bytes = block_bytes
        self.chunk_blocks = room.chunk_bytes // block_bytes
        """Blocks that fit into a chunk; 0: none does, and nothing is ever copied."""
        self._room = room
        self._aside: dict[int, _Aside] = {}
        """By the number of the session; those that are over too, until nothing works on them."""
        self._decided: list[Transfer] = []
        """Transfers that no step was launched behind yet."""

    @property
    def kept(self) -> int:
        """Sessions of which something lies in the pool."""
        return len(self._aside)

    def pause(self, session: Session, block_tokens: int) -> None:
        """Decide what becomes of the blocks that a session is about to give back."""
        count = -(-session.computed // block_tokens) - session.passed_blocks
        if count <= 0 or session.is_holding or not self.chunk_blocks:
            return
        assert session.number not in self._aside
        prompt, steps = _lost(session)
        if not is_faster(self.rates, 2 * count * self.block_bytes, prompt, steps):
            self.rates.declined()
            self.tally.add("computed")
            return
        loan = self._room.lend(-(-count // self.chunk_blocks))
        if loan is None:
            self.tally.add("no_room")
            return
        self.tally.add("copied")
        aside = _Aside(loan, count, session.computed, session.passed_blocks)
        self._aside[session.number] = aside
        self._decided.append(Transfer(loan, count, 0, tuple(session.table[:count]), is_back=False))

    def passed_blocks(self, session: Session) -> int:
        """Return how many blocks a waiting session left behind before those that lie in the pool."""
        aside = self._aside.get(session.number)
        return 0 if aside is None else aside.passed_blocks

    def restore(self, session: Session, found: int, block_tokens: int) -> int:
        """Bring back what a session that got blocks has not found; return the tokens computed then.

        `found`: blocks that were cached, the first ones of its table.
        """
        aside = self._aside.get(session.number)
        if aside is None or found * block_tokens >= aside.computed:
            self.drop(session)
            return found * block_tokens
        blocks = tuple(session.table[found : aside.blocks])
        self._decided.append(Transfer(aside.loan, aside.blocks, found, blocks, is_back=True))
        aside.is_under_way = True
        aside.restored_from = (aside.passed_blocks + found) * block_tokens
        return aside.computed

    def drop(self, session: Session) -> None:
        """Give up what lies in the pool of a session that has ended or wants none of it."""
        if session.number in self._aside:
            self._give_up(session.number)

    def take(self) -> list[Transfer]:
        """Return what is to be carried out before the step that is launched now."""
        taken, self._decided = self._decided, []
        return taken

    def carried_out(self, transfers: Sequence[Transfer], took_s: float | None) -> None:
        """Take note that copies to the pool have ended, and those back are enqueued; None: not measured."""
        size = sum(len(one.blocks) for one in transfers if not one.is_back) * self.block_bytes
        if took_s is not None:
            self.rates.copied(size, took_s)
        out = {id(one.loan) for one in transfers if not one.is_back}
        out -= {id(one.loan) for one in transfers if one.is_back}
        for number, aside in list(self._aside.items()):
            if id(aside.loan) in out:
                aside.is_under_way = False
                self._close_if_over(number)

    def lost(self, transfers: Sequence[Transfer]) -> None:
        """Take note that copies to the pool failed, and work on no loan any more: those sessions compute again."""
        loans = {id(one.loan) for one in transfers}
        for number, aside in list(self._aside.items()):
            if id(aside.loan) in loans:
                aside.is_under_way, aside.is_over = False, True
                self._close_if_over(number)

    def landed(self, session: Session) -> int | None:
        """Take note that a step of a session has ended; return the token from which it was restored.

        None: it was not, or that was told before, or nobody may find it.
        """
        aside = self._aside.get(session.number)
        if aside is None or aside.restored_from is None:
            return None
        aside.is_under_way, aside.is_over = False, True
        self._close_if_over(session.number)
        return None if aside.is_doubted else aside.restored_from

    def forget(self) -> None:
        """Give up all that lies in the pool: nobody knows whether it is right. What comes back is not found."""
        for number, aside in list(self._aside.items()):
            aside.is_doubted = True
            if aside.restored_from is None:
                self._give_up(number)

    def close(self) -> None:
        """Give up everything; nothing works on it any more."""
        self._decided.clear()
        for number, aside in list(self._aside.items()):
            aside.is_under_way, aside.is_over = False, True
            self._close_if_over(number)

    def _give_up(self, number: int) -> None:
        aside = self._aside[number]
        aside.is_over = True
        left = [one for one in self._decided if one.loan is not aside.loan]
        if len(left) < len(self._decided) and aside.restored_from is None:  # no copy has begun
            self._decided, aside.is_under_way = left, False
        self._close_if_over(number)

    def _close_if_over(self, number: int) -> None:
        aside = self._aside[number]
        if aside.is_over and not aside.is_under_way:
            del self._aside[number]
            aside.loan.close()


class NoOffload:
    """What an engine has for an `Offload` that lays nothing aside."""

    def pause(self, session: Session, block_tokens: int) -> None:
        """Let the blocks go."""

    def passed_blocks(self, session: Session) -> int:
        """Return 0: nothing lies in the pool."""
        return 0

    def restore(self, session: Session, found: int, block_tokens: int) -> int:
        """Return the tokens that the blocks found hold."""
        return found * block_tokens

    def drop(self, session: Session) -> None:
        """Do nothing."""

    def landed(self, session: Session) -> int | None:
        """Return None: nothing was restored."""
        return None

    def forget(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _lost(session: Session) -> tuple[int, int]:
    """Return what a session computes again if nothing is kept: tokens at once, and steps."""
    if not session.is_replayed:
        return session.computed, 0
    prompt = min(session.computed, len(session.request.prompt))
    return prompt, session.computed - prompt
