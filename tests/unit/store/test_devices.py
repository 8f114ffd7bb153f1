"""Several devices, parts of models, and what stays in device memory between two replicas."""

import asyncio
import gc
import random
import threading

import pytest

from sllm_node.core.errors import DeviceError, DeviceMemoryError, ModelBusyError
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.device.cpu import CpuDevice, CpuEvent, CpuRange, CpuStream
from tests.unit.store.handmade import PIECE, Rig, delivered_by

pytestmark = pytest.mark.usefixtures("with_codecs")

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


class FailingRange(CpuRange):
    def map(self, pieces):
        super().map(pieces)
        error = DeviceError("cpu:0", "no memory came")
        return CpuEvent(self._memory.submit(lambda: error))


class FailingDevice(CpuDevice):
    def reserve(self, size, piece_bytes):
        return FailingRange(size, piece_bytes, self._ledger, self._memory)


def on(rig, model, device):
    return (Part(f"cpu:{device}", 0, len(rig.bytes[ModelId(model)])),)


def halves(rig, model):
    size = len(rig.bytes[ModelId(model)])
    middle = 5 * 4096 + 256
    return (Part("cpu:0", 0, middle), Part("cpu:1", middle, size))


async def test_what_was_evicted_for_room_is_there_again_without_a_copy(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.check("a", reason="room")
        assert rig.store.residency(A)[Tier.DEVICE] == len(rig.bytes[A])
        assert rig.store.cached_bytes("cpu:0") > 0
        assert not rig.store.is_on_device(A)
        await rig.check("a", reason="room")
        assert rig.reports[1].bytes_kept == len(rig.bytes[A])
        rig.assert_quiet()


async def test_what_an_operator_evicts_leaves_the_memory_at_once(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.check("a", reason="operator")
        assert rig.device.memory_used == 0
        await rig.check("a", reason="room")
        rig.store.evict(A, Tier.DEVICE, "operator")
        assert rig.device.memory_used == 0


async def test_memory_that_was_handed_over_is_its_holders_and_the_next_load_takes_other(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        lease = await rig.store.acquire(A, halves(rig, "a"))
        parts = rig.store.hand_over(lease)
        assert not rig.store.is_on_device(A)
        assert rig.store.on_devices(A) == {}
        used = [device.memory_used for device in rig.devices]
        assert all(used)
        await rig.check("a", halves(rig, "a"))
        await rig.check("b")
        assert delivered_by(lease) == rig.bytes[A]
        assert [device.memory_used for device in rig.devices] == used
        for part in parts:
            part.buffer.close()


async def test_memory_that_others_hold_as_well_is_not_handed_over(tmp_path):
    async with Rig(tmp_path) as rig:
        one, other = await rig.store.acquire(A), await rig.store.acquire(A)
        with pytest.raises(ModelBusyError, match="in use by others"):
            rig.store.hand_over(one)
        one.release()
        for part in rig.store.hand_over(other):
            part.buffer.close()


async def test_a_device_can_be_added_to_a_store_that_runs(tmp_path):
    async with Rig(tmp_path) as rig:
        added = CpuDevice(1 << 20, "cpu:1")
        rig.store.add_device(added)
        rig.devices.append(added)
        assert rig.store.capacities() == {"cpu:0": rig.scale << 20, "cpu:1": 1 << 20}
        await rig.check("a", halves(rig, "a"))


async def test_only_the_part_that_was_given_up_is_loaded_again(tmp_path):
    size = 7 * 8192 + 4096
    async with Rig(tmp_path, memory=2 * size + 2 * 4096) as rig:
        await rig.check("a", reason="room")
        await rig.check("b", reason="room")
        await rig.check("c", reason="room")  # takes all of a
        assert rig.store.on_devices(A) == {}
        one = await rig.store.allocate("cpu:0", rig.scale * PIECE)
        size *= rig.scale
        assert 0 < rig.store.on_devices(B)["cpu:0"] < size
        kept = rig.store.on_devices(B)["cpu:0"]
        one.close()
        await rig.check("b", reason="room")
        report = rig.reports[-1]
        assert report.bytes_kept == kept
        assert report.bytes_from_dram + report.bytes_from_nvme >= size - kept
        assert report.bytes_from_dram < size
        rig.assert_quiet()


async def test_addresses_stay_the_same_from_load_to_load(tmp_path):
    async with Rig(tmp_path) as rig:
        with await rig.store.acquire(A) as lease:
            view = lease.parts[0].buffer.array
        rig.store.evict(A, Tier.DEVICE, "operator")
        with await rig.store.acquire(A) as lease:
            assert lease.parts[0].buffer.array is view
            assert bytes(view) == rig.bytes[A]


async def test_a_model_is_split_over_two_devices(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        placement = halves(rig, "a")
        await rig.check("a", placement)
        with await rig.store.acquire(A, placement) as lease:
            assert [part.buffer.size for part in lease.parts] == [
                part.end - part.start for part in placement
            ]
        rig.assert_quiet()


async def test_a_part_that_stayed_is_not_loaded_again_beside_one_that_went(tmp_path):
    async with Rig(tmp_path, devices=2, memory=12 * 8192) as rig:
        placement = halves(rig, "a")
        await rig.check("a", placement, reason="room")
        await rig.check("b", on(rig, "b", 1), reason="room")
        await rig.check("c", on(rig, "c", 1), reason="room")
        await rig.check("a", placement, reason="room")
        assert rig.reports[-1].bytes_kept >= placement[0].end
        rig.assert_quiet()


async def test_another_part_of_a_model_in_use_is_refused(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        lease = await rig.store.acquire(A, on(rig, "a", 0))
        with pytest.raises(ModelBusyError, match="cpu:0"):
            await rig.store.acquire(A, halves(rig, "a"))
        lease.release()
        rig.store.evict(A, Tier.DEVICE, "test")
        await rig.check("a", halves(rig, "a"))
        rig.assert_quiet()


async def test_a_model_on_a_sibling_is_cloned_from_there(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        with await rig.store.acquire(A, on(rig, "a", 0)):
            rig.store.evict(A, Tier.DRAM, "test")
            with await rig.store.acquire(A, on(rig, "a", 1)) as lease:
                assert delivered_by(lease) == rig.bytes[A]
                assert rig.reports[-1].bytes_from_sibling == len(rig.bytes[A])
            assert rig.store.leases(A) == 1
            rig.store.evict(A, Tier.DEVICE, "test", on(rig, "a", 1))
        rig.assert_quiet()


async def test_the_source_of_a_clone_stays_until_it_has_ended(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        (await rig.store.acquire(A, on(rig, "a", 0))).release()
        cloning = asyncio.create_task(rig.store.acquire(A, on(rig, "a", 1)))
        await asyncio.sleep(0)
        with pytest.raises(ModelBusyError):
            rig.store.evict(A, Tier.DEVICE, "test", on(rig, "a", 0))
        cloning.cancel()
        await asyncio.gather(cloning, return_exceptions=True)
        await rig.store.settled(A)
        rig.store.evict(A, Tier.DEVICE, "test")
        rig.assert_quiet()


async def test_an_idle_sibling_lends_its_link(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        await rig.store.prefetch(A)
        await rig.check("a")
        assert 0 < rig.reports[-1].bytes_relayed < len(rig.bytes[A])


async def test_a_busy_sibling_lends_nothing(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        rig.store.lend_links(lambda device: device == "cpu:1")
        await rig.store.prefetch(A)
        await rig.check("a")
        assert rig.reports[-1].bytes_relayed == 0


async def test_without_relays_every_device_has_its_own_link(tmp_path):
    async with Rig(tmp_path, devices=2, relay=False) as rig:
        await rig.store.prefetch(A)
        await rig.check("a")
        assert rig.reports[-1].bytes_relayed == 0


async def test_no_room_on_one_of_two_devices_takes_nothing_on_the_other(tmp_path):
    async with Rig(tmp_path, devices=2, memory=12 * 8192) as rig:
        with await rig.store.acquire(B, on(rig, "b", 1)):
            used = rig.devices[0].memory_used
            with pytest.raises(DeviceMemoryError):
                await rig.store.acquire(
                    A, (Part("cpu:0", 0, 256), Part("cpu:1", 256, len(rig.bytes[A])))
                )
            assert rig.devices[0].memory_used == used
        rig.assert_quiet()


async def test_caches_give_way_to_other_memory(tmp_path):
    async with Rig(tmp_path, memory=8 * 8192) as rig:
        await rig.check("a", reason="room")
        buffer = await rig.store.allocate("cpu:0", 7 * rig.scale * 8192)
        shown = {
            state: rig.metrics.registry.get_sample_value(
                "sllm_device_bytes", {"device": "cpu:0", "state": state}
            )
            for state in ("used", "cached")
        }
        assert shown == {"used": 7 * rig.scale * 8192, "cached": rig.store.cached_bytes("cpu:0")}
        assert rig.store.residency(A)[Tier.DEVICE] < len(rig.bytes[A])
        with pytest.raises(DeviceMemoryError):
            await rig.store.allocate("cpu:0", 2 * rig.scale * 8192)
        buffer.close()
        assert rig.device.memory_used == rig.store.cached_bytes("cpu:0")


async def test_memory_that_fails_to_be_mapped_for_nobody_any_more_is_given_back_quietly(tmp_path):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with Rig(tmp_path, devices=[FailingDevice(1 << 20, "cpu:0")]) as rig:
        asking = asyncio.create_task(rig.store.allocate("cpu:0", rig.scale * PIECE))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        asking = rig.store.allocate("cpu:0", rig.scale * PIECE)
        with pytest.raises(DeviceError, match="no memory came"):
            await asking
        assert rig.device.memory_used == 0
    gc.collect()
    assert told == []


async def test_a_store_that_finds_no_room_for_relays_gives_all_back(tmp_path):
    class Full(CpuDevice):
        def relay(self, sibling):
            self.relayed = sibling.allocate(4096)
            raise DeviceMemoryError(sibling.name, 1, 0, 1)

    class Ring(CpuDevice):
        def relay(self, sibling):
            buffer, stream = sibling.allocate(4096), self.stream()

            class Relay(CpuStream):
                def close(self):
                    stream.close()
                    buffer.close()

            return Relay()

    full = Full(1 << 20, "cpu:1")
    devices = [Ring(1 << 20, "cpu:0"), full]
    before = {thread for thread in threading.enumerate() if thread.name.startswith("sllm")}
    rig = Rig(tmp_path, devices=devices)
    with pytest.raises(DeviceMemoryError):
        await rig.store.start()
    full.relayed.close()
    await rig.store.close()
    for device in devices:
        device.close()
    after = {thread for thread in threading.enumerate() if thread.name.startswith("sllm")}
    assert after == before


async def test_a_load_whose_memory_fails_to_be_mapped_leaves_nothing(tmp_path):
    async with Rig(tmp_path, devices=[FailingDevice(1 << 20, "cpu:0")]) as rig:
        await rig.store.prefetch(A)
        for _ in range(2):
            with pytest.raises(DeviceError, match="no memory came"):
                await rig.store.acquire(A)
            rig.assert_quiet()
            assert rig.device.memory_used == 0


@pytest.mark.parametrize("seed", range(4))
async def test_random_loads_over_two_devices_leave_nothing_behind(tmp_path, seed):
    numbers = random.Random(seed)
    chunks, memory = numbers.choice([2, 5, 20]), numbers.choice([9, 18, 30]) * 8192
    async with Rig(tmp_path, devices=2, chunks=chunks, memory=memory) as rig:
        tasks = []
        for _ in range(125):
            model = numbers.choice("abc")
            places = [on(rig, model, 0), on(rig, model, 1), halves(rig, model)]
            act = numbers.random()
            if act < 0.5:
                tasks.append(asyncio.create_task(use(rig, model, numbers.choice(places))))
            elif act < 0.58:
                tasks.append(asyncio.create_task(rig.store.prefetch(ModelId(model))))
            elif act < 0.64:
                tasks.append(asyncio.create_task(take(rig, numbers.randrange(2))))
            elif act < 0.78 and tasks:
                numbers.choice(tasks).cancel()
            else:
                await asyncio.sleep(0)
                if not (rig.store.leases(ModelId(model)) or model in rig.store._flights.loads):
                    reason = numbers.choice(["room", "operator"])
                    rig.store.evict(ModelId(model), Tier.DEVICE, reason)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        while rig.store._flights.loads:
            await next(iter(rig.store._flights.loads.values())).ended
        rig.assert_quiet()
        wanted = (type(None), DeviceMemoryError, ModelBusyError, asyncio.CancelledError)
        assert [one for one in ended if not isinstance(one, wanted)] == []
        for model in "abc":
            rig.store.evict(ModelId(model), Tier.DEVICE, "operator")
        assert [device.memory_used for device in rig.devices] == [0, 0]
        for model in "abc":
            await rig.check(model)


async def take(rig, device):
    buffer = await rig.store.allocate(f"cpu:{device}", PIECE)
    try:
        await asyncio.sleep(0)
    finally:
        buffer.close()


async def use(rig, model, placement):
    with await rig.store.acquire(ModelId(model), placement) as lease:
        await asyncio.sleep(0)
        assert delivered_by(lease) == rig.bytes[ModelId(model)]
