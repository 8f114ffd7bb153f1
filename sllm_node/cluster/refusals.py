"""Who takes no messages of whom in this cluster, and why: a warning now and then, and words for `status`.

Keys, certificates and files that differ look like dead nodes otherwise. What is refused is not proven to
come from whom it names: so one warning a minute for each peer, and one for all strangers together.
"""

import logging
from collections.abc import Container
from typing import Final

from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    MessageError,
    MisdirectedError,
    PeerDeniedError,
    PeerUnreachableError,
    SllmError,
    StrangerError,
    WrongKeyError,
)
from sllm_node.core.types import NodeId

log = logging.getLogger(__name__)

TWICE: Final = "another process runs with its id (node.id), or its clock went back"
TWICE_S: Final = 600.0
"""For so long status tells of it."""
TELL_S: Final = 60.0
"""Least time between two warnings of one peer in one direction."""
CERTIFICATE: Final = "certificate: "
"""How the reason of a `PeerDeniedError` begins where the connection failed for a certificate."""
_STRANGERS: Final = NodeId("")
_OURS: Final = {
    "wrong_key": "refuses our key",
    "unknown_sender": "its cluster file does not have this node",
    "misdirected": "another node has its address",
    "protocol_version": "another release",
    "replayed": "knows a later life of this id: does another node run as it?",
}
"""Why a peer refused us, by the code that its answer begins with."""
_THEIRS: Final[dict[type[MessageError], str]] = {
    WrongKeyError: "has another key",
    StrangerError: "not in the cluster file",
    MisdirectedError: "sends us what is another's",
}


class Refusals:
    """What one node knows of refusals: of its messages, and by itself."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ours: dict[NodeId, str] = {}
        """By peer: why it takes nothing of us."""
        self._unreachable: dict[NodeId, str] = {}
        """By peer: why our last message did not get there."""
        self._theirs: dict[NodeId, tuple[str, float]] = {}
        """By peer: why we took nothing of it, and when last."""
        self._later: tuple[NodeId, float] | None = None
        """Which peer knew a later life of this node last, and when."""
        self._told: dict[tuple[NodeId, str], float] = {}

    def problem(self, peer: NodeId) -> str | None:
        """Return why this node and `peer` don't understand each other; None: they do."""
        theirs, at = self._theirs.get(peer, ("", -TELL_S))
        is_new = self._clock.now() - at < TELL_S
        return self._ours.get(peer) or (theirs if theirs and is_new else None)

    def own_problem(self) -> str | None:
        """Return what is wrong with this node's own place among its peers; None: nothing that is known."""
        now = self._clock.now()
        if self._later is None or now - self._later[1] > TWICE_S:
            return None
        peer, at = self._later
        return f"node {peer!r} knew a later life of this node {now - at:.0f} s ago: {TWICE}"

    def knew_later_life(self, peer: NodeId, boot: int) -> None:
        """Take note that `peer` knew a later boot of this node than this one."""
        self._later = (peer, self._clock.now())
        log.warning("a peer knew a later life of this node", extra={
            "peer": peer, "boot": boot, "problem": TWICE,
        })  # fmt: skip

    def unreachable(self, peer: NodeId) -> str | None:
        """Return why the last message to `peer` did not get there; None: it did."""
        return self._unreachable.get(peer)

    def failed(self, peer: NodeId, error: SllmError) -> None:
        """Take note that a message to `peer` failed."""
        self._unreachable.pop(peer, None)
        if not isinstance(error, PeerDeniedError):
            self._ours.pop(peer, None)
            if isinstance(error, PeerUnreachableError):
                self._unreachable[peer] = error.problem
            return
        if error.reason.startswith(CERTIFICATE):
            problem = error.reason.removeprefix(CERTIFICATE).partition(";")[0]
        else:
            problem = _OURS.get(error.reason.partition(":")[0], "refuses our messages")
        self._ours[peer] = problem
        self._tell("a peer refuses this node", peer, error)

    def taken(self, peer: NodeId) -> None:
        """Take note that `peer` took a message."""
        self._ours.pop(peer, None)
        self._unreachable.pop(peer, None)

    def refused(self, error: MessageError, known: Container[str]) -> None:
        """Take note that a message was not taken here."""
        problem, sender = _THEIRS.get(type(error)), getattr(error, "sender", "")
        if problem is None:
            return
        peer = NodeId(sender) if sender in known else _STRANGERS
        if peer is not _STRANGERS:
            self._theirs[peer] = problem, self._clock.now()
        self._tell("messages of a peer refused", peer, error)

    def heard(self, peer: NodeId) -> None:
        """Take note that a message of `peer` was taken."""
        self._theirs.pop(peer, None)

    def _tell(self, what: str, peer: NodeId, error: SllmError) -> None:
        now = self._clock.now()
        last = self._told.get((peer, what))
        if last is not None and now - last < TELL_S:
            return
        self._told[peer, what] = now
        log.warning(what, extra={"peer": peer or None, "error": str(error)})
