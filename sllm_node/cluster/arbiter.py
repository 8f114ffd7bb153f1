"""Who may give tokens of a session, and what follows when it moves or loses a node: decided by its entry. Pure.

Theory of operation. The *entry* is the node with the session's reader, and the only arbiter of who generates.
Every node that it asks gets an *epoch* of its own, a number never given again, and the entry takes tokens of
one epoch only, the *owner's*, each position once. So nothing depends on what a node believes that was left
behind, cut off or stopped: what still comes of it is nobody's. The entry ships the tokens too, so source and
destination need not reach each other, and a session that lost its node goes on by the way of one that begins.

    entry                          destination, epoch 2          source, epoch 1
      | Open, held: all tokens ------>|  takes a place, loads      |  generates
      |<------------------- Standing |  has computed them         |  goes on
      | Extend: what came since ----->|  computes it, and so on until it lacks so few (`cluster/pace.py`)
      |<------------------- Standing |                            |
      | Extend, lets go: the last --->|  computes, generates       |  Close: its connection ends
      |<--------------------- tokens |

The owner changes here, at once and in one turn, and no answer is needed for that. What goes wrong before
leaves the owner alone; what goes wrong after it is an owner's loss, and the session is placed again. Which
node that is, and for how long one is waited for, others decide (`cluster/retries.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sllm_node.core.errors import MessageFormatError

ROUNDS_MAX: Final = 8


class EntryState(Enum):
    """Where a session is, as its entry sees it."""

    SEEKING = "seeking"
    """No node has it: one is sought."""
    SERVING = "serving"
    """Its owner has it: it waits for its turn there, or runs."""
    MOVING = "moving"
    """Besides, a destination comes near."""
    ORPHANED = "orphaned"
    """The owner is lost, and the destination still comes near."""
    HANDED_OVER = "handed over"
    """The destination is the owner, and has given nothing yet."""
    ENDED = "ended"


class EntryEvent(Enum):
    """What moves a session on."""

    PLACED = "placed"
    """A node is found for it."""
    MOVE = "move"
    """It is to go to another one."""
    HAND_OVER = "hand over"
    """The destination lacks few tokens, or nobody else generates."""
    CONFIRMED = "confirmed"
    """The new owner gave the first that it has to give."""
    DESTINATION_LOST = "destination lost"
    """It refused, failed, is silent or too slow, or is given up for a sooner one."""
    OWNER_LOST = "owner lost"
    """It refused, failed or is silent."""
    FINISHED = "finished"
    """Its last token has come."""
    STOPPED = "stopped"
    """Its reader is gone, an operator ended it, no node takes it, or its error is the same anywhere."""


_S, _E = EntryState, EntryEvent
_ALWAYS: Final = {_E.STOPPED: _S.ENDED}

TRANSITIONS: Final[Mapping[EntryState, Mapping[EntryEvent, EntryState]]] = {
    _S.SEEKING: {_E.PLACED: _S.SERVING, **_ALWAYS},
    _S.SERVING: {
        _E.MOVE: _S.MOVING,
        _E.OWNER_LOST: _S.SEEKING,
        _E.FINISHED: _S.ENDED,
        **_ALWAYS,
    },
    _S.MOVING: {
        _E.HAND_OVER: _S.HANDED_OVER,
        _E.DESTINATION_LOST: _S.SERVING,
        _E.OWNER_LOST: _S.ORPHANED,
        _E.FINISHED: _S.ENDED,
        **_ALWAYS,
    },
    _S.ORPHANED: {
        _E.HAND_OVER: _S.HANDED_OVER,
        _E.DESTINATION_LOST: _S.SEEKING,
        **_ALWAYS,
    },
    _S.HANDED_OVER: {_E.CONFIRMED: _S.SERVING, _E.OWNER_LOST: _S.SEEKING, **_ALWAYS},
    _S.ENDED: {},
}

# --- actions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """Ask a node for the session, behind the tokens that are known."""

    epoch: int
    is_held: bool = False
    """It is to compute them, and to generate nothing until it is let go."""


@dataclass(frozen=True, slots=True)
class Accept:
    """Give the reader what was offered."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Send the destination all tokens from `start` on."""

    epoch: int
    start: int
    lets_go: bool = False
    """It is the owner now."""


@dataclass(frozen=True, slots=True)
class Close:
    """Have a node drop the session; whatever still comes of it is nobody's."""

    epoch: int
    is_left: bool = False
    """Another node goes on with it: that is no failure."""


Action = Open | Accept | Extend | Close


@dataclass(slots=True)
class Approach:
    """How near a destination is."""

    epoch: int
    sent: int
    """Output tokens that it was given."""
    standing: int = -1
    """Of these it has computed so many; -1: it has told nothing."""
    rounds: int = 0


