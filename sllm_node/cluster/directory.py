"""Which nodes there are, where no file names them: the directory as one node sees it.

Theory of operation. The directory (etcd, `cluster/etcd.py`) holds a key for every node, which lasts as
long as the node keeps a lease alive, and keys for registered models and desired replicas. A node reads
all of them once, as of one revision, and then follows the changes after that revision. Four things go
wrong, and none of them takes a peer away that may still serve:

- *The stream of changes ends.* It is taken up after the last revision that came.
- *The changes after it are compacted away.* All is read again.
- *Nobody answers.* What was known last is kept, and marked stale.
- *It is back, but lacks what it had* (from an old copy, or empty). A peer that it lacks is kept, stale,
  for `grace_s`: a node that lives registers itself again within that. Models and replicas that it lacks
  are put back, but only where its revision or term went back: else somebody dropped them. What is to be
  put back is neither forgotten nor dropped until that is done, however often the way there is cut.

Who is alive is not decided here but by heartbeats (`cluster/membership.py`): the directory says whom to
send them to. The object does no I/O: `step()` says what to do next, the `on_x` take what came.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sllm_node.cluster.directory_keys import (
    NODES,
    SHARED,
    Entry,
    Head,
    NodeRecord,
    SharedRecord,
    decode,
    encode,
    key_of,
)
from sllm_node.cluster.records import Desired, KnownPeer, Registration
from sllm_node.core.types import NodeId


class Standing(Enum):
    """How what is known relates to the directory."""

    UNREAD = "unread"
    FOLLOWING = "following"
    RESUMING = "resuming"
    BEHIND = "behind"
    CUT_OFF = "cut off"


class _Turn(Enum):
    READ = "read"
    RESUMED = "resumed"
    ENDED = "ended"
    COMPACTED = "compacted"
    UNREACHABLE = "unreachable"


TRANSITIONS: Final[dict[Standing, dict[_Turn, Standing]]] = {
    Standing.UNREAD: {_Turn.READ: Standing.FOLLOWING, _Turn.UNREACHABLE: Standing.CUT_OFF},
    Standing.FOLLOWING: {
        _Turn.RESUMED: Standing.FOLLOWING,
        _Turn.ENDED: Standing.RESUMING,
        _Turn.COMPACTED: Standing.BEHIND,
        _Turn.UNREACHABLE: Standing.CUT_OFF,
    },
    Standing.RESUMING: {
        _Turn.RESUMED: Standing.FOLLOWING,
        _Turn.ENDED: Standing.RESUMING,
        _Turn.COMPACTED: Standing.BEHIND,
        _Turn.UNREACHABLE: Standing.CUT_OFF,
    },
    Standing.BEHIND: {_Turn.READ: Standing.FOLLOWING, _Turn.UNREACHABLE: Standing.CUT_OFF},
    Standing.CUT_OFF: {_Turn.READ: Standing.FOLLOWING, _Turn.UNREACHABLE: Standing.CUT_OFF},
}


@dataclass(frozen=True, slots=True)
class ReadAll:
    """Read every key, as of one revision."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Follow the changes from `revision` on."""

    revision: int


Step = ReadAll | Watch


class Farewell(Enum):
    """Why a node is no more in the directory."""

    LEFT = "left"
    EXPIRED = "expired"
    """Its lease ended: it is dead, or cut off from the directory."""
    MISSING = "missing"
    """The directory came back without it, and it has not registered again."""


@dataclass(frozen=True, slots=True)
class NodeListed:
    """A node is new, or has another address or boot."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class NodeUnlisted:
    """A node is no more in the directory."""

    node: NodeId
    why: Farewell


@dataclass(frozen=True, slots=True)
class RecordPut:
    """A model was registered, or other replicas are desired."""

    record: SharedRecord


@dataclass(frozen=True, slots=True)
class RecordDropped:
    """A record is no more."""

    kind: type[SharedRecord]
    key: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A value that can't be read; what was known under its key stays."""

    key: str
    problem: str


@dataclass(frozen=True, slots=True)
class CutOff:
    """Nobody answers: what is known is stale from now on."""

    problem: str


