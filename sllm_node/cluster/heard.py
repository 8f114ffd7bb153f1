"""What each peer said last of itself, of those that can't be asked now, too: they may come back. Pure."""

from collections.abc import Container

from sllm_node.cluster.document import decode_state
from sllm_node.cluster.state import NodeState
from sllm_node.core.types import NodeId


class Heard:
    """The last state of each peer."""

    def __init__(self) -> None:
        self._states: dict[NodeId, tuple[NodeState, float]] = {}
        """With when it came."""
        self._left: dict[NodeId, tuple[NodeState, float]] = {}
        """Of peers that said that they leave, and until when: most are started again soon."""

    def take(self, peer: NodeId, document: bytes, now: float) -> None:
        """Take what a peer published.

        Raises:
            MessageError: it is no state.
        """
        state = decode_state(document)
        if state.node == peer:
            self._states[peer] = (state, now)
            self._left.pop(peer, None)

    def has(self, peer: NodeId) -> bool:
        """Tell whether it has said anything, and has not left."""
        return peer in self._states

    def last(self, peer: NodeId) -> tuple[NodeState, float] | None:
        """Return its state and when that came; None: it has said nothing, or has left."""
        return self._states.get(peer)

    def forget(self, peer: NodeId) -> None:
        """Take that there is no such peer."""
        self._states.pop(peer, None)

    def leaves(self, peer: NodeId, until: float) -> None:
        """Take that a peer has left, and keep what it said until then."""
        known = self._states.pop(peer, None)
        if known is not None:
            self._left[peer] = (known[0], until)

    def absent(self, asked: Container[NodeId], now: float) -> list[NodeState]:
        """Return the states of those not in `asked`, and of those that left not long ago."""
        away = [state for peer, (state, _) in self._states.items() if peer not in asked]
        left = [(peer, state) for peer, (state, until) in self._left.items() if now < until]
        return away + [state for peer, state in left if peer not in self._states]
