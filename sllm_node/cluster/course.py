"""The course of one session over nodes, as its client may be told: where it runs, and where it ran before. Pure."""

from dataclasses import replace

from sllm_node.cluster.choice import Choice, startup_of
from sllm_node.core.types import NodeId, Startup, Stay


class Course:
    """Kept by the session's entry; the last node is in the startup, those before it are its `earlier`."""

    def __init__(self, startup: Startup, tokens: int = 0) -> None:
        """`tokens`: those that the first node has given already."""
        self._startup = startup
        self._stays: list[Stay] = []
        self._tokens = tokens

    def took(self, tokens: int) -> None:
        """Take note of output tokens of the node where it is."""
        self._tokens += tokens

    def granted(self, choice: Choice, startup_s: float) -> None:
        """Take note that it runs where it was placed; how long it took is told of its first start."""
        if self._startup.startup_s is None:
            self._startup = startup_of(choice, startup_s)
        elif self._stays:
            self.goes_on(choice)

    def left(self, node: NodeId, why: str) -> None:
        """Take note that it left a node where it ran: `moved`, or the code of what failed."""
        self._stays.append(Stay(node, self._tokens, why))
        self._tokens = 0

    def goes_on(self, choice: Choice) -> None:
        """Take note that another node goes on with it."""
        self._startup = replace(self._startup, node=choice.node, way=choice.way, why=choice.reason)

    def startup(self) -> Startup:
        """Return how it came to run."""
        return replace(self._startup, earlier=tuple(self._stays)) if self._stays else self._startup