@dataclass(frozen=True, slots=True)
class BackAgain:
    """What is known is the directory's again."""


@dataclass(frozen=True, slots=True)
class IdTaken:
    """A later boot under this node's id has registered: two processes have one id."""

    boot: int


News = (
    NodeListed | NodeUnlisted | RecordPut | RecordDropped | BadRecord | CutOff | BackAgain | IdTaken
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A peer as it is listed."""

    node: NodeId
    address: str
    boot: int
    is_stale: bool


class Directory:
    """This node's view of the directory."""

    def __init__(self, me: NodeRecord, known: Iterable[KnownPeer], grace_s: float) -> None:
        self.me = me
        self._grace_s = grace_s
        self._standing = Standing.UNREAD
        self._head = Head(0, 0)
        self._nodes = {
            peer.node: NodeRecord(peer.node, peer.address, 0)
            for peer in known
            if peer.node != me.node
        }
        self._missing: dict[NodeId, float] = dict.fromkeys(self._nodes, math.inf)
        """Peers that the directory lacks, and until when they are kept."""
        self._shared: dict[type[SharedRecord], dict[str, SharedRecord]] = {
            Registration: {},
            Desired: {},
        }
        self._is_registered = False
        self._restores: dict[str, bytes] = {}
        """What the directory has lost; each key stays until it is there again, or dropped."""
        self._news: list[News] = []

    # --- what can be asked ------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        """How what is known relates to the directory."""
        return self._standing

    @property
    def needs_registration(self) -> bool:
        """Whether this node's own key is to be put, under a lease that lives."""
        return not self._is_registered

    def peers(self) -> tuple[Listed, ...]:
        """Return all peers, by id; whatever becomes of the directory, there is an answer."""
        is_stale = self._standing in (Standing.UNREAD, Standing.CUT_OFF)
        return tuple(
            Listed(r.node, r.address, r.boot, is_stale or r.node in self._missing)
            for _, r in sorted(self._nodes.items())
        )

    def registrations(self) -> tuple[Registration, ...]:
        """Return the models that the cluster serves."""
        found = self._shared[Registration].values()
        return tuple(record for record in found if isinstance(record, Registration))

    def desired(self) -> tuple[Desired, ...]:
        """Return the replicas that are desired."""
        found = self._shared[Desired].values()
        return tuple(record for record in found if isinstance(record, Desired))

    def step(self) -> Step:
        """Return what to do next."""
        if self._standing in (Standing.FOLLOWING, Standing.RESUMING):
            return Watch(self._head.revision + 1)
        return ReadAll()

    def restores(self) -> dict[str, bytes]:
        """Return the keys to put where they do not exist: the directory has lost them."""
        return dict(self._restores)

    def news(self) -> tuple[News, ...]:
        """Return what happened since the last call, in order."""
        news = tuple(self._news)
        self._news.clear()
        return news

    def next_timer(self) -> float | None:
        """Return when to call `on_timer`."""
        at = min(self._missing.values(), default=math.inf)
        return at if at < math.inf else None

    # --- what comes -------------------------------------------------------------------------------

    def on_read(self, head: Head, entries: Iterable[Entry], now: float) -> None:
        """Take all keys, as of `head`; reconcile with what was known."""
        is_set_back = head.revision < self._head.revision or head.term < self._head.term
        was = self._turn(_Turn.READ)
        self._head = head
        self._is_registered = False
        seen = set()
        for entry in entries:
            seen.add(entry.key)
            self._put(entry)
        for node in sorted(self._nodes):
            if f"{NODES}/{node}" not in seen:
                self._missing[node] = min(self._missing.get(node, math.inf), now + self._grace_s)
        for key, record in self._shared_keys():
            if key in seen:
                continue
            if is_set_back or key in self._restores:  # who was to put it back may have been cut off
                self._restores[key] = encode(record)
            else:
                self._drop_shared(key)
        if was is not Standing.BEHIND:
            self._news.append(BackAgain())

    def on_watching(self, head: Head) -> None:
        """Take that the changes are followed, and how far the server is that tells them."""
        if head.revision < self._head.revision or head.term < self._head.term:
            self._turn(_Turn.COMPACTED)
            return
        self._turn(_Turn.RESUMED)
        self._head = Head(self._head.revision, head.term)

    def on_changes(self, entries: Iterable[Entry]) -> None:
        """Take changes in their order; one that came before changes nothing."""
        known = revision = self._head.revision
        for entry in entries:
            if entry.revision <= known:
                continue
            revision = max(revision, entry.revision)
            if entry.value is None:
                self._delete(entry.key)
            else:
                self._put(entry)
        self._head = Head(revision, self._head.term)

    def on_ended(self) -> None:
        """Take that the stream of changes ended, for whatever reason."""
        self._turn(_Turn.ENDED)

    def on_compacted(self) -> None:
        """Take that the next changes can't be had any more."""
        self._turn(_Turn.COMPACTED)

    def on_unreachable(self, problem: str) -> None:
        """Take that nobody answers."""
        if self._turn(_Turn.UNREACHABLE) is not Standing.CUT_OFF:
            self._news.append(CutOff(problem))
        self._missing = dict.fromkeys(self._missing, math.inf)

    def on_registered(self) -> None:
        """Take that this node's key stands, under a lease that lives."""
        self._is_registered = True

    def on_lease_lost(self) -> None:
        """Take that this node's lease ended."""
        self._is_registered = False

    def on_restored(self, key: str) -> None:
        """Take that a key is in the directory again, whoever has put it there."""
        self._restores.pop(key, None)

    def on_dropped(self, record: SharedRecord) -> None:
        """Take that this node has dropped a record: of one that was not put back yet, no change tells."""
        self._drop_shared(key_of(record))

    def on_timer(self, now: float) -> None:
        """Let go of peers that have not come back."""
        for node in [node for node, until in self._missing.items() if until <= now]:
            self._unlist(node, Farewell.MISSING)

    # --- inside -----------------------------------------------------------------------------------

    def _turn(self, turn: _Turn) -> Standing:
        """Go where the table says; return where it came from."""
        was = self._standing
        self._standing = TRANSITIONS[was][turn]
        return was

    def _put(self, entry: Entry) -> None:
        assert entry.value is not None
        try:
            record = decode(entry.key, entry.value)
        except ValueError as error:
            self._news.append(BadRecord(entry.key, str(error)))
            return
        match record:
            case NodeRecord(node) if node == self.me.node:
                self._see_own(record)
            case NodeRecord():
                self._list(record)
            case Registration() | Desired():
                self._restores.pop(entry.key, None)
                rows = self._shared[type(record)]
                if rows.get(record.key) != record:
                    rows[record.key] = record
                    self._news.append(RecordPut(record))
            case None:
                pass

    def _delete(self, key: str) -> None:
        kind, _, name = key.partition("/")
        if kind in SHARED:
            self._drop_shared(key)
        elif key == f"{NODES}/{self.me.node}":
            self._is_registered = False
        elif kind == NODES and (record := self._nodes.get(NodeId(name))) is not None:
            self._unlist(record.node, Farewell.LEFT if record.is_leaving else Farewell.EXPIRED)

    def _see_own(self, record: NodeRecord) -> None:
        self._is_registered = record.boot >= self.me.boot
        if record.boot > self.me.boot:
            self._news.append(IdTaken(record.boot))

    def _list(self, record: NodeRecord) -> None:
        self._missing.pop(record.node, None)
        old = self._nodes.get(record.node)
        self._nodes[record.node] = record
        if old is None or (old.address, old.boot) != (record.address, record.boot):
            self._news.append(NodeListed(record))

    def _unlist(self, node: NodeId, why: Farewell) -> None:
        self._nodes.pop(node, None)
        self._missing.pop(node, None)
        self._news.append(NodeUnlisted(node, why))

    def _shared_keys(self) -> list[tuple[str, SharedRecord]]:
        rows = (record for kind in SHARED.values() for record in self._shared[kind].values())
        return [(key_of(record), record) for record in rows]

    def _drop_shared(self, key: str) -> None:
        self._restores.pop(key, None)
        kind, _, name = key.partition("/")
        if self._shared[SHARED[kind]].pop(name, None) is not None:
            self._news.append(RecordDropped(SHARED[kind], name))
