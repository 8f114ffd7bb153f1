"""The course of one session over nodes: where it runs, where it ran before, how long it waits. Pure.

Its entry keeps it, for the client that asks (`x-sllm-explain`), and for the queues of the nodes that it
comes to: who is given back, or lost its node, does not begin again behind all others.
"""

from dataclasses import replace

from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.core.types import NodeId, Startup, Stay


class Course:
    """The last node is in the startup; those before it are its `earlier`."""

    def __init__(
        self, startup: Startup, arrived: float, tokens: int = 0, *, is_running: bool = False
    ) -> None:
        """`tokens`: those that the first node has given already."""
        self.arrived = arrived
        """When its client asked for it."""
        self._startup = startup
        self._stays: list[Stay] = []
        self._tokens = tokens
        self._waits_since = None if is_running else arrived

    def waited_s(self, now: float) -> float:
        """Return how long it has waited for its turn, wherever that was; 0 while it runs."""
        return 0.0 if self._waits_since is None else now - self._waits_since

    def took(self, tokens: int) -> None:
        """Take note of output tokens of the node where it is."""
        self._tokens += tokens

    def granted(self, choice: Choice, now: float) -> None:
        """Take note that it runs where it was placed; how long it took is told of its first start."""
        self._waits_since = None
        if self._startup.startup_s is None:
            self._startup = startup_of(choice, now - self.arrived)
        elif self._stays:
            self.goes_on(choice)

    def left(self, node: NodeId, why: str, now: float) -> None:
        """Take note that it left a node where it ran: `moved`, or the code of what failed."""
        self._stays.append(Stay(node, self._tokens, why))
        self._tokens, self._waits_since = 0, now

    def goes_on(self, choice: Choice) -> None:
        """Take note that another node goes on with it."""
        self._waits_since = None
        self._startup = replace(self._startup, node=choice.node, way=choice.way, why=choice.reason)

    def startup(self) -> Startup:
        """Return how it came to run."""
        return replace(self._startup, earlier=tuple(self._stays)) if self._stays else self._startup
