"""The models of this node, as they lie on disk and as status shows them; one that was replaced is noticed here."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.errors import ModelNotFoundError, NotServableError, SllmError
from sllm_node.core.types import ModelId, ModelStatus
from sllm_node.schedule.ports import Engines, WeightStore
from sllm_node.schedule.replicas import Hosted, Replicas
from sllm_node.schedule.roster import Roster
from sllm_node.schedule.status import model_status


class Models:
    """What there is, what of it can be served, and how it stands."""

    def __init__(  # noqa: PLR0913 - whom a status is put together from
        self,
        catalog: Catalog,
        store: WeightStore,
        engines: Engines[Any],
        replicas: Replicas[Any],
        roster: Roster,
        clock: Clock,
        *,
        replaced: Callable[[ModelId], None],
    ) -> None:
        """`replaced` is called when a replica's checkpoint is found gone, or another one."""
        self._catalog = catalog
        self._store = store
        self._engines = engines
        self._replicas = replicas
        self._roster = roster
        self._clock = clock
        self._replaced = replaced
        self._failures: dict[ModelId, tuple[SllmError, float]] = {}
        """Of models whose last load failed: why and when."""

    def checkpoint(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint as it is on disk now; a replica of another one is on its way out.

        Raises:
            ModelNotFoundError: there is none.
        """
        hosted = self._replicas.get(model)
        try:
            checkpoint = self._catalog.get(model)
        except ModelNotFoundError:
            if hosted is not None:
                self._replaced(model)
            raise
        if hosted is not None and is_outdated(hosted, checkpoint):
            self._replaced(model)
        return checkpoint

    def servable(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint of `model` if sessions can have it.

        Raises:
            ModelNotFoundError: there is none.
            NotServableError: it is none of a model.
        """
        checkpoint = self.checkpoint(model)
        if not checkpoint.index.is_model:
            raise NotServableError(model)
        return checkpoint

    def is_replaced(self, hosted: Hosted) -> bool:
        """Tell whether the checkpoint of a replica is another one on disk now; one that is gone is not."""
        with suppress(SllmError):
            return is_outdated(hosted, self._catalog.get(hosted.lease.checkpoint.model))
        return False

    def all(self) -> list[ModelStatus]:
        """Return all models whose checkpoints lie in the store folder now."""
        self._catalog.scan()
        present = self._catalog.models()
        self._replicas.forget_removed({*present, *map(ModelId, self._catalog.problems)})
        statuses = []
        for model in present:
            with suppress(SllmError):  # gone since the scan
                statuses.append(self.status_of(self.checkpoint(model)))
        return statuses

    def status_of(self, checkpoint: Checkpoint) -> ModelStatus:
        """Return how the model of `checkpoint` stands."""
        model, hosted = checkpoint.model, self._replicas.get(checkpoint.model)
        status = model_status(
            checkpoint,
            self._roster.view(model),
            self._store.residency(model),
            self._store.progress(model),
            self._clock.now(),
            None if hosted is None else hosted.replica.stalled_s,
        )
        return replace(status, context_tokens=self._engines.context_limit(checkpoint))

    def status_or_none(self, checkpoint: Checkpoint) -> ModelStatus | None:
        """Return the same; None: it is gone."""
        try:
            return self.status_of(checkpoint)
        except SllmError:  # removed in the meantime
            return None

    # --- loads that failed --------------------------------------------------------------------

    def loaded(self, model: ModelId) -> None:
        """Take note that the last load of `model` went well."""
        self._failures.pop(model, None)

    def failed(self, model: ModelId, error: SllmError) -> None:
        """Take note that the last load of `model` failed."""
        self._failures[model] = (error, self._clock.now())

    def failures(self) -> list[dict[str, object]]:
        """Return the models whose last load failed, why, and how long ago."""
        now, present = self._clock.now(), set(self._catalog.models())
        return [
            {"model": model, "error": str(error), "code": error.code, "age_s": round(now - at, 1)}
            for model, (error, at) in sorted(self._failures.items())
            if model in present
        ]


def is_outdated(hosted: Hosted, checkpoint: Checkpoint) -> bool:
    """Tell whether a replica is of another checkpoint than this one."""
    return hosted.lease.checkpoint.identities != checkpoint.identities
