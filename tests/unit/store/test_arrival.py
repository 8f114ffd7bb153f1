"""Leases that are given before the load has ended."""

import asyncio
import random
import threading
from itertools import pairwise

import pytest

from sllm_node.core.errors import ChecksumError, LoadFailedError, ModelBusyError
from sllm_node.core.types import ModelId, Part
from sllm_node.device.cpu import CpuDevice
from sllm_node.store.arrival import Deliveries, Front
from tests.unit.store.handmade import CHUNK, Rig, delivered_by

A, B = ModelId("a"), ModelId("b")
WHOLE = Part("cpu:0", 0, 100)


class HeldBack:
    """Reads from unit `first` of the first shard on, and of the others, come when it is opened."""

    def __init__(self, rig, first):
        self.opened = threading.Event()
        self._rig, self._first = rig, first
        self.byte = first * CHUNK * rig.scale
        """Where what is held back begins."""
        rig.files.before_read = self._before

    def _before(self, offset):
        if offset >= self._first * self._rig.chunk:
            self.opened.wait()


@pytest.fixture
def one_shard():
    return {"shards": (8 * CHUNK,)}


def end_of(rig, model=A):
    return (len(rig.bytes[model]),)


@pytest.fixture(autouse=True)
def both_codecs(with_codecs):
    """Run everything with raw and with encoded checkpoints."""


# --- fronts ---------------------------------------------------------------------------------------


def test_what_a_device_has_kept_is_there_from_the_start():
    assert Front(WHOLE, [(40, 60), (80, 100)]).byte == 40
    assert Front(WHOLE, [(0, 60)]).byte == 0
    assert Front(WHOLE, []).byte == 100


def test_bytes_out_of_order_count_when_all_before_them_are_there():
    front = Front(WHOLE, [(10, 60), (80, 100)])
    assert not front.delivered(30, 60)
    assert front.delivered(10, 30)
    assert front.byte == 80
    assert front.delivered(80, 100)
    assert front.byte == 100


@pytest.mark.parametrize("seed", range(5))
def test_a_front_is_the_first_byte_that_is_missing(seed):
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(1, 100), 20)), 100]
    pieces = list(pairwise(cuts))
    wants = [piece for piece in pieces if rng.random() < 0.6]
    front, missing = Front(WHOLE, wants), {b for low, high in wants for b in range(low, high)}
    for low, high in rng.sample(wants, len(wants)):
        front.delivered(low, high)
        missing -= set(range(low, high))
        assert front.byte == min(missing, default=100)


def test_a_stopped_arrival_ends_its_own_waits_only():
    deliveries = Deliveries(A, [(WHOLE, [(0, 100)])])
    stopped, other = deliveries.arrival(), deliveries.arrival()
    stopped.stop()
    with pytest.raises(LoadFailedError, match="given back"):
        stopped.wait((50,))
    deliveries.delivered(0, 0, 100)
    other.wait((100,))


# --- leases ---------------------------------------------------------------------------------------


