"""Loads on real GPUs: nothing leaks, bytes are right, the same graph replays after an eviction."""

import asyncio
import random
import threading

import pytest
import torch

from sllm_node.core.errors import DeviceMemoryError, ModelBusyError
from sllm_node.core.types import ModelId, Part, Placement, Tier
from sllm_node.core.units import MIB
from tests.unit.store.handmade import CHUNK, Rig, delivered_by

pytestmark = pytest.mark.gpu

MODELS = "abcdef"
SHARDS = (40 * CHUNK, 33 * CHUNK + 4096)
CYCLES = 500


def open_devices(count, memory):
    from sllm_node.device.cuda import CudaDevice, device_count

    if device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    numbers = range(count)
    return [
        CudaDevice(number, memory, siblings=[other for other in numbers if other != number])
        for number in numbers
    ]


def placements(rig, model):
    size = len(rig.bytes[ModelId(model)])
    names = [device.name for device in rig.devices]
    found: list[Placement] = [(Part(name, 0, size),) for name in names]
    if len(names) > 1:
        middle = 31 * CHUNK + 512
        found.append((Part(names[0], 0, middle), Part(names[1], middle, size)))
    return found


async def use(rig, model, placement, numbers):
    with await rig.store.acquire(ModelId(model), placement) as lease:
        await asyncio.sleep(0)
        if numbers.random() < 0.1:
            assert delivered_by(lease) == rig.bytes[ModelId(model)]


@pytest.mark.parametrize("count", [1, 2])
async def test_five_hundred_random_cycles_leave_nothing_behind(tmp_path, count):
    # Four models of one piece; of two devices also a relay's ring, and a quarter for decoding.
    memory = (8 if count == 1 else 182) * MIB
    devices = open_devices(count, memory)
    options = {"names": MODELS, "shards": SHARDS, "chunks": 160, "piece_bytes": 2 * MIB}
    numbers = random.Random(count)
    async with Rig(tmp_path, devices=devices, max_concurrent_loads=3, **options) as rig:
        before = [device.driver_free() for device in devices]
        tasks = []
        for _ in range(CYCLES):
            model = numbers.choice(MODELS)
            act = numbers.random()
            if act < 0.5:
                placement = numbers.choice(placements(rig, model))
                tasks.append(asyncio.create_task(use(rig, model, placement, numbers)))
            elif act < 0.65 and tasks:
                numbers.choice(tasks).cancel()
            elif not (rig.store.leases(ModelId(model)) or model in rig.store._flights.loads):
                tier = numbers.choice([Tier.DEVICE, Tier.DRAM])
                rig.store.evict(ModelId(model), tier, numbers.choice(["room", "operator"]))
            if numbers.random() < 0.3:
                await asyncio.gather(*tasks[-3:], return_exceptions=True)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        while rig.store._flights.loads:
            await next(iter(rig.store._flights.loads.values())).ended
        rig.assert_quiet()
        wanted = (type(None), DeviceMemoryError, ModelBusyError, asyncio.CancelledError)
        assert [one for one in ended if not isinstance(one, wanted)] == []
        assert sum(one is None for one in ended) > CYCLES // 8
        for model in MODELS:
            rig.store.evict(ModelId(model), Tier.DEVICE, "operator")
        assert [device.driver_free() for device in devices] == before
    for device in devices:
        device.close()


async def test_a_graph_replays_after_its_weights_were_evicted_and_loaded_again(tmp_path):
    (device,) = open_devices(1, 64 * MIB)
    options = {"names": "a", "shards": SHARDS, "chunks": 160, "piece_bytes": 2 * MIB}
    async with Rig(tmp_path, devices=[device], **options) as rig:
        lease = await rig.store.acquire(ModelId("a"))
        flat = torch.as_tensor(lease.parts[0].buffer.array, device=device.name)
        weight = flat[: 256 * 1024].view(torch.uint8).view(512, 512).float
        source = torch.randn(512, 512, device=device.name)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            source @ weight()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = source @ weight()
        graph.replay()
        torch.cuda.synchronize()
        first = result.clone()
        lease.release()
        full = device.driver_free()
        rig.store.evict(ModelId("a"), Tier.DEVICE, "operator")
        assert device.driver_free() > full
        other = device.allocate(16 * MIB)  # somebody else gets the memory in between
        torch.as_tensor(other.array, device=device.name).fill_(7)
        torch.cuda.synchronize()
        other.close()
        with await rig.store.acquire(ModelId("a")):
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(result, first)
    device.close()


def test_a_refused_registration_names_the_remedy():
    import resource

    from sllm_node.core.errors import DeviceError

    (device,) = open_devices(1, 64 * MIB)
    with pytest.raises(DeviceError) as caught:
        device.pin(1 << 50, huge_pages=True)
    assert "pool_bytes" in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)
    device.close()


def test_waiting_for_a_copy_leaves_python_to_others():
    (device,) = open_devices(1, 1024 * MIB)
    pinned, target = device.pin(512 * MIB, huge_pages=True), device.allocate(512 * MIB)
    stream = device.stream()
    for _ in range(20):
        stream.copy_in(target, 0, pinned.view)
    happened, count = threading.Event(), 0
    stream.record().on_done(lambda error: happened.set())
    while not happened.is_set():
        count += 1
    assert count > 1000
    stream.close()
    target.close()
    pinned.close()
    device.close()
