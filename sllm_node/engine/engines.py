"""Makes engines: what the scheduler's driver asks for when a model comes onto the device."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.split import Cut, layer_starts, split
from sllm_node.core.clock import Clock
from sllm_node.core.config import EngineConfig
from sllm_node.core.errors import CheckpointFormatError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, Share
from sllm_node.core.units import align_up
from sllm_node.device.base import Device, DeviceBuffer
from sllm_node.engine.arriving import Arrival, Arriving, needs_of
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.engine import Engine, Parts, check_capacity, check_request
from sllm_node.engine.kv import KvCache, KvMemory, bytes_per_token, token_bytes_from_config
from sllm_node.engine.skeleton import (
    LayerShape,
    Model,
    build_skeleton,
    common_window,
    layer_shapes,
    read_config,
)
from sllm_node.engine.spread import spread
from sllm_node.engine.steps import Gate, StepThread
from sllm_node.engine.text import TextCodec, load_codec
from sllm_node.engine.weights import WeightPart, bind, unbind

KEPT_MODULES_MAX: Final = 64
"""Modules that wait for their model to come back; each takes a few MiB of host memory."""


class WeightSource(Protocol):
    """Where the weights are; a lease satisfies it."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def parts(self) -> Sequence[WeightPart]: ...

    @property
    def arrival(self) -> Arrival | None:
        """Which bytes are there; None: all."""


class Memory(Protocol):
    """Where KV memory comes from; the store satisfies it."""

    def capacity(self, device: str) -> int:
        """Return the bytes that weights and KV memory may share."""

    async def allocate(self, device: str, size: int) -> DeviceBuffer:
        """Take memory, or raise DeviceMemoryError."""


@dataclass(slots=True)
class Skeleton:
    """A module, and what its layers keep of a token.

    Without weights at first. `bound_to` are the buffers that its parameters are views of: they keep
    their addresses for life, so a module that comes back to the same ones needs no binding.
    """

    model: Model
    shapes: tuple[LayerShape, ...]
    token_bytes: int
    bound_to: tuple[DeviceBuffer, ...] = ()


