"""Encoded checkpoints on their way to devices: what is decoded, in part, and what goes wrong."""

import asyncio
import threading

import pytest

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.layout import TensorSpec
from sllm_node.codec.names import EXPONENT
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import (
    ChecksumError,
    CodecError,
    DeviceError,
    DeviceMemoryError,
    KernelError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.core.units import KIB, MIB
from sllm_node.device.cpu import CpuDevice
from sllm_node.device.cpu_decoder import CpuDecoder
from sllm_node.store.store import Store
from sllm_node.store.tier import DeviceTier
from tests.unit.checkpoint.raw import write_raw
from tests.unit.store.handmade import CHUNK, Rig, chunk_of, write_checkpoint

A, B = ModelId("a"), ModelId("b")
FILE_CHUNK = 2 * CHUNK


@pytest.fixture(autouse=True)
def encoded(monkeypatch):
    monkeypatch.setattr(Rig, "codec", EXPONENT)


class Gate(CpuDecoder):
    """Decodes when it is opened; what was enqueued is counted."""

    def __init__(self, *, verifies=False, needs_staging=False):
        super().__init__(verifies=verifies)
        self.needs_staging = needs_staging
        self.opened = threading.Event()
        self.opened.set()
        self.asked = threading.Event()
        self.jobs = []
        self.writes = []
        self.staging = []

    def stage_in(self, staging):
        self.staging.append(staging)

    def decode(self, link, destination, place, source, jobs, done):
        self.jobs += jobs.jobs
        self.writes += [(place + a, place + b) for job in jobs.jobs for a, b in job.writes]
        self.asked.set()
        gate = threading.Thread(
            target=self._later, args=(link, destination, place, source, jobs, done)
        )
        gate.start()

    def _later(self, *arguments):
        self.opened.wait()
        super().decode(*arguments)


class GatedDevice(CpuDevice):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments)
        self.gate = Gate(**settings)

    def decoder(self):
        return self.gate


def damage(rig, offset):
    """Let byte `offset` of the shard be wrong on every read of its unit."""

    def flip(view, at, count):
        if at <= offset < at + count:
            view[offset - at] ^= 0xFF
        return count

    rig.files.after_read = flip


async def test_the_pool_holds_encoded_bytes_and_devices_decoded_ones(tmp_path):
    async with Rig(tmp_path) as rig:
        with await rig.store.acquire(A) as lease:
            assert lease.report.bytes_stored == rig.stored[A] < len(rig.bytes[A])
            assert lease.report.bytes_total == len(rig.bytes[A])
            assert lease.report.decode_s > 0
            assert lease.report.is_encoded
            assert rig.store.residency(A) == {
                Tier.DEVICE: len(rig.bytes[A]), Tier.DRAM: rig.stored[A], Tier.NVME: rig.stored[A]
            }  # fmt: skip
        value = rig.metrics.registry.get_sample_value
        assert value("sllm_load_stored_bytes_total") == rig.stored[A]
        assert value("sllm_decode_seconds_total") > 0
        assert value("sllm_load_bytes_total", {"source": "nvme"}) == len(rig.bytes[A])


@pytest.mark.parametrize(("codec", "kept"), [("raw", 7), ("exp", 10)])
async def test_a_pool_keeps_1_4_times_as_many_models_when_they_are_encoded(tmp_path, codec, kept):
    """Chunks stand to the pool's as by default; pages weigh more here than for larger ones."""
    names = [f"m{number:02}" for number in range(12)]
    file_chunk = 128 * KIB if codec == "exp" else 2 * MIB
    for name in names:
        specs = [TensorSpec("a", "U8", (64,)), TensorSpec("weight", "BF16", (9 * MIB,))]
        write_raw(tmp_path, name, specs, chunk_bytes=file_chunk, shard_bytes=64 * MIB, codec=codec)
    catalog = Catalog(tmp_path)
    catalog.scan()
    settings = StoreConfig(
        pool_bytes=ByteSize(70 * 2 * MIB), chunk_bytes=ByteSize(2 * MIB), huge_pages=False
    )
    store = Store(catalog, [CpuDevice(MIB)], settings, MonotonicClock(), Metrics())
    await store.start()
    for name in names:
        await store.prefetch(ModelId(name))
    sizes = {name: catalog.get(ModelId(name)).index.file_size for name in names}
    held = {name: store.residency(ModelId(name))[Tier.DRAM] for name in names}
    assert sum(held[name] == sizes[name] for name in names) == kept
    await store.close()


