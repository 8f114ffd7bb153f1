"""Makes the scheduler's tickets: what a model takes of the devices, and how long its load would take now."""

from collections.abc import Callable
from typing import Any

from sllm_node.checkpoint.cards import PEERS
from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import ModelId, Tier
from sllm_node.schedule.actions import Ticket, TicketId
from sllm_node.schedule.estimate import LoadEstimator
from sllm_node.schedule.ports import Engines, WeightStore
from sllm_node.schedule.replicas import Hosted


class Tickets:
    """Numbers them in order."""

    def __init__(
        self,
        store: WeightStore,
        engines: Engines[Any],
        estimator: LoadEstimator,
        watch: Callable[[ModelId], None],
    ) -> None:
        """`watch` is told of each model that has a ticket."""
        self._store = store
        self._engines = engines
        self._estimator = estimator
        self._watch = watch
        self._last_ticket = 0

    def make(
        self,
        checkpoint: Checkpoint,
        *,
        priority: int = 0,
        keep_alive_s: float | None = None,
        is_session: bool = True,
        is_hint: bool = False,
    ) -> Ticket:
        """Return a new ticket for the model of `checkpoint`, as it lies here now."""
        model = checkpoint.model
        self._watch(model)
        self._last_ticket += 1
        residency = self._store.residency(model)
        size, stored = checkpoint.index.size, checkpoint.index.file_size
        in_dram = residency.get(Tier.DRAM, 0) * size // stored  # as what it decodes to
        on_nvme = residency.get(Tier.NVME, stored) * size // stored
        bytes_moved = max(0, size - residency.get(Tier.DEVICE, 0))
        from_nvme = max(0, bytes_moved - in_dram)
        from_remote = min(from_nvme, size - on_nvme)
        is_encoded, is_peer = checkpoint.index.is_encoded, checkpoint.remote == PEERS
        load_s = self._estimator.load_s(
            bytes_moved, from_nvme, from_remote, is_encoded=is_encoded, is_peer=is_peer
        )
        beside_s = self._estimator.beside_s(is_kept=self._engines.is_kept(checkpoint))
        return Ticket(
            TicketId(self._last_ticket),
            model,
            self._engines.shares(checkpoint),
            load_s + beside_s,
            priority,
            keep_alive_s,
            is_session,
            is_hint,
            beside_s,
        )

    def learn(self, hosted: Hosted) -> None:
        """Take note of how long a load took, for the next estimates."""
        report = hosted.lease.report
        if report is None:
            return
        is_peer = hosted.lease.checkpoint.remote == PEERS
        self._estimator.observe(report, is_peer=is_peer, is_alone=hosted.was_alone)
        if hosted.was_alone:  # or it may have waited for others
            self._estimator.observe_whole(report, hosted.elapsed_s, is_kept=hosted.was_kept)