class Engines:
    """Makes the engines of a node's devices; owns their step threads."""

    def __init__(
        self,
        devices: Sequence[Device],
        memory: Memory,
        config: EngineConfig,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._devices = tuple(devices)
        self._memory = memory
        self._config = config
        self._clock = clock
        self._metrics = metrics
        gate = Gate()
        self._gate = gate
        self._steps = {d.name: StepThread(clock, gate, config.torch_threads) for d in devices}
        self._early: dict[StepThread, str] = {}
        """Threads of engines whose weights are on their way, and the first device of each."""
        self._spare: list[StepThread] = []
        """Those that nobody needs now; what torch keeps for a thread is not cheap to make."""
        self._builder = StepThread(clock, gate, config.torch_threads)
        self._readers = ThreadPoolExecutor(2, "sllm-codec")
        self._capacity: dict[Path, int] = {}
        """Tokens that the KV memory of a model holds, by its folder; known from its config."""
        self._kept: OrderedDict[Path, tuple[Checkpoint, Skeleton]] = OrderedDict()
        """Modules of models that left their device, used longest ago first."""

    def shares(self, checkpoint: Checkpoint) -> tuple[Share, ...]:
        """Return what a replica takes of each device: weights and KV memory.

        One share for any device if one can hold it, else one for each of as few as can.
        """
        index, kv_bytes = checkpoint.index, self._config.kv_cache_bytes
        grain = max(device.granularity for device in self._devices)
        rooms = {name: self._memory.capacity(name) for name in self._steps}
        size = align_up(index.size, grain) + align_up(kv_bytes, grain)
        names = sorted(rooms, key=lambda name: -rooms[name])
        if size <= rooms[names[0]]:
            return (Share(None, 0, index.size, size),)
        for count in range(2, len(names) + 1):
            # Each part's weights and KV memory are rounded up by themselves.
            usable = [max(0, rooms[name] - 2 * grain) for name in names[:count]]
            cuts = split(index, kv_bytes, usable) if all(usable) else None
            if cuts is not None:
                return tuple(
                    Share(name, cut.start, cut.end, self._size_of(cut, cuts, grain))
                    for name, cut in zip(names, cuts, strict=False)
                )
        return (Share(None, 0, index.size, size),)

    def _size_of(self, cut: Cut, cuts: Sequence[Cut], grain: int) -> int:
        layers = sum(one.layers for one in cuts)
        kv_bytes = self._config.kv_cache_bytes * cut.layers // layers
        return align_up(cut.end - cut.start, grain) + align_up(kv_bytes, grain)

    def context_limit(self, checkpoint: Checkpoint) -> int:
        """Return how many tokens, prompt and output, one session can have."""
        context = checkpoint.index.context_tokens
        return min(context, self._capacity.get(checkpoint.path, context))

    def check_request(self, request: GenerationRequest, checkpoint: Checkpoint) -> None:
        """Refuse what can never be served.

        Raises:
            InvalidRequestError: it has no prompt.
            PromptTooLongError: it exceeds the model's context or the KV memory.
        """
        check_request(request, checkpoint.index.context_tokens, None)
        if checkpoint.path in self._capacity:
            check_capacity(request, self._capacity[checkpoint.path])

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
        """Return the module, kept from an earlier replica or built without weights.

        Raises:
            UnsupportedArchitectureError: the step loop can't serve it.
        """
        kept = self._kept.pop(checkpoint.path, None)
        if kept is not None and kept[0] == checkpoint:
            return kept[1]
        return await self._builder.run_alone(_build, checkpoint.path)

    def give_back(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        """Keep a module that nobody uses any more for the next load of its model."""
        self._kept[checkpoint.path] = (checkpoint, skeleton)
        while len(self._kept) > KEPT_MODULES_MAX:
            self._kept.popitem(last=False)

    def forget(self, model: ModelId) -> None:
        """Drop the modules kept of a checkpoint that was removed."""
        for path, (checkpoint, _) in list(self._kept.items()):
            if checkpoint.model == model:
                del self._kept[path]
                self._capacity.pop(path, None)

    async def open(self, lease: WeightSource, skeleton: Skeleton, codec: TextCodec) -> Engine:
        """Bind the weights of `lease` and take KV memory.

        If the bytes are still on their way, the engine's steps wait for them until it is told that
        it is `loaded`.

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
        config = self._config
        blocks = Blocks(count, config.block_tokens, is_caching=config.prefix_cache)
        steps = self._steps[lease.parts[0].part.device]
        memory = await self._kv_memory(lease, skeleton, blocks.capacity_tokens)
        try:
            if skeleton.bound_to != tuple(part.buffer for part in lease.parts):
                skeleton = await self._bind(steps, skeleton, lease)
            dtype, slots = skeleton.model.dtype, blocks.capacity_tokens
            cache = await steps.run(KvCache, skeleton.shapes, slots, dtype, tuple(memory))
        except BaseException:
            for one in memory:
                one.buffer.close()
            raise

        def keep() -> None:
            self.give_back(lease.checkpoint, skeleton)

        parts = Parts(
            lease.checkpoint.model, skeleton.model, cache, tuple(m.buffer for m in memory), blocks,
            index.context_tokens, common_window(skeleton.shapes), codec, self._check, keep,
            self._arriving(lease, skeleton.model),
        )  # fmt: skip
        return Engine(parts, self._config, steps, self._clock, self._metrics)

    def _arriving(self, lease: WeightSource, model: Model) -> Arriving | None:
        if lease.arrival is None:
            return None
        config = self._config
        made = self._spare or [StepThread(self._clock, self._gate, config.torch_threads)]
        steps = made.pop()
        parts = [one.part for one in lease.parts]
        self._early[steps] = parts[0].device

        def end() -> None:
            del self._early[steps]
            self._spare.append(steps)

        return Arriving(needs_of(model, lease.checkpoint.index, parts), lease.arrival, steps, end)

    async def _kv_memory(
        self, lease: WeightSource, skeleton: Skeleton, slots: int
    ) -> list[KvMemory]:
        """Take memory beside each part; without room, the module waits for the next load."""
        memory: list[KvMemory] = []
        try:
            for device, layers in self._layers_on(lease, skeleton):
                size = bytes_per_token(layers, skeleton.model.dtype) * slots
                buffer = await self._memory.allocate(device, size)
                memory.append(KvMemory(device, len(layers), buffer))
        except BaseException:
            for one in memory:
                one.buffer.close()
            self.give_back(lease.checkpoint, skeleton)
            raise
        return memory

    async def _bind(self, steps: StepThread, skeleton: Skeleton, lease: WeightSource) -> Skeleton:
        """Return a module whose parameters lie in the memory of `lease`."""
        if skeleton.bound_to:  # somewhere else
            skeleton = await self._builder.run_alone(_build, lease.checkpoint.path)
        await steps.run_alone(_bind, skeleton, lease)
        skeleton.bound_to = tuple(part.buffer for part in lease.parts)
        return skeleton

    def _check(self) -> None:
        for device in self._devices:
            device.check()

    def _layers_on(
        self, lease: WeightSource, skeleton: Skeleton
    ) -> list[tuple[str, tuple[LayerShape, ...]]]:
        """Return the device of each part and the shapes of the layers there."""
        if len(lease.parts) == 1:
            return [(lease.parts[0].part.device, skeleton.shapes)]
        starts = layer_starts(lease.checkpoint.index)
        found = []
        for one in lease.parts:
            inside = [n for n, start in enumerate(starts) if one.part.start <= start < one.part.end]
            layers = tuple(skeleton.shapes[number] for number in inside)
            found.append((one.part.device, layers))
        return found

    async def warm(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Import what these models need before the first request: seconds, once per architecture."""
        found = {checkpoint.index.architecture: checkpoint.path for checkpoint in checkpoints}
        for path in found.values():
            await self._builder.run_alone(_import_for, path)

    def stalled(self) -> str | None:
        """Return why the engines don't move, or None."""
        early = ((name, steps) for steps, name in self._early.items())
        for name, steps in (*self._steps.items(), *early):
            busy_s = steps.busy_s()
            if busy_s > self._config.stall_s:
                return f"a step on {name} has been running for {busy_s:.0f} s (engine.stall_s)"
        return None

    def close(self) -> None:
        """Stop the threads; engines must be closed."""
        self._kept.clear()
        for steps in (*self._steps.values(), *self._early, *self._spare, self._builder):
            steps.close()
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


def _bind(skeleton: Skeleton, lease: WeightSource) -> None:
    try:
        bind(skeleton.model, lease.checkpoint.index, lease.parts)
    except BaseException:
        unbind(skeleton.model)
        raise
    if len(lease.parts) > 1:
        spread(skeleton.model)