class Arbiter:
    """Of one session; what is returned is to be carried out, in that order and in the same turn."""

    def __init__(self, position: int, rounds_max: int = ROUNDS_MAX) -> None:
        self.state = EntryState.SEEKING
        self.position = position
        """Output tokens so far."""
        self.owner: int | None = None
        """The one epoch whose tokens count."""
        self.destination: Approach | None = None
        self.epochs = 0
        """That were given."""
        self._rounds_max = rounds_max

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state is EntryState.ENDED

    @property
    def has_owner(self) -> bool:
        """Whether a node has it."""
        return self.owner is not None

    @property
    def can_move(self) -> bool:
        """Whether a move can begin: it has an owner, and no other move is under way."""
        return self.state is EntryState.SERVING

    @property
    def lacking(self) -> int:
        """Return how many tokens the destination has not computed."""
        assert self.destination is not None
        return self.position - self.destination.standing

    @property
    def is_reached(self) -> bool:
        """Whether the destination has computed all that it was given."""
        return self.destination is not None and self.destination.standing >= self.destination.sent

    # --- nodes come -----------------------------------------------------------------------------

    def placed(self) -> Open:
        """Take that a node was found for it."""
        self._go(EntryEvent.PLACED)
        self.owner = self._next_epoch()
        return Open(self.owner)

    def move(self) -> Open:
        """Begin to move it; only where it `can_move`."""
        self._go(EntryEvent.MOVE)
        self.destination = Approach(self._next_epoch(), self.position)
        return Open(self.destination.epoch, is_held=True)

    # --- they tell ------------------------------------------------------------------------------

    def take(self, epoch: int, start: int, count: int, *, is_last: bool) -> tuple[Action, ...]:
        """Take an offer of `count` tokens from position `start` on; nothing follows if they are nobody's.

        Raises:
            MessageFormatError: the owner's do not begin where the session stands; it is lost with that.
        """
        if epoch != self.owner:
            return ()
        if start != self.position:
            raise MessageFormatError(f"tokens at {start} of a session that is at {self.position}")
        if self.state is EntryState.HANDED_OVER:
            self._go(EntryEvent.CONFIRMED)
        self.position += count
        if not is_last:
            return (Accept(),)
        self._go(EntryEvent.FINISHED)
        self.owner = None  # it has ended with that, and need not be closed
        return (Accept(), *self._give_up_destination())

    def stands(self, epoch: int, position: int) -> bool:
        """Take how many tokens a node has computed that holds; return whether that is news of the destination."""
        approach = self.destination
        if approach is None or epoch != approach.epoch or position <= approach.standing:
            return False
        approach.standing = position
        return True

    def go_on(self, *, is_near: bool) -> tuple[Action, ...]:
        """Send the destination the next round, or hand over to it; `is_near`: by the session's pace.

        Only when it `is_reached`.
        """
        approach = self.destination
        assert approach is not None
        assert self.is_reached
        is_last = (
            self.state is EntryState.ORPHANED or is_near or approach.rounds >= self._rounds_max
        )
        start = approach.standing
        if not is_last:
            approach.rounds += 1
            approach.sent = self.position
            return (Extend(approach.epoch, start),)
        self._go(EntryEvent.HAND_OVER)
        left = self._give_up_owner(is_left=True)
        self.owner, self.destination = approach.epoch, None
        return (*left, Extend(approach.epoch, start, lets_go=True))

    # --- and go ---------------------------------------------------------------------------------

    def lost(self, epoch: int) -> tuple[Action, ...]:
        """Take that a node refused, failed, fell silent or is given up; of others than these two it is no news."""
        if epoch == self.owner:
            self._go(EntryEvent.OWNER_LOST)
            return self._give_up_owner()
        if self.destination is not None and epoch == self.destination.epoch:
            self._go(EntryEvent.DESTINATION_LOST)
            return self._give_up_destination()
        return ()

    def stop(self) -> tuple[Action, ...]:
        """End it, wherever it is; only once."""
        self._go(EntryEvent.STOPPED)
        return (*self._give_up_owner(), *self._give_up_destination())

    # --- inside ---------------------------------------------------------------------------------

    def _go(self, event: EntryEvent) -> None:
        following = TRANSITIONS[self.state].get(event)
        assert following is not None, f"{event.value} of a session that is {self.state.value}"
        self.state = following

    def _next_epoch(self) -> int:
        self.epochs += 1
        return self.epochs

    def _give_up_owner(self, *, is_left: bool = False) -> tuple[Action, ...]:
        owner, self.owner = self.owner, None
        return () if owner is None else (Close(owner, is_left),)

    def _give_up_destination(self) -> tuple[Action, ...]:
        approach, self.destination = self.destination, None
        return () if approach is None else (Close(approach.epoch),)
