"""A model as status shows it: what the index, the scheduler and the store know, put together."""

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import LoadProgress, ModelState, ModelStatus, Tier
from sllm_node.schedule.actions import ModelView


def model_status(
    checkpoint: Checkpoint,
    view: ModelView,
    residency: dict[Tier, int],
    progress: LoadProgress | None,
    now: float,
    stalled_s: float | None = None,
) -> ModelStatus:
    """Return the status of the model of `checkpoint`."""
    index = checkpoint.index
    until = view.keep_alive_until
    return ModelStatus(
        model=checkpoint.model,
        state=view.state,
        tier=_nearest_tier(view.state, residency, index.file_size),
        bytes_total=index.size,
        bytes_by_tier=residency,
        dtype=index.dtype,
        architecture=index.architecture,
        context_tokens=index.context_tokens,
        pinned=view.pinned,
        priority=view.priority,
        running=view.running,
        waiting=view.waiting,
        keep_alive_until_s=None if until is None else max(0.0, until - now),
        progress=progress,
        created=index.created,
        devices=view.devices,
        stalled_s=stalled_s,
    )


def _nearest_tier(state: ModelState, residency: dict[Tier, int], size: int) -> Tier:
    """Return the nearest tier that holds all of a model."""
    if state is ModelState.READY:
        return Tier.DEVICE
    if residency.get(Tier.DRAM, 0) >= size:
        return Tier.DRAM
    return Tier.NVME if residency.get(Tier.NVME, size) >= size else Tier.REMOTE
