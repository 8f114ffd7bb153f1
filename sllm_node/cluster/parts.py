"""Makes the parts of sessions: what a node is asked, whether it is this one or a peer."""

from functools import partial

from sllm_node.cluster.arbiter import Action, Close, Open
from sllm_node.cluster.choice import Choice
from sllm_node.cluster.part import LocalSource, Part, PeerSource, Source
from sllm_node.cluster.ways import Tools, Ways
from sllm_node.cluster.wire import HOPS_MAX, Forward
from sllm_node.core.types import GenerationRequest
from sllm_node.schedule.stream import Stream


class Parts:
    """Of one session; none is started here, and those are open that the arbiter has not closed."""

    def __init__(self, ways: Ways, tools: Tools, keep_alive_s: float | None) -> None:
        self._ways = ways
        self._tools = tools
        self._keep_alive_s = keep_alive_s
        self._open: dict[int, Part] = {}
        """By epoch."""

    def make(
        self, request: GenerationRequest, choice: Choice, asked: Open, migration: str = ""
    ) -> Part:
        """Return the part of the node that was chosen; `migration`: of the move that it is made for."""
        part = Part(choice, asked.epoch, self._source(request, choice, asked.epoch, migration))
        self._open[part.epoch] = part
        return part

    def begun(self, stream: Stream, choice: Choice, asked: Open) -> Part:
        """Return the part of this node in a session that it serves already."""
        part = self._open[asked.epoch] = Part(choice, asked.epoch, LocalSource(stream=stream))
        return part

    def carry_out(self, actions: tuple[Action, ...], migration: str = "") -> None:
        """Close the parts that are given up; `migration`: the move by which one is left."""
        for action in actions:
            if isinstance(action, Close) and (part := self._open.pop(action.epoch, None)):
                if action.is_left:
                    part.source.leaves(migration)
                part.close()

    def _source(
        self, request: GenerationRequest, choice: Choice, epoch: int, migration: str
    ) -> Source:
        ask = self._ways.ask(choice, request)
        if not ask.boot:  # here
            opening = partial(self._ways.open_local, request, self._keep_alive_s, choice)
            known = partial(self._ways.ensure, request.model)
            return LocalSource(opening, known=known)
        why, keep_alive_s = choice.reason, self._keep_alive_s
        forward = Forward(request, ask, HOPS_MAX, why, keep_alive_s, epoch, migration)
        return PeerSource(self._tools.client, choice, forward, self._tools.limits.silence_s)
