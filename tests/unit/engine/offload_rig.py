"""A model, a store and an engine with few blocks, whose sessions go to the pinned pool."""

import asyncio
from typing import Any

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.split import split
from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.core.units import MIB
from sllm_node.engine.engines import Engines
from sllm_node.store.store import Store
from tests.models import make_checkpoint
from tests.unit.engine.rig import ask, collect

MODEL = ModelId("m")
PROMPTS = [(*range(10, 17), *range(100 + n, 103 + n)) for n in range(0, 60, 10)]


class Served:
    """A tiny model in a store, with an engine for each of several configs, one after another."""

    def __init__(self, root, devices):
        self.checkpoint = make_checkpoint(root / "store", "m")
        self.root, self.devices = root / "store", devices
        self.metrics = Metrics()

    async def __aenter__(self):
        catalog = Catalog(self.root)
        catalog.scan()
        config = StoreConfig(pool_bytes=ByteSize(64 * MIB), chunk_bytes=ByteSize(16 * MIB))
        self.store = Store(catalog, self.devices, config, ManualClock(), self.metrics)
        await self.store.start()
        return self

    async def open(self, **config) -> Any:
        settings = {"block_tokens": 4, "max_step_tokens": 16, "kv_cache_bytes": ByteSize(8 * MIB)}
        self.engines = Engines(
            self.devices, self.store, EngineConfig(**{**settings, **config}), ManualClock(),
            self.metrics,
        )  # fmt: skip
        codec = await self.engines.load_codec(self.checkpoint.path)
        placement = placement_on(self.devices, self.checkpoint.index)
        self.lease = await self.store.acquire(MODEL, placement)
        skeleton = await self.engines.skeleton(self.checkpoint)
        self.engine: Any = await self.engines.open(self.lease, skeleton, codec)
        return self.engine

    async def crowded(self, blocks, **config):
        """Open one with so few blocks; no time passes, so copies are always taken."""
        engine = await self.open()
        size = sum(buffer.size for buffer in engine._parts.buffers) // engine._parts.blocks.total
        await self.close()
        limits = {"kv_cache_bytes": ByteSize(size * blocks), "kv_offload_bytes": ByteSize(32 * MIB)}
        return await self.open(kv_offload=True, **limits, **config)

    async def close(self):
        await self.engine.close()
        self.lease.release()
        self.store.evict(MODEL, Tier.DEVICE, "operator")
        self.engines.close()

    async def check_tokens(self, prompts, resume, *, rounds, **options):
        """Ask for the tokens of `prompts` alone, then of all at once with few blocks."""
        engine = await self.open(resume=resume)
        expected = [(await collect(engine.submit(ask(prompt, 60))))[1] for prompt in prompts]
        await self.close()
        for is_caching in (False, True):
            engine = await self.crowded(30, resume=resume, prefix_cache=is_caching, **options)
            for _ in range(rounds):
                sent = [engine.submit(ask(prompt, 60)) for prompt in prompts]
                got = await asyncio.gather(*map(collect, sent))
                assert [tokens for _, tokens, _, _ in got] == expected
            assert engine._preempted._value.get() > 0
            assert engine._parts.blocks.free == engine._parts.blocks.total
            assert not engine._parts.offloading.offload.kept
            await self.close()
        assert min(self.copied("out"), self.copied("in")) > 0
        assert not self.store.pool_chunks_lent

    def copied(self, way):
        return self.metrics.kv_offload_bytes.labels(MODEL, way)._value.get()

    async def __aexit__(self, kind, *_):
        if kind is not None:
            return
        await self.store.close()
        for device in self.devices:
            device.close()


def placement_on(devices, index):
    """Return the placement of a model on all of `devices`."""
    if len(devices) == 1:
        return (Part(devices[0].name, 0, index.size),)
    cuts = split(index, 0, (index.size, index.size)) or ()
    return tuple(Part(d.name, cut.start, cut.end) for d, cut in zip(devices, cuts, strict=True))