async def test_a_pool_chunk_holds_as_many_encoded_chunks_as_fit(tmp_path):
    sizes = {"chunk_bytes": ByteSize(5 * 12288), "pool_bytes": ByteSize(3 * 5 * 12288)}
    async with Rig(tmp_path, **sizes) as rig:
        await rig.check("a")
        assert rig.store.pool_chunks_used == 2
        units = rig.store._ledger.units(A)
        assert [len(unit.chunks) for unit in units] == [5, 3]
        await rig.check("a")
        assert rig.reports[-1].bytes_from_dram == len(rig.bytes[A])


@pytest.mark.parametrize("middle", [256, 5000 // 256 * 256, FILE_CHUNK, 3 * FILE_CHUNK + 4096])
async def test_a_chunk_that_two_devices_share_is_decoded_for_both(tmp_path, middle):
    async with Rig(tmp_path, devices=2) as rig:
        parts = (Part("cpu:0", 0, middle), Part("cpu:1", middle, len(rig.bytes[A])))
        await rig.check("a", parts)
        await rig.check("a", parts)
        rig.assert_quiet()


async def test_bytes_that_a_device_has_kept_are_not_written_again(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0")
    async with Rig(tmp_path, devices=[device]) as rig:
        await rig.check("a", reason="room")
        size = len(rig.bytes[A])
        taken = await rig.store.allocate("cpu:0", (1 << 20) - size + 24576 + 4096)
        taken.close()
        kept = rig.store.on_devices(A)["cpu:0"]
        assert 0 < kept < size
        assert kept % FILE_CHUNK
        device.gate.writes.clear()
        await rig.check("a", reason="room")
        writes = device.gate.writes
        assert writes[0][0] == kept
        assert sum(end - start for start, end in writes) == size - kept - CHUNK  # raw
        assert rig.reports[-1].bytes_kept == kept


async def test_damage_that_no_checksum_sees_is_a_typed_error_and_memory_comes_back(tmp_path):
    async with Rig(tmp_path, verify="never") as rig:
        damage(rig, 3 * 12288)
        with pytest.raises(CodecError, match=r"model 'a', shard-00000.bin, bytes 36864 to 49152"):
            await rig.store.acquire(A)
        rig.assert_quiet()
        assert rig.device.memory_used == 0
        rig.files.after_read = lambda view, offset, count: count
        await rig.check("a")  # what was damaged is read again
        assert rig.reports[-1].bytes_from_nvme >= FILE_CHUNK


async def test_damaged_encoded_bytes_do_not_pass_their_checksum(tmp_path):
    async with Rig(tmp_path) as rig:
        damage(rig, 12288)
        with pytest.raises(ChecksumError) as caught:
            await rig.store.acquire(A)
        assert (caught.value.offset, caught.value.size) == (12288, 12288)
        assert caught.value.tensors == (f"t0.{FILE_CHUNK}",)
        rig.assert_quiet()


@pytest.mark.parametrize("reason", ["cancel", "error"])
async def test_a_load_that_ends_between_copy_and_decoding_takes_nothing_with_it(tmp_path, reason):
    device = GatedDevice(1 << 20, "cpu:0")
    async with Rig(tmp_path, devices=[device], verify="never") as rig:
        device.gate.opened.clear()
        if reason == "error":
            damage(rig, 3 * 12288)
        load = asyncio.create_task(rig.store.acquire(A))
        await asyncio.to_thread(device.gate.asked.wait)
        if reason == "cancel":
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            assert device.memory_used > 0  # somebody may still write to it
        device.gate.opened.set()
        await asyncio.gather(load, return_exceptions=True)
        await rig.store.settled(A)
        rig.assert_quiet()
        assert device.memory_used == 0
        rig.files.after_read = lambda view, offset, count: count
        await rig.check("a")


async def test_what_is_always_checked_is_checked_by_the_device_when_it_comes_from_dram(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0", verifies=True)
    async with Rig(tmp_path, devices=[device], verify="always") as rig:
        await rig.check("a")
        assert all(job.digest is None for job in device.gate.jobs)
        device.gate.jobs.clear()
        await rig.check("a")
        assert len(device.gate.jobs) == 8
        assert all(job.digest is not None for job in device.gate.jobs)
        assert rig.reports[-1].verified_bytes == len(rig.bytes[A])
        chunk = chunk_of(rig.store._ledger, A, 3)
        rig.store._machinery.pool.view(chunk, 4096)[99] ^= 1
        with pytest.raises(ChecksumError) as caught:
            await rig.store.acquire(A)
        assert caught.value.offset == 3 * 12288
        rig.assert_quiet()
        await rig.check("a")
        assert rig.reports[-1].bytes_from_nvme == FILE_CHUNK


async def test_raw_checkpoints_are_checked_by_the_device_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Rig, "codec", "raw")
    device = GatedDevice(1 << 20, "cpu:0", verifies=True)
    async with Rig(tmp_path, devices=[device], verify="always") as rig:
        await rig.check("a")
        assert device.gate.jobs == []
        await rig.check("a")
        assert len(device.gate.jobs) == 8
        chunk = chunk_of(rig.store._ledger, A, 0)
        rig.store._machinery.pool.view(chunk, 4096)[99] ^= 1
        with pytest.raises(ChecksumError):
            await rig.store.acquire(A)


async def test_the_host_checks_where_the_device_must_not(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0", verifies=True)
    settings = {"verify": "always", "verify_on_device": False}
    async with Rig(tmp_path, devices=[device], **settings) as rig:
        await rig.check("a")
        await rig.check("a")
        assert all(job.digest is None for job in device.gate.jobs)
        assert rig.reports[-1].verified_bytes == len(rig.bytes[A])


async def test_staging_memory_is_taken_by_the_first_encoded_load_and_counted(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0", needs_staging=True)
    staging = 8 * FILE_CHUNK
    async with Rig(tmp_path, devices=[device], decode_staging_bytes=ByteSize(staging)) as rig:
        assert rig.store.capacity("cpu:0") == (1 << 20) - staging
        assert device.memory_used == 0
        await rig.check("a")
        assert [one.size for one in device.gate.staging] == [staging]
        assert device.memory_used == staging
        await rig.check("b")
        assert len(device.gate.staging) == 1


async def test_staging_memory_gets_smaller_where_there_is_little_room(tmp_path):
    device = GatedDevice(400_000 // 4096 * 4096, "cpu:0", needs_staging=True)
    async with Rig(tmp_path, devices=[device]) as rig:
        await rig.check("a")
        (staging,) = device.gate.staging
        assert staging.size <= device.memory_total - len(rig.bytes[A])


async def test_staging_memory_is_a_quarter_of_a_small_device_at_most(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0", needs_staging=True)
    async with Rig(tmp_path, devices=[device], decode_staging_bytes=ByteSize(512 << 20)) as rig:
        assert rig.store.capacity("cpu:0") == 3 << 18
        await rig.check("a")
        assert [one.size for one in device.gate.staging] == [1 << 18]


async def test_a_device_of_which_staging_memory_takes_all_is_refused(tmp_path):
    tier = DeviceTier(
        GatedDevice(1 << 20, "cpu:0", needs_staging=True), 4096, staging_bytes=1 << 20
    )
    tier.check_capacity()
    tier.prepare_decoder()
    with pytest.raises(DeviceError, match="1048576 of its 1048576 bytes; raise"):
        tier.check_capacity()


async def test_without_room_for_staging_memory_nothing_is_taken(tmp_path):
    device = GatedDevice(150_000 // 4096 * 4096, "cpu:0", needs_staging=True)
    async with Rig(tmp_path, devices=[device]) as rig:
        with pytest.raises(DeviceMemoryError):
            await rig.store.acquire(A)
        rig.assert_quiet()
        assert device.memory_used == 0


async def test_chunks_too_large_for_the_staging_memory_are_told(tmp_path):
    device = GatedDevice(1 << 20, "cpu:0", needs_staging=True)
    async with Rig(tmp_path, devices=[device]) as rig:
        tier = rig.store._tiers["cpu:0"]
        tier.stage(1024, (1 << 20) - 24576)
        with pytest.raises(DeviceError, match=r"decode_staging_bytes, or device\.memory_bytes"):
            await rig.store.acquire(A)


class Bare(CpuDevice):
    """Has no kernels."""

    def decoder(self):
        raise KernelError("decode_exp_bf16", "there is no compiler")


async def test_the_host_checks_for_a_device_without_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(Rig, "codec", "raw")
    async with Rig(tmp_path, devices=[Bare(1 << 20, "cpu:0")], verify="always") as rig:
        await rig.check("a")
        await rig.check("a")
        assert rig.reports[-1].verified_bytes == len(rig.bytes[A])
        assert rig.reports[-1].bytes_from_dram == len(rig.bytes[A])


async def test_a_device_without_kernels_loads_raw_checkpoints_only(tmp_path):
    async with Rig(tmp_path, devices=[Bare(1 << 20, "cpu:0")]) as rig:
        with pytest.raises(KernelError):
            await rig.store.acquire(A)
        rig.assert_quiet()
        rig.store._config = type(rig.store._config)(chunk_bytes=ByteSize(CHUNK))
        rig.bytes[B] = write_checkpoint(tmp_path, "b", seed=7, codec="raw")
        await rig.check("b")
