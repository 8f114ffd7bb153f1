"""Encoded checkpoints on real GPUs: every byte right, whatever comes in between, and nothing leaks."""

import asyncio
import random

import pytest

from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.core.config import ByteSize
from sllm_node.core.errors import ChecksumError, CodecError, DeviceMemoryError, ModelBusyError
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.core.units import MIB
from tests.gpu.test_loads import open_devices
from tests.unit.store.handmade import CHUNK, Rig, chunk_of, delivered_by

pytestmark = pytest.mark.gpu

A = ModelId("a")
MODELS = "abcd"
SHARDS = (40 * CHUNK, 33 * CHUNK + 4096)
STAGING = 4 * MIB
CYCLES = 300


@pytest.fixture(autouse=True)
def encoded(monkeypatch):
    monkeypatch.setattr(Rig, "codec", EXPONENT)


def rig_on(tmp_path, devices, **options):
    given = {
        "names": MODELS, "shards": SHARDS, "chunks": 160, "piece_bytes": ByteSize(2 * MIB),
        "decode_staging_bytes": ByteSize(STAGING), **options,
    }  # fmt: skip
    return Rig(tmp_path, devices=devices, **given)


def split(rig, middle):
    size = len(rig.bytes[A])
    return (Part("cuda:0", 0, middle), Part("cuda:1", middle, size))


def assert_only_staging(devices):
    """Nothing is mapped but what the decoders keep."""
    assert all(device.memory_used in (0, STAGING) for device in devices)


async def bytes_on(rig, model=A, placement=None):
    with await rig.store.acquire(model, placement) as lease:
        delivered = delivered_by(lease)
    rig.store.evict(model, Tier.DEVICE, "operator", placement)
    return delivered


@pytest.mark.parametrize("unit", [1, 7, 40])
async def test_what_is_delivered_is_what_was_written(tmp_path, unit):
    devices = open_devices(1, 64 * MIB)
    size = ByteSize(unit * 3 * 4096)
    async with rig_on(tmp_path, devices, chunk_bytes=size, pool_bytes=ByteSize(2 * MIB)) as rig:
        for model in MODELS:
            for _ in range(3):
                assert await bytes_on(rig, ModelId(model)) == rig.bytes[ModelId(model)]
        assert rig.reports[-1].decode_s > 0
        assert rig.reports[-1].bytes_stored < 0.8 * rig.reports[-1].bytes_total
        assert_only_staging(devices)
    for device in devices:
        device.close()


async def test_staging_memory_of_a_few_chunks_is_enough(tmp_path):
    devices = open_devices(1, 64 * MIB)
    staging = ByteSize(2 * MIB)
    async with rig_on(tmp_path, devices, decode_staging_bytes=staging) as rig:
        for _ in range(20):
            assert await bytes_on(rig) == rig.bytes[A]
    devices[0].close()


@pytest.mark.parametrize("middle", [256, 31 * CHUNK + 512, 64 * CHUNK])
async def test_a_chunk_that_two_devices_share_is_decoded_for_both(tmp_path, middle):
    devices = open_devices(2, 256 * MIB)
    async with rig_on(tmp_path, devices) as rig:
        for _ in range(3):
            assert await bytes_on(rig, A, split(rig, middle)) == rig.bytes[A]
    for device in devices:
        device.close()


async def test_bytes_that_come_over_relays_are_right(tmp_path):
    devices = open_devices(2, 512 * MIB)
    async with rig_on(tmp_path, devices) as rig:
        await rig.store.prefetch(A)
        for _ in range(20):
            assert await bytes_on(rig) == rig.bytes[A]
        assert any(report.bytes_relayed for report in rig.reports)
    for device in devices:
        device.close()


