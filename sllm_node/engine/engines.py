"""Makes engines: what the scheduler's driver asks for when a model comes onto the device."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol
from weakref import WeakSet

import torch

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.split import Cut, split
from sllm_node.core.clock import Clock
from sllm_node.core.config import EngineConfig
from sllm_node.core.errors import KvMemoryError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, Share, Stall
from sllm_node.core.units import align_up
from sllm_node.device.base import Device, DeviceRange
from sllm_node.device.optional import step_kernels
from sllm_node.engine.arriving import Arrival, Arriving, EarlyThreads, needs_of
from sllm_node.engine.beforehand import import_for, read_codec, read_token_bytes
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.decode_batch import DecodeBatch
from sllm_node.engine.decode_ops import DecodeOps, KernelOps
from sllm_node.engine.engine import Engine
from sllm_node.engine.fused import FusedDecoder
from sllm_node.engine.graphs import CudaGraphs
from sllm_node.engine.interleave import Interleaving, Order
from sllm_node.engine.kept import KvPlace, Skeleton, build, layers_on
from sllm_node.engine.kv import KvCache, KvMemory, bytes_per_token
from sllm_node.engine.offload import Pool, Room
from sllm_node.engine.offloading import Offloads
from sllm_node.engine.parts import Parts
from sllm_node.engine.refusals import check_capacity, check_request
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.skeleton import Model, common_window
from sllm_node.engine.step_graphs import StepGraphs
from sllm_node.engine.steps import Gate, StepThread
from sllm_node.engine.text import TextCodec
from sllm_node.engine.turns import Turns
from sllm_node.engine.weights import WeightPart

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


class Memory(Pool, Protocol):
    """Where KV memory comes from, and chunks for what leaves it; the store satisfies it."""

    def capacity(self, device: str) -> int:
        """Return the bytes that weights and KV memory may share."""

    async def allocate(
        self, device: str, size: int, again: DeviceRange | None = None
    ) -> DeviceRange:
        """Take memory, or raise DeviceMemoryError; `again`: at the addresses of an earlier one."""


class Engines:
    """Makes the engines of a node's devices; owns their step threads."""

    def __init__(
        self,
        devices: Sequence[Device],
        memory: Memory,
        config: EngineConfig,
        clock: Clock,
        metrics: Metrics,
        ops_of: Callable[[Device, int], DecodeOps | None] | None = None,
    ) -> None:
        """`ops_of`: what decodes on a device, for sessions of so many tokens; None: its kernels."""
        self._devices = tuple(devices)
        self._ops_of = ops_of or self._kernel_ops
        self._kernels: dict[str, Any] = {}
        self._scratch: dict[str, ScratchMemory] = {}
        self._graphs: dict[str, StepGraphs] = {}
        self._memory = memory
        self._config = config
        self._clock = clock
        self._metrics = metrics
        gate = Gate()
        self._steps = {d.name: StepThread(clock, gate, config.torch_threads) for d in devices}
        self._turns = {d.name: Interleaving(self.order(), clock) for d in devices}
        self._early = EarlyThreads(lambda: StepThread(clock, gate, config.torch_threads))
        self._builder = StepThread(clock, gate, config.torch_threads)
        self._readers = ThreadPoolExecutor(2, "sllm-codec")
        room = Room(memory, config.kv_offload_bytes) if config.kv_offload else None
        self._offloads = Offloads(room, clock, metrics)
        self._capacity: dict[Path, int] = {}
        """Tokens that the KV memory of a model holds, by its folder; known from its config."""
        self._kept: OrderedDict[Path, tuple[Checkpoint, Skeleton]] = OrderedDict()
        """Modules of models that left their device, used longest ago first."""
        self._opened: WeakSet[Engine] = WeakSet()

    def order(self) -> Order:
        """Return what decides about turns on one device."""
        return Turns(self._config.inter_token_target_s, self._config.prefill_beside_tokens)

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
        codec, token_bytes = await loop.run_in_executor(self._readers, read_codec, directory)
        self._learn(directory, token_bytes)
        return codec

    async def skeleton(self, checkpoint: Checkpoint) -> Skeleton:
        """Return the module, kept from an earlier replica or built without weights.

        Raises:
            UnsupportedArchitectureError: the step loop can't serve it.
        """
        kept = self._kept.pop(checkpoint.path, None)
        if kept is not None and kept[0] == checkpoint:
            return kept[1]
        if kept is not None:
            kept[1].take_kv(())
        return await self._builder.run_alone(build, checkpoint.path)

    def is_kept(self, checkpoint: Checkpoint) -> bool:
        """Tell whether the module of an earlier replica waits for the next one."""
        kept = self._kept.get(checkpoint.path)
        return kept is not None and kept[0] == checkpoint

    def give_back(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        """Keep a module that nobody uses any more for the next load of its model."""
        before = self._kept.pop(checkpoint.path, None)
        if before is not None and before[1] is not skeleton:
            before[1].take_kv(())
        self._kept[checkpoint.path] = (checkpoint, skeleton)
        while len(self._kept) > KEPT_MODULES_MAX:
            _, (_, oldest) = self._kept.popitem(last=False)
            oldest.take_kv(())

    def forget(self, model: ModelId) -> None:
        """Drop the modules kept of a checkpoint that was removed."""
        for path, (checkpoint, skeleton) in list(self._kept.items()):
            if checkpoint.model == model:
                skeleton.take_kv(())
                del self._kept[path]
                self._capacity.pop(path, None)

    async def open(self, lease: WeightSource, skeleton: Skeleton, codec: TextCodec) -> Engine:
        """Bind the weights of `lease` and take KV memory.

        If the bytes are still on their way, the engine's steps wait for them until it is told that
        it is `loaded`.

        Raises:
            CheckpointFormatError: index and module do not agree.
            KvMemoryError: not one block of it may be had.
            DeviceMemoryError: there is no room for KV memory.
        """
        index, config = lease.checkpoint.index, self._config
        count = self._blocks_for(skeleton.token_bytes)
        if not count:
            size = skeleton.token_bytes * config.block_tokens
            raise KvMemoryError(lease.checkpoint.model, size, config.kv_cache_bytes)
        blocks = Blocks(count, config.block_tokens, is_caching=config.prefix_cache)
        device = lease.parts[0].part.device
        steps = self._steps[device]
        buffers = tuple(part.buffer for part in lease.parts)
        if skeleton.bound_to not in ((), buffers):  # somewhere else
            skeleton.take_kv(())
            skeleton = await self._builder.run_alone(build, lease.checkpoint.path)
        place = await self._kv_place(lease, skeleton, blocks.capacity_tokens, steps)
        try:
            arriving = self._arriving(lease, skeleton.model)
        except BaseException:
            place.close()
            raise

        def let_go(is_trusted: bool) -> None:  # noqa: FBT001 - the one thing that it is told
            if is_trusted:
                place.unmap()
                skeleton.kv = place
            else:
                place.close()

        def keep() -> None:
            self.give_back(lease.checkpoint, skeleton)

        parts = Parts(
            lease.checkpoint.model, skeleton.model, place.cache,
            tuple(one.buffer for one in place.memory), blocks, place.decode, index.context_tokens,
            common_window(skeleton.shapes), codec, self._check, let_go, keep,
            arriving=arriving,
            offloading=self._offloads.of(lease.checkpoint.model, place.cache, blocks.block_tokens),
            seat=self._turns[device].join(),  # last: what fails leaves none behind
        )  # fmt: skip
        engine = Engine(parts, self._config, steps, self._clock, self._metrics)
        self._opened.add(engine)
        return engine

    async def _kv_place(
        self, lease: WeightSource, skeleton: Skeleton, slots: int, steps: StepThread
    ) -> KvPlace:
        """Take KV memory, where it was before if it can be; bind weights that are not bound yet."""
        layers = layers_on(lease.parts, lease.checkpoint.index, skeleton.shapes)
        dtype = skeleton.model.dtype
        sizes = [(device, bytes_per_token(shapes, dtype) * slots) for device, shapes in layers]
        known = skeleton.take_kv(sizes)
        memory = await self._kv_memory(lease, skeleton, sizes, known)
        try:
            if not skeleton.bound_to:
                await steps.run_alone(skeleton.bind, lease.checkpoint.index, lease.parts)
            if known is not None:
                return known
            counts = [len(shapes) for _, shapes in layers]
            taken = tuple(
                KvMemory(device, count, buffer)
                for (device, _), count, buffer in zip(sizes, counts, memory, strict=True)
            )
            cache = await steps.run(KvCache, skeleton.shapes, slots, dtype, taken)
            decode = await steps.run(self._decode_batch, lease, skeleton, cache, slots)
        except BaseException:
            for buffer in memory:
                buffer.close()
            raise
        return KvPlace(taken, cache, decode)

    def _arriving(self, lease: WeightSource, model: Model) -> Arriving | None:
        if lease.arrival is None:
            return None
        needs = needs_of(model, lease.checkpoint.index, [one.part for one in lease.parts])
        return Arriving(needs, lease.arrival, self._early)

    async def _kv_memory(
        self,
        lease: WeightSource,
        skeleton: Skeleton,
        sizes: Sequence[tuple[str, int]],
        known: KvPlace | None,
    ) -> list[DeviceRange]:
        """Take memory beside each part; without room, the module waits for the next load."""
        places = [None] * len(sizes) if known is None else [one.buffer for one in known.memory]
        memory: list[DeviceRange] = []
        try:
            for (device, size), again in zip(sizes, places, strict=True):
                memory.append(await self._memory.allocate(device, size, again))
        except BaseException:
            for buffer in memory:
                buffer.close()
            if known is not None:
                known.close()
            self.give_back(lease.checkpoint, skeleton)
            raise
        return memory

    def _decode_batch(
        self, lease: WeightSource, skeleton: Skeleton, cache: KvCache, slots: int
    ) -> DecodeBatch | None:
        """Return fast decode steps, if device and model have them; on the step thread."""
        if len(lease.parts) != 1:
            return None
        name = lease.parts[0].part.device
        device = next(device for device in self._devices if device.name == name)
        longest = min(lease.checkpoint.index.context_tokens, slots)
        ops = self._ops_of(device, longest)
        decoder = None if ops is None else FusedDecoder.of(skeleton.model, skeleton.shapes, ops)
        if decoder is None:
            return None
        size = self._config.block_tokens
        torch_device = cache.keys[0].device
        memory = self._scratch.setdefault(name, ScratchMemory(torch_device))
        graphs = self._step_graphs(name, torch_device) if torch_device.type == "cuda" else None
        return DecodeBatch(decoder, cache, size, -(-longest // size), memory, graphs)

    def _step_graphs(self, name: str, device: torch.device) -> StepGraphs:
        """Return the graphs of a device's steps."""
        if name not in self._graphs:
            most, failed = self._config.graphs_max, self._metrics.graph_failures.labels(name)
            self._graphs[name] = StepGraphs(CudaGraphs(device), most, name, failed.inc)
        return self._graphs[name]

    def _kernel_ops(self, device: Device, longest: int) -> DecodeOps | None:
        """Return our kernels; None: the device has none."""
        if device.name not in self._kernels:
            self._kernels[device.name] = step_kernels(device)
        kernels = self._kernels[device.name]
        return None if kernels is None else KernelOps(kernels, longest)

    def _check(self) -> None:
        for device in self._devices:
            device.check()

    async def warm(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Import what these models need before the first request: seconds, once per architecture.

        And learn how many tokens fit, which other nodes are told.
        """
        found = {checkpoint.index.architecture: checkpoint.path for checkpoint in checkpoints}
        for path in found.values():
            await self._builder.run_alone(import_for, path)
        for checkpoint in checkpoints:
            token_bytes = await self._builder.run_alone(read_token_bytes, checkpoint.path)
            if token_bytes:
                self._learn(checkpoint.path, token_bytes)

    def stalled(self) -> Stall | None:
        """Return why engines don't move, or None."""
        watches = [e.watch for e in self._opened if e.watch.stalled_s is not None]
        if watches:
            watches.sort(key=lambda watch: watch.model)
            reason = "; ".join(watch.describe() for watch in watches)
            return Stall(reason, tuple(watch.model for watch in watches))
        limit_s = self._config.stall_after_s
        for name, steps in self._steps.items():  # what is no engine's step: memory given back
            busy_s = steps.busy_s()
            if limit_s and busy_s > limit_s:
                return Stall(f"a job on {name} has taken {busy_s:.0f} s (engine.stall_after_s)")
        return None

    def close(self) -> None:
        """Stop the threads; engines must be closed."""
        for _, skeleton in self._kept.values():
            skeleton.take_kv(())
        self._kept.clear()
        for steps in (*self._steps.values(), *self._early.all, self._builder):
            steps.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _learn(self, directory: Path, token_bytes: int) -> None:
        self._capacity[directory] = self._blocks_for(token_bytes) * self._config.block_tokens

    def _blocks_for(self, token_bytes: int) -> int:
        return self._config.kv_cache_bytes // (token_bytes * self._config.block_tokens)