async def test_the_first_bytes_can_be_used_while_the_last_are_held_back(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        back = HeldBack(rig, 3)
        lease = await rig.store.acquire(A, early=True)
        await asyncio.to_thread(lease.arrival.wait, (back.byte,))
        assert delivered_by(lease)[: back.byte] == rig.bytes[A][: back.byte]
        assert not lease.arrival.has(end_of(rig))
        assert rig.store.progress(A) is not None
        back.opened.set()
        await asyncio.to_thread(lease.arrival.wait, end_of(rig))
        assert delivered_by(lease) == rig.bytes[A]
        await lease.loaded()
        assert lease.report.bytes_total == len(rig.bytes[A])
        assert rig.store.leases(A) == 1
        lease.release()
        rig.assert_quiet()


async def test_early_and_other_leases_share_one_load(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        back = HeldBack(rig, 3)
        whole = asyncio.create_task(rig.store.acquire(A))
        early = [await rig.store.acquire(A, early=True) for _ in range(2)]
        early.pop().release()
        assert not whole.done()
        back.opened.set()
        await early[0].loaded()
        (await whole).release()
        assert rig.store.leases(A) == 1
        early[0].release()
        assert len(rig.reports) == 1
        rig.assert_quiet()


async def test_what_is_there_already_is_leased_without_an_arrival(tmp_path):
    async with Rig(tmp_path) as rig:
        with await rig.store.acquire(A), await rig.store.acquire(A, early=True) as lease:
            assert lease.arrival is None
            await lease.loaded()


async def test_who_waits_is_told_of_the_failure_and_the_memory_stays_for_it(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        back = HeldBack(rig, 3)
        rig.files.after_read = lambda view, at, count: _flip(view, at, count, 5 * rig.chunk)
        lease = await rig.store.acquire(A, early=True)
        wait = asyncio.create_task(asyncio.to_thread(lease.arrival.wait, end_of(rig)))
        await asyncio.to_thread(lease.arrival.wait, (back.byte,))
        back.opened.set()
        with pytest.raises(ChecksumError):
            await wait
        with pytest.raises(ChecksumError):
            await lease.loaded()
        assert rig.device.memory_used > 0
        assert delivered_by(lease)[: back.byte] == rig.bytes[A][: back.byte]
        rig.files.after_read = lambda view, at, count: count
        following = asyncio.create_task(rig.store.acquire(A))
        settled = asyncio.create_task(rig.store.settled(A))
        with await rig.store.acquire(B):
            assert not following.done()
            assert not settled.done()
        lease.release()
        assert lease.arrival.has((0,)) is False
        await settled
        (await following).release()
        rig.assert_quiet()


def _flip(view, at, count, offset):
    if at <= offset < at + count:
        view[offset - at] ^= 0xFF
    return count


async def test_memory_of_a_failed_load_comes_back_with_the_last_early_lease(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        rig.files.after_read = lambda view, at, count: _flip(view, at, count, 0)
        back = HeldBack(rig, 0)
        leases = [await rig.store.acquire(A, early=True) for _ in range(2)]
        back.opened.set()
        for lease in leases:
            with pytest.raises(ChecksumError):
                await lease.loaded()
        leases[0].release()
        assert rig.device.memory_used > 0
        leases[1].release()
        assert rig.device.memory_used == 0
        rig.assert_quiet()


async def test_the_last_one_who_gives_up_ends_the_load_and_every_wait(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        back = HeldBack(rig, 3)
        leases = [await rig.store.acquire(A, early=True) for _ in range(2)]
        waits = [
            asyncio.create_task(asyncio.to_thread(lease.arrival.wait, end_of(rig)))
            for lease in leases
        ]
        leases[0].release()
        with pytest.raises(LoadFailedError):
            await waits[0]
        assert not waits[1].done()
        leases[1].release()
        with pytest.raises(LoadFailedError):
            await waits[1]
        back.opened.set()
        await rig.store.settled(A)
        assert rig.device.memory_used == 0
        rig.assert_quiet()
        await rig.check("a")


async def test_who_is_cancelled_before_the_memory_is_there_leaves_nothing(tmp_path):
    async with Rig(tmp_path) as rig:
        mapped = threading.Event()
        rig.device._memory.submit(mapped.wait)
        asking = asyncio.create_task(rig.store.acquire(A, early=True))
        await asyncio.gather(*(rig.store.prefetch(B) for _ in range(2)))
        assert not asking.done()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        mapped.set()
        await rig.store.settled(A)
        rig.assert_quiet()
        assert rig.device.memory_used == 0


async def test_closing_the_store_ends_the_waits(tmp_path, one_shard):
    async with Rig(tmp_path, **one_shard) as rig:
        back = HeldBack(rig, 3)
        lease = await rig.store.acquire(A, early=True)
        wait = asyncio.create_task(asyncio.to_thread(lease.arrival.wait, end_of(rig)))
        closing = asyncio.create_task(rig.store.close())
        with pytest.raises(LoadFailedError):
            await wait
        back.opened.set()
        with pytest.raises(ModelBusyError):
            await closing
        assert rig.device.memory_used > 0
        lease.release()


async def test_each_part_of_a_split_model_arrives_by_itself(tmp_path, one_shard):
    async with Rig(tmp_path, devices=2, **one_shard) as rig:
        back = HeldBack(rig, 5)
        size, middle = len(rig.bytes[A]), 4 * CHUNK * rig.scale
        parts = (Part("cpu:0", 0, middle), Part("cpu:1", middle, size))
        lease = await rig.store.acquire(A, parts, early=True)
        await asyncio.to_thread(lease.arrival.wait, (middle, back.byte))
        assert not lease.arrival.has((0, back.byte + 1))
        back.opened.set()
        await asyncio.to_thread(lease.arrival.wait, (0, size))
        await lease.loaded()
        assert delivered_by(lease) == rig.bytes[A]
        lease.release()


async def test_a_clone_arrives_too(tmp_path):
    async with Rig(tmp_path, devices=2) as rig:
        with await rig.store.acquire(A):
            there = rig.store.whole(A, "cpu:1")
            with await rig.store.acquire(A, there, early=True) as lease:
                if lease.arrival is not None:  # a copy between devices may have ended already
                    await asyncio.to_thread(lease.arrival.wait, end_of(rig))
                assert delivered_by(lease) == rig.bytes[A]
                await lease.loaded()
                assert lease.report.bytes_from_sibling == len(rig.bytes[A])


async def test_kept_bytes_are_there_while_the_rest_is_held_back(tmp_path, one_shard):
    memory = 12 * CHUNK
    device = CpuDevice((2 if Rig.codec != "raw" else 1) * memory, "cpu:0")
    async with Rig(tmp_path, devices=[device], chunks=2, names="a", **one_shard) as rig:
        await rig.check("a", reason="room")
        taken = await rig.store.allocate("cpu:0", rig.scale * 7 * CHUNK)
        taken.close()
        kept = rig.store.on_devices(A)["cpu:0"]
        assert 0 < kept < len(rig.bytes[A])
        back = HeldBack(rig, 0)
        rig.store.evict(A, rig.TIER_DRAM, "test")
        with await rig.store.acquire(A, early=True) as lease:
            assert lease.arrival.has((kept,))
            assert not lease.arrival.has((kept + 1,))
            assert delivered_by(lease)[:kept] == rig.bytes[A][:kept]
            back.opened.set()
            await lease.loaded()
            assert delivered_by(lease) == rig.bytes[A]
