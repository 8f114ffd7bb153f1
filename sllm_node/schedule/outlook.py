"""What of this node matters to whoever places requests over many: replicas, models, memory, rates.

Plain facts as the scheduler, the store and the engines know them now; `cluster` makes of them what it
tells other nodes.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.config import Config
from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId, ModelState, NodeId, SessionId, Tier
from sllm_node.schedule.actions import ModelView, ReplicaView, TicketId
from sllm_node.schedule.estimate import PEER, LoadEstimator
from sllm_node.schedule.ports import Engines, WeightStore
from sllm_node.schedule.scheduler import Scheduler
from sllm_node.schedule.sessions import Sessions
from sllm_node.schedule.stream import Stream


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """A session that runs or waits here."""

    session: SessionId
    prompt_tokens: int
    output_tokens: int
    priority: int
    moved_at: float | None = None
    """When it came here by a move, if it did."""
    entry: NodeId | None = None
    """The node of its client, if that is another one."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint that this node can serve."""

    model: ModelId
    size: int
    """Decoded bytes."""
    stored: int
    by_tier: dict[Tier, int]
    shares: tuple[int, ...]
    """Memory that a replica takes of each of its devices."""
    context_tokens: int
    created: int
    waiting: int
    """Tickets that wait while it neither takes device memory nor is about to."""
    is_kept: bool = False
    """Its module is there from an earlier replica: its next load takes less beside its bytes."""
    digest: str = ""
    """Of its weights."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where checkpoints are known, lie, and are served."""

    catalog: Catalog
    store: WeightStore
    engines: Engines[Any]


class Outlook:
    """Facts of one node."""

    def __init__(
        self,
        sources: "Sources",
        scheduler: Scheduler,
        sessions: Sessions,
        estimator: LoadEstimator,
        config: Config,
    ) -> None:
        self._catalog = sources.catalog
        self._store = sources.store
        self._engines = sources.engines
        self._scheduler = scheduler
        self._sessions = sessions
        self._estimator = estimator
        self.slots = config.engine.max_sessions
        """Sessions that one replica takes at once."""
        self.keeps_remotes = bool(config.remotes)

    def capacities(self) -> dict[str, int]:
        """Return the bytes of each device that replicas may take."""
        return self._store.capacities()

    def replicas(self) -> tuple[ReplicaView, ...]:
        """Return the models that take device memory, and those that do once evictions have ended."""
        return self._scheduler.roster.replicas()

    def session(self, ticket: TicketId) -> SessionFacts | None:
        """Return a session; None: the ticket is a wish for the model only."""
        stream = self._sessions.find(ticket)
        if stream is None:
            return None
        asked = stream.request
        output = len(asked.resumed) + stream.tokens
        moved_at = stream.opened if asked.held else None
        return SessionFacts(
            asked.session, len(asked.prompt), output, asked.priority, moved_at, stream.entry
        )

    def waiting(self) -> list[Stream]:
        """Return the sessions that wait for their turn, in order of arrival; not those that move here."""
        return self._sessions.waiting()

    def models(self) -> list[ModelFacts]:
        """Return the models that lie here or at a remote of this node; looks at files."""
        found = []
        for model in self._catalog.models():
            with suppress(SllmError):  # damaged, or gone since the scan
                facts = self._facts(model)
                found += [] if facts is None else [facts]
        return found

    def view(self, model: ModelId) -> ModelView:
        """Return how a model stands with the scheduler."""
        return self._scheduler.roster.view(model)

    def folder(self, model: ModelId) -> Path:
        """Return where its texts lie, or raise ModelNotFoundError."""
        return self._catalog.get(model).path

    def bandwidth(self, tier: Tier, *, is_encoded: bool = False) -> float:
        """Return the bytes a second that loads from `tier` are reckoned with."""
        return self._estimator.bandwidth(tier, is_encoded=is_encoded)

    def bandwidth_from_peers(self) -> float:
        """Return the same of loads from peers."""
        return self._estimator.bandwidth(PEER)

    def expect_from_peers(self, bytes_per_s: float) -> None:
        """Reckon loads from peers with this rate until the first one has come."""
        self._estimator.expect_from_peers(bytes_per_s)

    def is_hosted(self, model: ModelId) -> bool:
        """Tell whether `model` takes device memory now."""
        return bool(self._scheduler.roster.view(model).devices)

    def beside_s(self, *, is_kept: bool) -> float:
        """Return what a load takes beside its bytes."""
        return self._estimator.beside_s(is_kept=is_kept)

    @property
    def evict_s(self) -> float:
        """Return what it takes until the memory of an idle replica is free."""
        return self._estimator.evict_s

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._scheduler.is_draining

    def _waiting(self, model: ModelId) -> int:
        view = self._scheduler.roster.view(model)
        return 0 if view.devices else view.waiting

    def _facts(self, model: ModelId) -> ModelFacts | None:
        checkpoint = self._catalog.get(model)
        index = checkpoint.index
        if not index.is_model:
            return None
        return ModelFacts(
            model, index.size, index.file_size, self._store.residency(model),
            tuple(share.size for share in self._engines.shares(checkpoint)),
            self._engines.context_limit(checkpoint), index.created, self._waiting(model),
            self._engines.is_kept(checkpoint) or self._scheduler.roster.view(model).state is ModelState.READY,
            checkpoint.weights.digest,
        )  # fmt: skip
