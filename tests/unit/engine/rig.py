"""An engine over a checkpoint on disk, without store and scheduler, and the oracle beside it."""

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, Part, SamplingParameters, SessionId
from sllm_node.device.base import DeviceBuffer
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.engines import Engines

GREEDY = SamplingParameters(temperature=0.0)


class Weights:
    """A checkpoint's bytes on a device, as a lease shows them."""

    arrival: Any = None

    def __init__(self, checkpoint, device):
        self.checkpoint = checkpoint
        index = checkpoint.index
        self.buffer = device.allocate(index.size)
        self.parts = (WeightsPart(Part(device.name, 0, index.size), self.buffer),)
        whole = b"".join((checkpoint.path / shard.name).read_bytes() for shard in index.shards)
        np.copyto(self.buffer.array, np.frombuffer(whole, np.uint8))


@dataclass(frozen=True)
class WeightsPart:
    part: Part
    buffer: DeviceBuffer


class LentChunks:
    """Pinned memory in the place of the store's chunks."""

    def __init__(self, device, count, size):
        self.buffers = [device.pin(size, huge_pages=False) for _ in range(count)]
        self.views = [buffer.view for buffer in self.buffers]

    def close(self):
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()


class DeviceMemory:
    """KV memory straight from the devices, and chunks of pinned memory."""

    chunk_bytes = 64 << 10

    def __init__(self, *devices):
        self.devices = {device.name: device for device in devices}
        self.loans = []

    def lend(self, count):
        device = next(iter(self.devices.values()))
        self.loans.append(LentChunks(device, count, self.chunk_bytes))
        return self.loans[-1]

    def capacity(self, device):
        return self.devices[device].memory_total

    async def allocate(self, device, size, again=None):
        if again is None:
            return self.devices[device].allocate(size)
        mapped = threading.Event()
        again.map((0,)).on_done(lambda _: mapped.set())
        mapped.wait()  # until the memory that it had has gone
        return again


def engines_of(device, config, clock=None, ops_of=None):
    clock = clock or MonotonicClock()
    return Engines([device], DeviceMemory(device), config, clock, Metrics(), ops_of)


@contextlib.asynccontextmanager
async def engine_of(checkpoint, *, ops_of=None, **config):
    """Yield an engine; on leaving, everything it took must be given back."""
    async with engine_and_engines_of(checkpoint, None, ops_of, **config) as (engine, _):
        yield engine


@contextlib.asynccontextmanager
async def engine_and_engines_of(checkpoint, clock, ops_of=None, **config):
    """Yield an engine and those who made it; on leaving, everything must be given back."""
    settings = {"kv_cache_bytes": ByteSize(8 << 20), "torch_threads": 1, **config}
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(**settings), clock, ops_of)
        weights = Weights(checkpoint, device)
        codec = await engines.load_codec(checkpoint.path)
        skeleton = await engines.skeleton(checkpoint)
        engine = await engines.open(weights, skeleton, codec)
        try:
            yield engine, engines
        finally:
            await engine.close()
            assert engine.kv_usage == 0.0
            weights.buffer.close()
            engines.close()
        assert device.memory_used == 0


_numbers = iter(range(10**9))


def ask(prompt, max_tokens=12, sampling=GREEDY, **more):
    session = SessionId(f"s{next(_numbers)}")
    return GenerationRequest(
        session, ModelId("m"), tuple(prompt), sampling, max_tokens, **{"ignore_eos": True, **more}
    )


async def collect(generation):
    """Return text, tokens, logprobs and finish of a generation."""
    text, tokens, logprobs, finish = "", (), (), None
    async for chunk in generation:
        text += chunk.text
        tokens += chunk.tokens
        logprobs += chunk.logprobs
        finish = chunk.finish
    return text, tokens, logprobs, finish


def reference(model, prompt, count, *, use_cache=True):
    """Return the greedy tokens that transformers' generate() gives."""
    from transformers import GenerationConfig

    model.generation_config.eos_token_id = None  # else generate() stops there, or suppresses it
    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, use_cache=use_cache
    )
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=config,
        )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())
