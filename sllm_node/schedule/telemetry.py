"""What metrics and logs tell of sessions."""

import logging
from collections.abc import Callable

from sllm_node.core import log as logs
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.schedule.actions import ModelView
from sllm_node.schedule.stream import Outcome, Stream, request_of

log = logging.getLogger(__name__)


class Telemetry:
    """The sessions' part of the node's metrics and logs."""

    def __init__(
        self,
        metrics: Metrics,
        view: Callable[[ModelId], ModelView],
        kv_usage: Callable[[ModelId], float],
    ) -> None:
        self._metrics = metrics
        self._view = view
        self._kv_usage = kv_usage
        self._watched: set[ModelId] = set()

    def watch(self, model: ModelId) -> None:
        """Show the gauges of `model`; their values are read when somebody asks."""
        if model in self._watched:
            return
        self._watched.add(model)
        view, kv_usage = self._view, self._kv_usage
        metrics = self._metrics
        metrics.num_requests_waiting.labels(model).set_function(lambda: view(model).waiting)
        metrics.num_requests_running.labels(model).set_function(lambda: view(model).running)
        metrics.kv_cache_usage_perc.labels(model).set_function(lambda: kv_usage(model))

    def draining(self, *, is_draining: bool) -> None:
        """Show whether new requests are taken."""
        self._metrics.ready.set(0 if is_draining else 1)

    def granted(self, stream: Stream) -> None:
        """Count a session's way through the queue."""
        if stream.granted is not None:
            waited_s = stream.granted - stream.opened
            self._metrics.queue_seconds.labels(stream.request.model).observe(waited_s)

    def refused(self, model: ModelId, sessions: int) -> None:
        """Count sessions that were not even opened."""
        self._metrics.sessions.labels(model, Outcome.REFUSED.value).inc(sessions)

    def ended(self, stream: Stream, outcome: Outcome, now: float) -> None:
        """Count and log a session's end."""
        request = stream.request
        fields: dict[str, object] = {
            "session": request.session,
            "model": request.model,
            "outcome": outcome.value,
            "prompt_tokens": len(request.prompt),
            "generated_tokens": stream.tokens,
            "elapsed_s": round(now - stream.opened, 4),
        }
        if stream.migration:
            fields["migration"] = stream.migration
        if stream.granted is not None:
            fields["queue_s"] = round(stream.granted - stream.opened, 4)
        if stream.first_token is not None:
            ttft_s = stream.first_token - stream.opened
            fields["ttft_s"] = round(ttft_s, 4)
            self._metrics.ttft_seconds.labels(request.model).observe(ttft_s)
        if stream.error is not None:
            fields["error"] = str(stream.error)
        self._metrics.sessions.labels(request.model, outcome.value).inc()
        with logs.of_request(request_of(request.session)):  # not that of whoever caused the end
            log.info("session ended", extra=fields)
