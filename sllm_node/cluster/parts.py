"""Makes the parts of sessions: what a node is asked, whether it is this one or a peer."""

from functools import partial

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.part import LocalSource, Part, PeerSource
from sllm_node.cluster.ways import Tools, Ways
from sllm_node.cluster.wire import HOPS_MAX, Forward
from sllm_node.core.types import GenerationRequest


class Parts:
    """Of one session; none is started here."""

    def __init__(self, ways: Ways, tools: Tools, keep_alive_s: float | None) -> None:
        self._ways = ways
        self._tools = tools
        self._keep_alive_s = keep_alive_s

    def make(
        self, request: GenerationRequest, choice: Choice, epoch: int, migration: str = ""
    ) -> Part:
        """Return the part of the node that was chosen; `migration`: of the move that it is made for."""
        ask = self._ways.ask(choice, request)
        if not ask.boot:  # here
            opening = partial(self._ways.open_local, request, self._keep_alive_s, choice)
            known = partial(self._ways.ensure, request.model)
            return Part(choice, epoch, LocalSource(opening, known=known))
        why, keep_alive_s = choice.reason, self._keep_alive_s
        forward = Forward(request, ask, HOPS_MAX, why, keep_alive_s, epoch, migration)
        silence_s = self._tools.limits.silence_s
        return Part(choice, epoch, PeerSource(self._tools.client, choice, forward, silence_s))
