"""Carries rebalancing out: once a second, requests that wait here too long go back to their entries."""

import logging
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any, Final

from sllm_node.cluster.peers import Peers
from sllm_node.cluster.rebalance import Waiter, given_back
from sllm_node.core import log as logs
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import GivenBackError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, ModelState
from sllm_node.schedule.driver import Service
from sllm_node.schedule.stream import request_of

log = logging.getLogger(__name__)

ROUND_S: Final = 1.0


class Rebalancing:
    """Looks from `start` to `close`, while `placement.rebalance_s` is above 0."""

    def __init__(
        self, service: Service[Any], peers: Peers, kept: Callable[[], AbstractSet[ModelId]],
        clock: Clock, metrics: Metrics,
    ) -> None:  # fmt: skip
        """`kept`: models that room is made for."""
        self._service = service
        self._peers = peers
        self._kept = kept
        self._clock = clock
        self._metrics = metrics
        self._alarm = Alarm(clock, self._on_timer)

    def start(self) -> None:
        """Begin to look."""
        self._alarm.set(self._clock.now() + ROUND_S)

    def close(self) -> None:
        """Look no more."""
        self._alarm.set(None)

    def _on_timer(self) -> None:
        self._alarm.set(self._clock.now() + ROUND_S)
        after_s = self._peers.cluster.placement.rebalance_s
        if after_s > 0 and not self._service.is_draining:
            self._look(after_s)

    def _look(self, after_s: float) -> None:
        outlook = self._service.outlook
        waiting = outlook.waiting()
        if not waiting:
            return
        now = self._clock.now()
        waiters = [_waiter(one.request, now - one.opened) for one in waiting]
        self._peers.refresh()
        models = {one.session: one.model for one in waiters}
        coming = {m for m in models.values() if outlook.view(m).state is ModelState.LOADING}
        kept = self._kept() | coming  # with the last who waits, a load under way would be aborted
        why = "another node has a place"
        for session in given_back(self._peers.view, self._peers.me, waiters, after_s, kept):
            if self._service.give_back(session, GivenBackError(models[session], why)):
                self._metrics.rebalanced.labels(models[session]).inc()
                fields = {"session": session, "model": models[session]}
                with logs.of_request(request_of(session)):
                    log.info("waiting session given back", extra=fields)


def _waiter(request: GenerationRequest, waited_s: float) -> Waiter:
    tokens, weights = request.tokens_needed, request.weights
    return Waiter(request.session, request.model, waited_s, tokens, weights)
