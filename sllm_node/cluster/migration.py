"""How a running session changes node: the words, the state tables, and what is asked of the shell.

Theory of operation. The *entry* of a session is the node that holds its reader. It has all that a
session is made of (prompt, output, sampling: `cluster/session.py`) and is the only arbiter of who
generates: every node that is asked to take the session gets an *epoch* of its own, counted by the
entry, and the entry accepts tokens of one epoch only, each position once. The *owner* is the node of
that epoch. So nothing depends on what a node that was left behind believes: what it still sends is
refused, and it is told to let go.

A *holder* is what a node has of somebody's session in one epoch: it is the destination until the
entry grants it the session, and the source from then on. The entry ships the tokens, not the source:
it has them all anyway, so source and destination need not reach each other, and a session whose owner
died goes on by the very same way, only that nobody decodes meanwhile. So does one that just began.

    entry                       destination                source
      | Prepare, epoch 2  ------->|  takes a place, loads     |  decodes in epoch 1
      |<------ Standing, ready    |                           |
      | Round: all tokens ------->|  computes them            |  decodes on
      |<------ Standing, computed |                           |
      | Round: what came since -->|  and so on until the gap is small (`cluster/pace.py`)
      |<------ Standing, computed |                           |
      | Grant: the last tokens -->|  computes, decodes        |  Release, epoch 1 -> lets go
      |<------ Tokens, epoch 2    |                           |

With the grant the owner changes, at the entry and at once; the source needs no answer for that. What
goes wrong before it leaves the owner alone; what goes wrong after it leaves the session without an
owner, and the entry seeks another.

Messages may get lost, come twice or late: each is sent again until it is answered, and says how
things are. A holder is one *attempt*, a number that its node never gives again, and a grant names it;
so a late copy of a message never brings back what has ended. Whoever hears nothing for
`limits.lost_s` gives up by itself: an owner without an entry ends, an entry without an owner seeks
another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sllm_node.cluster.migration_messages import Message, MoveOutcome, Piece
from sllm_node.core.errors import SllmError
from sllm_node.core.types import GenerationRequest, ModelId, NodeId, SessionId

# --- the entry ----------------------------------------------------------------------------------


class EntryState(Enum):
    """Where a session is, as its entry sees it."""

    SERVING = "serving"
    """Its owner decodes."""
    PREPARING = "preparing"
    """Besides, a destination makes ready: takes a place, loads the model."""
    RESUMING = "resuming"
    """Besides, the destination computes rounds of tokens."""
    HANDOVER = "handover"
    """The destination is the owner and has not said a word as such."""
    ORPHANED = "orphaned"
    """Nobody owns it: a node is sought."""
    REVIVING = "reviving"
    """Nobody owns it: a node makes ready and gets its tokens."""
    ENDED = "ended"


class EntryEvent(Enum):
    """What moves a session on at its entry."""

    MOVE = "move"
    """A destination is there and the session is to go to it."""
    PREPARED = "prepared"
    HAND_OVER = "hand over"
    """The gap is small, or nobody else decodes."""
    CONFIRMED = "confirmed"
    """The new owner was heard."""
    DESTINATION_LOST = "destination lost"
    """It refused, failed, died, is silent or too slow."""
    OWNER_LOST = "owner lost"
    """It failed, died or is silent."""
    PLACED = "placed"
    """A node for a session without an owner."""
    GIVEN_UP = "given up"
    """No node takes it."""
    FINISHED = "finished"
    """Its last token has come."""
    CANCELLED = "cancelled"


_E, _V = EntryState, EntryEvent
_ALWAYS: Final = {_V.CANCELLED: _E.ENDED}

ENTRY: Final[Mapping[EntryState, Mapping[EntryEvent, EntryState]]] = {
    _E.SERVING: {
        _V.MOVE: _E.PREPARING,
        _V.OWNER_LOST: _E.ORPHANED,
        _V.FINISHED: _E.ENDED,
        **_ALWAYS,
    },
    _E.PREPARING: {
        _V.PREPARED: _E.RESUMING,
        _V.DESTINATION_LOST: _E.SERVING,
        _V.OWNER_LOST: _E.REVIVING,
        _V.FINISHED: _E.ENDED,
        **_ALWAYS,
    },
    _E.RESUMING: {
        _V.HAND_OVER: _E.HANDOVER,
        _V.DESTINATION_LOST: _E.SERVING,
        _V.OWNER_LOST: _E.REVIVING,
        _V.FINISHED: _E.ENDED,
        **_ALWAYS,
    },
    _E.HANDOVER: {
        _V.CONFIRMED: _E.SERVING,
        _V.OWNER_LOST: _E.ORPHANED,
        **_ALWAYS,
    },
    _E.ORPHANED: {_V.PLACED: _E.REVIVING, _V.GIVEN_UP: _E.ENDED, **_ALWAYS},
    _E.REVIVING: {
        _V.HAND_OVER: _E.HANDOVER,
        _V.DESTINATION_LOST: _E.ORPHANED,
        **_ALWAYS,
    },
    _E.ENDED: {},
}

# --- holders ------------------------------------------------------------------------------------


class HolderState(Enum):
    """What a node has of a session in one epoch."""

    PREPARING = "preparing"
    """Destination: its place and its model are on their way."""
    HOLDING = "holding"
    """Destination: all tokens that it has are computed."""
    RESUMING = "resuming"
    """Destination: tokens are being computed."""
    DECODING = "decoding"
    """Source: it generates."""
    FINISHED = "finished"
    """Source: it has generated the last token, and the entry has not taken it yet."""
    ENDED = "ended"


class HolderEvent(Enum):
    """What moves a holder on."""

    ACQUIRED = "acquired"
    ROUND = "round"
    """Tokens came that are not computed."""
    COMPUTED = "computed"
    GRANTED = "granted"
    FINISHED = "finished"
    FAILED = "failed"
    """It refuses, or what it did has failed; the entry is told."""
    RELEASED = "released"
    """The entry says that the epoch is over; so it does when it has the last token."""
    ENTRY_LOST = "entry lost"
    """Dead, or silent for too long."""


_H, _W = HolderState, HolderEvent
_ENDS: Final = {_W.RELEASED: _H.ENDED, _W.ENTRY_LOST: _H.ENDED}
_FAILS: Final = {_W.FAILED: _H.ENDED, **_ENDS}

HOLDER: Final[Mapping[HolderState, Mapping[HolderEvent, HolderState]]] = {
    _H.PREPARING: {_W.ACQUIRED: _H.HOLDING, **_FAILS},
    _H.HOLDING: {_W.ROUND: _H.RESUMING, _W.GRANTED: _H.DECODING, **_FAILS},
    _H.RESUMING: {_W.COMPUTED: _H.HOLDING, _W.GRANTED: _H.DECODING, **_FAILS},
    _H.DECODING: {_W.FINISHED: _H.FINISHED, **_FAILS},
    _H.FINISHED: {**_ENDS},
    _H.ENDED: {},
}
DESTINATION: Final = frozenset({_H.PREPARING, _H.HOLDING, _H.RESUMING})
"""States of a holder that is no owner yet."""

# --- limits -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """How long anything may take, and how often."""

    resend_s: float = 0.5
    """After which silence a message is sent again."""
    lost_s: float = 10.0
    """After which silence the other side is taken for lost; membership may know sooner."""
    migrate_s: float = 300.0
    """From the first `Prepare` to the grant, the load of the model included."""
    handover_s: float = 5.0
    """From the grant to the first word of the new owner."""
    orphan_s: float = 60.0
    """How long a node may be sought for a session that nobody owns."""
    rounds_max: int = 8
    recoveries_max: int = 5
    """Owners that one session may lose."""
    sessions_max: int = 4096
    """That a node holds for others at once."""

    def __post_init__(self) -> None:
        assert 0 < self.resend_s < self.handover_s <= self.lost_s <= self.migrate_s
        assert self.rounds_max > 0
        assert self.recoveries_max >= 0


# --- actions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Carry a message to a node; to this node itself, too."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Show:
    """Entry: give this to the reader; it comes once and in order."""

    session: SessionId
    piece: Piece


@dataclass(frozen=True, slots=True)
class Seek:
    """Entry: ask placement for a node; answer by `placed` or `no_place`."""

    session: SessionId
    request: GenerationRequest
    """With all tokens so far."""
    excluded: frozenset[NodeId]
    """Nodes that have just failed it, or that it is to leave."""
    is_orphan: bool
    """Nobody decodes meanwhile."""


@dataclass(frozen=True, slots=True)
class End:
    """Entry: the session is over; nothing more comes of it."""

    session: SessionId
    error: SllmError | None
    """None: it finished, or its reader cancelled it."""


class MigrationOutcome(Enum):
    """How a migration ended."""

    MOVED = "moved"
    FINISHED = "finished"
    """The session finished at the source first."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    """It goes on where it was, or elsewhere."""


@dataclass(frozen=True, slots=True)
class Report:
    """Entry: what became of one migration; for metrics, logs and status."""

    session: SessionId
    epoch: int
    """With the session, the name of the migration on all nodes."""
    source: NodeId | None
    """None: nobody owned the session."""
    destination: NodeId
    outcome: MigrationOutcome
    reason: str
    """Why it was begun, or why it failed."""
    rounds: tuple[int, ...]
    """Tokens of each, those of the grant last."""
    gap_s: float | None
    """From the source's last token to the destination's first, as the reader saw them."""


@dataclass(frozen=True, slots=True)
class Acquire:
    """Holder: get a place for a session, and its model onto a device; answer by `acquired` or `failed`."""

    session: SessionId
    epoch: int
    request: GenerationRequest
    """Without tokens."""
    tokens: int
    """Of its prompt."""
    reservation: str


@dataclass(frozen=True, slots=True)
class ComputePart:
    """One session's part of a `Compute`."""

    session: SessionId
    epoch: int
    request: GenerationRequest
    """With the tokens to have computed: prompt, and what is known of the output."""
    start: int
    """Tokens before it are computed."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Holder: compute keys and values, together; answer each part by `computed`, or `failed`."""

    model: ModelId
    parts: tuple[ComputePart, ...]


@dataclass(frozen=True, slots=True)
class Decode:
    """Holder: go on after `request`; give what comes to `generated`, or say `failed`.

    A `Compute` of the session that is still under way is part of it and need not be answered.
    """

    session: SessionId
    epoch: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Free:
    """Holder: stop whatever goes on for it, give back its place and its hold on the model."""

    session: SessionId
    epoch: int


@dataclass(frozen=True, slots=True)
class Told:
    """What became of this node's wish to move a session."""

    session: SessionId
    outcome: MoveOutcome


Action = Show | Seek | End | Report | Acquire | Compute | Decode | Free | Told
"""Besides, there is `Send`, by `to_send`."""
