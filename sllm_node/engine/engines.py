"""Makes engines: what the scheduler's driver asks for when a model comes onto the device."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.config import EngineConfig
from sllm_node.core.errors import CheckpointFormatError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest
from sllm_node.device.base import Device, DeviceBuffer
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.engine import Engine, Parts, check_request
from sllm_node.engine.kv import KvCache, bytes_per_token, token_bytes_from_config
from sllm_node.engine.skeleton import LayerShape, Model, build_skeleton, layer_shapes, read_config
from sllm_node.engine.steps import StepThread
from sllm_node.engine.text import TextCodec, load_codec
from sllm_node.engine.weights import bind, unbind


class WeightSource(Protocol):
    """Where the weights are; a lease satisfies it."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def buffer(self) -> DeviceBuffer: ...


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A module without weights, and what its layers keep of a token."""

    model: Model
    shapes: tuple[LayerShape, ...]
    token_bytes: int


class Engines:
    """Makes the engines of one device; owns its step thread."""

    def __init__(
        self, device: Device, config: EngineConfig, clock: Clock, metrics: Metrics
    ) -> None:
        self._device = device
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._steps = StepThread(clock, config.torch_threads)
        self._readers = ThreadPoolExecutor(2, "sllm-codec")
        self._capacity: dict[Path, int] = {}
        """Tokens that the KV memory of a model holds, by its folder; known from its config."""

    def device_bytes(self, checkpoint: Checkpoint) -> int:
        """Return what a replica takes: weights and KV memory."""
        return checkpoint.index.size + self._config.kv_cache_bytes

    def context_limit(self, checkpoint: Checkpoint) -> int:
        """Return how many tokens, prompt and output, one session can have."""
        context = checkpoint.index.context_tokens
        return min(context, self._capacity.get(checkpoint.path, context))

    def check_request(self, request: GenerationRequest, checkpoint: Checkpoint) -> None:
        """Refuse what can never be served.

        Raises:
            InvalidRequestError: it has no prompt.
            PromptTooLongError: it exceeds the model's context.
        """
        check_request(request, checkpoint.index.context_tokens, None)

    async def load_codec(self, directory: Path) -> TextCodec:
        """Read tokenizer, chat template and KV geometry of a checkpoint, beside the event loop.

        Raises:
            CheckpointFormatError: one of them can't be used.
        """
        loop = asyncio.get_running_loop()
        codec, token_bytes = await loop.run_in_executor(self._readers, _read_codec, directory)
        self._capacity[directory] = self._blocks_for(token_bytes) * self._config.block_tokens
        return codec

    async def skeleton(self, checkpoint: Checkpoint) -> Skeleton:
        """Build the module without weights, on the step thread.

        Raises:
            UnsupportedArchitectureError: the step loop can't serve it.
        """
        return await self._steps.run(_build, checkpoint.path)

    async def open(self, lease: WeightSource, skeleton: Skeleton, codec: TextCodec) -> Engine:
        """Bind the weights of `lease` and take KV memory.

        Raises:
            CheckpointFormatError: index and module do not agree.
            DeviceMemoryError: there is no room for KV memory.
        """
        index = lease.checkpoint.index
        count = self._blocks_for(skeleton.token_bytes)
        if not count:
            raise CheckpointFormatError(
                index.model,
                f"one block of its KV cache is {skeleton.token_bytes * self._config.block_tokens} "
                f"bytes, more than engine.kv_cache_bytes = {self._config.kv_cache_bytes}",
            )
        blocks = Blocks(count, self._config.block_tokens)
        buffer = self._device.allocate(blocks.capacity_tokens * skeleton.token_bytes)
        try:
            cache = await self._steps.run(_bind, skeleton, lease, blocks, buffer)
        except BaseException:
            await asyncio.shield(self._steps.run(_undo, skeleton, buffer))
            raise
        parts = Parts(
            lease.checkpoint.model, skeleton.model, cache, buffer, blocks, index.context_tokens, codec
        )  # fmt: skip
        return Engine(parts, self._config, self._steps, self._clock, self._metrics)

    async def warm(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Import what these models need before the first request: seconds, once per architecture."""
        found = {checkpoint.index.architecture: checkpoint.path for checkpoint in checkpoints}
        for path in found.values():
            await self._steps.run(_import_for, path)

    def stalled(self) -> str | None:
        """Return why the engines don't move, or None."""
        busy_s = self._steps.busy_s()
        if busy_s <= self._config.stall_s:
            return None
        return f"a step has been running for {busy_s:.0f} s (engine.stall_s)"

    def close(self) -> None:
        """Stop the threads; engines must be closed."""
        self._steps.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _blocks_for(self, token_bytes: int) -> int:
        return self._config.kv_cache_bytes // (token_bytes * self._config.block_tokens)


def _read_codec(directory: Path) -> tuple[TextCodec, int]:

    return load_codec(directory), token_bytes_from_config(read_config(directory))


def _import_for(directory: Path) -> None:
    """Import the model's and the tokenizer's modules; a checkpoint with problems tells them later."""
    with suppress(SllmError, OSError, ValueError):
        build_skeleton(directory)
        load_codec(directory)


def _build(directory: Path) -> Skeleton:

    model = build_skeleton(directory)
    shapes = layer_shapes(model)
    return Skeleton(model, shapes, bytes_per_token(shapes, model.dtype))


def _bind(skeleton: Skeleton, lease: WeightSource, blocks: Blocks, buffer: DeviceBuffer) -> KvCache:

    bind(skeleton.model, lease.checkpoint.index, lease.buffer)
    return KvCache(skeleton.shapes, blocks.capacity_tokens, skeleton.model.dtype, buffer)


def _undo(skeleton: Skeleton, buffer: DeviceBuffer) -> None:

    unbind(skeleton.model)
    buffer.close()
