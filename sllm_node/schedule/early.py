"""Sessions that an engine computes while its model still loads, before anybody granted them.

The scheduler knows nothing of them: to it they wait for the load, with all that holds for those who
wait. When it grants one, what was computed is handed over; one that ends before is cancelled. So a
load that fails, is aborted or takes too long ends them as it ends any request that waits.
"""

from sllm_node.core.types import ModelId
from sllm_node.schedule.actions import TicketId
from sllm_node.schedule.ports import Generation, Replica
from sllm_node.schedule.stream import Stream


class EarlySessions:
    """By model, while it loads; `limit` of one model at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._replicas: dict[ModelId, Replica] = {}
        self._generations: dict[ModelId, dict[TicketId, Generation]] = {}

    def open(self, model: ModelId, replica: Replica) -> None:
        """Let sessions of `model` begin on `replica`."""
        self._replicas[model] = replica
        self._generations[model] = {}

    def begin(self, stream: Stream) -> None:
        """Begin a session, if its model is open; what is wrong with it is told when it is granted."""
        model = stream.request.model
        replica = self._replicas.get(model)
        if replica is None or len(self._generations[model]) >= self._limit:
            return
        try:
            generation = replica.submit(stream.request)
        except Exception:  # noqa: BLE001 - it is submitted again, and then the error is told
            return
        self._generations[model][stream.ticket] = generation

    def take(self, stream: Stream) -> Generation | None:
        """Return what was begun of a session that is granted now."""
        return self._generations.get(stream.request.model, {}).pop(stream.ticket, None)

    def drop(self, stream: Stream) -> None:
        """Cancel a session that ended without a grant."""
        generation = self.take(stream)
        if generation is not None:
            generation.cancel()

    def close(self, model: ModelId) -> None:
        """Let no more sessions of `model` begin, and cancel those that were not granted."""
        self._replicas.pop(model, None)
        for generation in self._generations.pop(model, {}).values():
            generation.cancel()
