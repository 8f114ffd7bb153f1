"""Places requests by what is known now, and learns from how soon they started."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sllm_node.cluster.candidate import PlacementRequest
from sllm_node.cluster.choice import FORWARD_S, Choice, ask_for, choose, request_for
from sllm_node.cluster.estimate import (
    ErrorTrack,
    ForwardEstimator,
    Source,
    StartupParts,
    errors_by_part,
)
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.reservations import Ask, ReservationId
from sllm_node.cluster.state import BootId
from sllm_node.cluster.view import ClusterView
from sllm_node.core.clock import Clock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, NodeId, Waited

log = logging.getLogger(__name__)

_HERE: Final = Ask(ReservationId(""), BootId(""), 0)


class Placing:
    """The choices of one entry node."""

    def __init__(
        self, peers: Peers, gain_s: Callable[[], float | None], clock: Clock, metrics: Metrics
    ) -> None:
        """`gain_s`: how much sooner a start with moves has to be; None: none is made."""
        self.errors = ErrorTrack()
        """Of estimated startup times."""
        self._peers = peers
        self._gain_s = gain_s
        self._clock = clock
        self._metrics = metrics
        self._forwarding = ForwardEstimator(FORWARD_S)

    def choose(self, request: GenerationRequest, excluded: frozenset[NodeId]) -> Choice | None:
        """Place a request by what is known now."""
        self._peers.refresh()
        view, me = self._peers.view, self._peers.me
        asked = asked_for(view, request)
        found = choose(view, asked, me, self._clock.now(), excluded, self._gain_s())
        if found is not None and found.node != me:
            busy = sum(view.nodes[node].is_busy for node in (me, found.node) if node in view.nodes)
            forward_s = self._forwarding.seconds(found.node, busy)
            found = replace(found, forward_s=forward_s, busy_ends=busy)
        where = "here" if found and found.node == me else "peer"
        self._metrics.placements.labels(found.way if found else "none", where).inc()
        return found

    def ask(self, choice: Choice, request: GenerationRequest) -> Ask:
        """Return what the choice counts on; with no boot: it is this node."""
        return _HERE if choice.node == self._peers.me else self.ask_in_full(choice, request)

    def ask_in_full(self, choice: Choice, request: GenerationRequest) -> Ask:
        """Return the same, also where this node asks itself."""
        node = self._peers.view.nodes.get(choice.node)
        if node is None:
            return _HERE
        asked = asked_for(self._peers.view, request)
        return ask_for(choice, asked, node.state, request.session)

    def started(self, choice: Choice, model: str, seconds: float, waited: Waited | None) -> None:
        """Compare the estimate with what came; `waited`: of it, at the node that serves."""
        expected = choice.parts
        if expected is None or choice.startup_s is None:
            return
        self.errors.observe(choice.startup_s, seconds)
        where = "here" if choice.node == self._peers.me else "peer"
        error_s = abs(seconds - choice.startup_s)
        self._metrics.estimate_error_seconds.labels(where).observe(error_s)
        fields: dict[str, object] = {}
        if waited is not None:
            forward_s = max(0.0, seconds - waited.total_s)
            actual = StartupParts(waited.queue_s, waited.load_s, forward_s)
            if where == "peer" and _is_told_at_once(choice):
                self._forwarding.observe(choice.node, choice.busy_ends, forward_s)
            for part, off_s in errors_by_part(expected, actual).items():
                self._metrics.estimate_part_error_seconds.labels(where, part).observe(abs(off_s))
                fields[f"{part}_off_s"] = round(off_s, 4)
        log.debug("session started", extra={
            "model": model, "node": choice.node, "expected_s": round(choice.startup_s, 4),
            "startup_s": round(seconds, 4), "busy_ends": choice.busy_ends, **fields,
        })  # fmt: skip


def asked_for(view: ClusterView, request: GenerationRequest) -> PlacementRequest:
    """Return what is to be placed for a request: with so many tokens, and the weights that it began with."""
    return request_for(
        view, request.model, request.priority, request.tokens_needed, request.weights
    )


def _is_told_at_once(choice: Choice) -> bool:
    """Tell whether its node looked at the request when it came, and did not first ask peers for the model."""
    return choice.candidate is None or choice.candidate.source is not Source.PEER
