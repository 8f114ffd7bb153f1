"""The driver on the real store, device and catalogue; only the engines are fakes."""

import asyncio
import contextlib
from contextlib import asynccontextmanager

import pytest

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, Config, DeviceConfig, ScheduleConfig, StoreConfig
from sllm_node.core.errors import ChecksumError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, ModelState, Tier
from sllm_node.device.cpu import CpuDevice
from sllm_node.schedule.driver import Service
from sllm_node.store.store import Store
from tests.unit.schedule.fakes import FakeEngines, Node
from tests.unit.store.handmade import CHUNK, write_checkpoint

NAMES = ("a", "b", "c")
SIZE = 8 * CHUNK


@asynccontextmanager
async def real_node(root, models=1):
    """Room for `models` on the device and for two in DRAM; at the end nothing is held."""
    for name in NAMES:
        write_checkpoint(root, name)
    config = Config(
        store=StoreConfig(
            path=str(root),
            pool_bytes=ByteSize(2 * SIZE),
            chunk_bytes=ByteSize(CHUNK),
            piece_bytes=ByteSize(CHUNK // 2),
            huge_pages=False,
        ),
        device=DeviceConfig(memory_bytes=ByteSize(models * SIZE)),
        schedule=ScheduleConfig(max_wait_s=0.02),
    )
    device = CpuDevice(config.device.memory_bytes)
    catalog, clock, metrics = Catalog(root), MonotonicClock(), Metrics()
    store = Store(catalog, [device], config.store, clock, metrics)
    await store.start()
    engines = FakeEngines()
    engines.pace = 0.0
    service = Service(config, catalog, store, engines, clock, metrics)
    try:
        async with asyncio.timeout(30):
            yield Node(service, store, engines, metrics, root)
    finally:
        await service.close()
        assert all(store.leases(ModelId(name)) == 0 for name in NAMES)
        await store.close()
        assert device.memory_used == 0
        device.close()


async def test_many_sessions_on_more_models_than_fit_all_finish(tmp_path):
    async with real_node(tmp_path) as node:
        texts = await asyncio.gather(*(node.ask(NAMES[i % 3], tokens=5) for i in range(48)))
        assert texts == ["xxxxx"] * 48
        assert node.count("sllm_evictions_total", tier="device", reason="room") >= 2


async def test_readers_that_go_away_at_any_moment_leave_nothing_behind(tmp_path):
    async with real_node(tmp_path) as node:

        async def impatient(i):
            stream = node.open(NAMES[i % 3], tokens=5)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001 * (i % 7)):
                    async for _ in stream:
                        pass
            stream.cancel()

        await asyncio.gather(*(impatient(i) for i in range(60)))
        assert node.service.sessions() == []
        assert await node.ask("c") == "xxx"


async def test_a_load_cancelled_in_the_moment_it_ends_leaves_its_memory_to_the_next(tmp_path):
    async with real_node(tmp_path) as node:
        stream = node.open("a", tokens=5)
        node.store.on_load = lambda report: stream.cancel()
        with contextlib.suppress(StopAsyncIteration):
            await anext(stream)
        node.store.on_load = lambda report: None
        assert await node.ask("b") == "xxx"


async def test_a_damaged_checkpoint_is_a_typed_error_and_the_others_are_served(tmp_path):
    async with real_node(tmp_path, models=2) as node:
        shard = tmp_path / "a" / "shard-00000.bin"
        data = bytearray(shard.read_bytes())
        data[CHUNK + 5] ^= 1
        shard.write_bytes(data)
        results = await asyncio.gather(node.ask("a"), node.ask("b"), return_exceptions=True)
        assert isinstance(results[0], ChecksumError)
        assert results[1] == "xxx"
        shard.write_bytes(
            bytes(data[: CHUNK + 5]) + bytes([data[CHUNK + 5] ^ 1]) + data[CHUNK + 6 :]
        )
        assert await node.ask("a") == "xxx"


async def test_a_model_that_leaves_the_device_stays_in_dram(tmp_path):
    async with real_node(tmp_path) as node:
        await node.ask("a", keep_alive_s=0)
        await node.service.unload("a")
        status = node.service.status("a")
        assert (status.state, status.tier) == (ModelState.IDLE, Tier.DRAM)
        assert status.bytes_by_tier[Tier.DEVICE] == 0
        await node.service.load("a")
        assert node.service.status("a").tier is Tier.DEVICE


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, 100])
async def test_a_load_that_a_hint_began_leaves_nothing_to_the_session_that_takes_its_room(
    tmp_path, turns
):
    async with real_node(tmp_path) as node:
        assert node.service.hint(ModelId("a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await node.ask("b") == "xxx"
        assert node.store.leases(ModelId("a")) == 0
        assert await node.ask("a") == "xxx"


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003])
async def test_closing_while_models_load_leaves_nothing_behind(tmp_path, delay_s):
    async with real_node(tmp_path, models=3) as node:
        for name in NAMES:
            node.open(name)
        await asyncio.sleep(delay_s)


async def test_unload_gives_back_what_a_model_left_as_a_cache(tmp_path):
    async with real_node(tmp_path, models=2) as node:
        for name in NAMES:
            await node.ask(name)
        assert node.service.status("a").state is ModelState.IDLE
        assert node.store.cached_bytes("cpu") > 0
        await node.service.unload("a")
        assert node.store.cached_bytes("cpu") == 0
