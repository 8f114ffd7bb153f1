"""What the driver asks of the layers below; the store and the engine satisfy it by shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    LoadProgress,
    LoadReport,
    ModelId,
    Placement,
    Share,
    Tier,
    TokenIds,
)

CodecT = TypeVar("CodecT")
"""A model's tokenizer and chat template: handed from the engines to the server, unseen here."""


class WeightLease(Protocol):
    """The right that a checkpoint stays on the device."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def parts(self) -> Sequence[Any]:
        """Which bytes lie in which device memory; for `Engines.open`."""

    @property
    def report(self) -> LoadReport | None:
        """What the load did, if there was one."""

    @property
    def arrival(self) -> Any:
        """Which bytes are there, for `Engines.open`; None: all."""

    async def loaded(self) -> None:
        """Wait until they all are, or raise why the load failed."""

    def release(self) -> None:
        """Give the right back; a second call does nothing."""


class WeightStore(Protocol):
    """Where weights are, and the way to the device."""

    async def acquire(self, model: ModelId, placement: Placement, *, early: bool) -> WeightLease:
        """Bring the weights to their devices. Cancelled: everything is given back, in time.

        With `early`, return as soon as their memory is there.
        """

    def capacities(self) -> dict[str, int]:
        """Return the bytes of each device that replicas may take."""

    async def begun(self, model: ModelId) -> float | None:
        """Wait until the first bytes of a load under way are asked for; None: they can't be now."""

    async def settled(self, model: ModelId) -> None:
        """Wait until a load that was cancelled or failed holds nothing any more."""

    def evict(self, model: ModelId, tier: Tier, reason: str) -> None: ...

    def forget(self, model: ModelId) -> None: ...

    def residency(self, model: ModelId) -> dict[Tier, int]: ...

    def progress(self, model: ModelId) -> LoadProgress | None: ...


class Generation(Protocol):
    """One session in an engine."""

    async def __anext__(self) -> GenerationChunk: ...

    async def standing(self, told: int) -> int | None:
        """Wait until more output tokens than `told` are computed while it holds; None: it does not."""

    def extend(self, position: int, tokens: TokenIds, *, lets_go: bool) -> None:
        """Add output tokens of another node while it holds; `lets_go`: go on behind them."""

    def cancel(self) -> None:
        """End it at once; a second call does nothing."""


class Pins(Protocol):
    """Where an operator's pins outlive this process; what can't be written is not done."""

    async def keep(self, model: ModelId) -> None: ...

    async def drop(self, model: ModelId) -> None: ...


class Replica(Protocol):
    """A model that can decode."""

    def submit(self, request: GenerationRequest) -> Generation: ...

    @property
    def kv_usage(self) -> float:
        """Part of the KV blocks in use, 0 to 1."""

    @property
    def stalled_s(self) -> float | None:
        """For how long no step has ended although there is work, if that is too long."""

    def loaded(self) -> None:
        """Take note that its weights are all there, after they were on their way."""

    async def close(self) -> None:
        """End its sessions and let go of the weights."""


class Engines(Protocol[CodecT]):
    """Makes replicas."""

    def shares(self, checkpoint: Checkpoint) -> tuple[Share, ...]:
        """Return what a replica takes of each device: weights and KV memory."""

    def context_limit(self, checkpoint: Checkpoint) -> int:
        """Return how many tokens, prompt and output, one session can have."""

    def check_request(self, request: GenerationRequest, checkpoint: Checkpoint) -> None:
        """Raise what is wrong with a request before its model is loaded."""

    async def load_codec(self, directory: Path) -> CodecT:
        """Read tokenizer and chat template, beside the event loop."""

    async def skeleton(self, checkpoint: Checkpoint) -> Any:
        """Build the module without weights, for `open` and nobody else."""

    def is_kept(self, checkpoint: Checkpoint) -> bool:
        """Tell whether `skeleton` has the module from an earlier replica."""

    def give_back(self, checkpoint: Checkpoint, skeleton: Any) -> None:
        """Keep a module that was not opened after all, for the next load."""

    def forget(self, model: ModelId) -> None:
        """Drop what is kept of a checkpoint that was removed."""

    async def open(self, lease: WeightLease, skeleton: Any, codec: CodecT) -> Replica:
        """Bind the weights of `lease`, which may be on their way. Failed or cancelled: nothing of it stays."""