async def test_only_what_a_device_has_lost_is_decoded_again(tmp_path):
    devices = open_devices(1, 13 * MIB)  # staging, and less than two models of three pieces
    async with rig_on(tmp_path, devices, shards=(300 * CHUNK,), chunks=700) as rig:
        for _ in range(5):
            for model in "ab":
                with await rig.store.acquire(ModelId(model)) as lease:
                    assert delivered_by(lease) == rig.bytes[ModelId(model)]
                rig.store.evict(ModelId(model), Tier.DEVICE, "room")
        assert 0 < rig.reports[-1].bytes_kept < len(rig.bytes[A])
    devices[0].close()


async def test_damage_is_found_by_the_decoder_and_memory_comes_back(tmp_path):
    devices = open_devices(1, 64 * MIB)
    async with rig_on(tmp_path, devices, verify="never") as rig:

        def damage(view, offset, count):
            if offset <= 3 * 12288 < offset + count:
                view[3 * 12288 - offset] ^= 0xFF
            return count

        rig.files.after_read = damage
        with pytest.raises(CodecError, match="shard-0000"):
            await rig.store.acquire(A)
        rig.store.evict(A, Tier.DRAM, "test")
        assert_only_staging(devices)
        rig.files.after_read = lambda view, offset, count: count
        assert await bytes_on(rig) == rig.bytes[A]
        devices[0].check()
    devices[0].close()


@pytest.mark.parametrize("codec", [RAW, EXPONENT])
async def test_the_gpu_checks_what_comes_from_dram(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(Rig, "codec", codec)
    devices = open_devices(1, 64 * MIB)
    async with rig_on(tmp_path, devices, verify="always") as rig:
        for _ in range(3):
            assert await bytes_on(rig) == rig.bytes[A]
            assert rig.reports[-1].verified_bytes == len(rig.bytes[A])
        chunk = chunk_of(rig.store._ledger, A, 5)
        rig.store._machinery.pool.view(chunk, 4096)[99] ^= 1
        with pytest.raises(ChecksumError) as caught:
            await rig.store.acquire(A)
        assert caught.value.offset == 5 * rig.chunk
        assert await bytes_on(rig) == rig.bytes[A]
        assert_only_staging(devices)
    devices[0].close()


@pytest.mark.parametrize("count", [1, 2])
async def test_random_cycles_leave_nothing_behind(tmp_path, count):
    devices = open_devices(count, (4 * 4 + 8 + 128 * (count - 1)) * MIB)
    numbers = random.Random(count)

    async def use(model, placement):
        with await rig.store.acquire(ModelId(model), placement) as lease:
            await asyncio.sleep(0)
            if numbers.random() < 0.2:
                assert delivered_by(lease) == rig.bytes[ModelId(model)]

    async with rig_on(tmp_path, devices, max_concurrent_loads=3) as rig:
        size = len(rig.bytes[A])
        placements = [(Part(device.name, 0, size),) for device in devices]
        if count > 1:
            placements.append(split(rig, 31 * CHUNK + 512))
        tasks = []
        for _ in range(CYCLES):
            model, act = numbers.choice(MODELS), numbers.random()
            if act < 0.5:
                tasks.append(asyncio.create_task(use(model, numbers.choice(placements))))
            elif act < 0.65 and tasks:
                numbers.choice(tasks).cancel()
            elif not (rig.store.leases(ModelId(model)) or model in rig.store._flights.loads):
                tier = numbers.choice([Tier.DEVICE, Tier.DRAM])
                rig.store.evict(ModelId(model), tier, numbers.choice(["room", "operator"]))
            if numbers.random() < 0.3:
                await asyncio.gather(*tasks[-3:], return_exceptions=True)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for model in MODELS:
            await rig.store.settled(ModelId(model))
            rig.store.evict(ModelId(model), Tier.DEVICE, "operator")
        wanted = (type(None), DeviceMemoryError, ModelBusyError, asyncio.CancelledError)
        assert [one for one in ended if not isinstance(one, wanted)] == []
        assert sum(one is None for one in ended) > CYCLES // 8
        lent = [rig.store._tiers[device.name].lent for device in devices]
        assert all(d.memory_used in (n, n + STAGING) for d, n in zip(devices, lent, strict=True))
    for device in devices:
        device.close()
