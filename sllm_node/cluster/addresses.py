"""Where each peer is: those that the cluster file names, and those that the directory lists. Pure.

A peer that is listed no more and still speaks lingers: it stays until it is silent.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from sllm_node.core.types import NodeId


class Addresses:
    """host:port of each peer; where the file names one, the file counts."""

    def __init__(self, named: Mapping[NodeId, str]) -> None:
        """`named`: those of the file."""
        self.known = dict(named)
        """All of them, as of the last `follow`."""
        self._listed: dict[NodeId, str] = {}
        self._lingering: set[NodeId] = set()

    def follow(self, named: Mapping[NodeId, str]) -> None:
        """Bring `known` up to date."""
        self.known = {**self._listed, **named}

    def put(self, peer: NodeId, address: str) -> bool:
        """Take a peer that the directory has; return whether that is new."""
        self._lingering.discard(peer)
        if self._listed.get(peer) == address:
            return False
        self._listed[peer] = address
        return True

    def drop(self, peer: NodeId, *, may_linger: bool) -> bool:
        """Take that the directory has a peer no more; return whether it is forgotten."""
        if peer not in self._listed:
            return False
        if may_linger:
            self._lingering.add(peer)
            return False
        self._forget({peer})
        return True

    def drop_silent(self, silent: AbstractSet[NodeId]) -> bool:
        """Forget who lingered until now; return whether there is any."""
        gone = silent & self._lingering
        self._forget(gone)
        return bool(gone)

    def _forget(self, peers: AbstractSet[NodeId]) -> None:
        self._lingering -= peers
        for peer in peers:
            del self._listed[peer]
