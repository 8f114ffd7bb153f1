import asyncio
import threading

import pytest

from sllm_node.core.errors import (
    CheckpointChangedError,
    CheckpointFormatError,
    ChecksumError,
    DeviceError,
    DeviceMemoryError,
    LoadFailedError,
    ModelBusyError,
    ModelNotFoundError,
    PoolExhaustedError,
    SllmError,
    StorageReadError,
)
from sllm_node.core.types import ModelId, Tier
from sllm_node.core.units import align_up
from sllm_node.device.cpu import CpuDevice, CpuStream
from tests.unit.store.handmade import (
    CHUNK,
    Rig,
    chunk_of,
    delivered_by,
    replace_file,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("with_codecs")

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
UNITS = 8


async def test_what_is_delivered_is_what_was_written(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.check("a")
        assert rig.reports[0].bytes_from_nvme == len(rig.bytes[A])
        assert rig.reports[0].verified_bytes == len(rig.bytes[A])
        assert rig.store.residency(A)[Tier.DRAM] == rig.stored[A]
        rig.assert_quiet()


async def test_a_second_load_comes_from_dram_without_a_read(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.check("a")
        rig.files.opening = lambda path: pytest.fail("a file was opened")
        await rig.check("a")
        assert rig.reports[1].bytes_from_dram == len(rig.bytes[A])
        assert rig.store.bandwidth(Tier.DRAM) is not None
        assert (
            rig.metrics.registry.get_sample_value(
                "sllm_loads_total", {"source": "dram", "result": "ok"}
            )
            == 1
        )


async def test_a_model_larger_than_the_pool_streams_through_it(tmp_path):
    async with Rig(tmp_path, chunks=2) as rig:
        await rig.check("a")
        await rig.check("a")
        assert 0 < rig.reports[1].bytes_from_dram <= 2 * rig.scale * CHUNK
        rig.assert_quiet()


async def test_a_partly_cached_model_reads_only_what_is_missing(tmp_path):
    async with Rig(tmp_path, chunks=UNITS + 3) as rig:
        await rig.check("a")
        await rig.check("b")
        cached = rig.store.residency(A)[Tier.DRAM]
        assert 0 < cached < rig.stored[A]
        await rig.check("a")
        assert rig.reports[2].bytes_from_dram == cached // rig.chunk * rig.scale * CHUNK
        assert rig.reports[2].bytes_from_nvme == len(rig.bytes[A]) - rig.reports[2].bytes_from_dram


async def test_the_least_recently_used_model_gives_way(tmp_path):
    async with Rig(tmp_path, chunks=2 * UNITS) as rig:
        for model in "aba":
            await rig.check(model)
        await rig.check("c")
        assert rig.store.residency(B)[Tier.DRAM] == 0
        assert rig.store.residency(A)[Tier.DRAM] == rig.stored[A]


async def test_many_callers_share_one_load(tmp_path):
    async with Rig(tmp_path) as rig:
        leases = await asyncio.gather(*(rig.store.acquire(A) for _ in range(10)))
        assert len(rig.reports) == 1
        assert rig.store.leases(A) == 10
        with pytest.raises(ModelBusyError):
            rig.store.evict(A, Tier.DEVICE, "test")
        for lease in leases:
            with lease:
                lease.release()
        rig.store.evict(A, Tier.DEVICE, "test")
        assert not rig.store.is_on_device(A)


async def test_a_resident_model_is_leased_at_once(tmp_path):
    async with Rig(tmp_path) as rig:
        first = await rig.store.acquire(A)
        second = await rig.store.acquire(A)
        assert first.parts is second.parts
        first.release()
        assert rig.store.leases(A) == 1
        second.release()


@pytest.mark.parametrize("chunks", [2, 3, 5, 2 * UNITS])
async def test_three_loads_at_once_through_a_small_pool_all_end_right(tmp_path, chunks):
    async with Rig(tmp_path, chunks=chunks, max_concurrent_loads=3) as rig:
        for _ in range(3):
            await asyncio.gather(*(rig.check(model) for model in "abc"))
        rig.assert_quiet()


async def test_loads_beyond_the_limit_wait_their_turn(tmp_path):
    async with Rig(tmp_path, max_concurrent_loads=1) as rig:
        await asyncio.gather(*(rig.check(model) for model in "abc"))
        assert [report.model for report in rig.reports] == ["a", "b", "c"]


async def test_prefetch_brings_a_model_into_dram_only(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.store.prefetch(A)
        assert rig.store.residency(A) == {
            Tier.DEVICE: 0, Tier.DRAM: rig.stored[A], Tier.NVME: rig.stored[A]
        }  # fmt: skip
        await rig.check("a")
        assert rig.reports[-1].bytes_from_nvme == 0


async def test_prefetch_of_a_model_larger_than_the_pool_brings_what_fits(tmp_path):
    async with Rig(tmp_path, chunks=3) as rig:
        await rig.store.prefetch(A)
        assert rig.store.residency(A)[Tier.DRAM] == 3 * rig.chunk
        rig.assert_quiet()


async def test_prefetch_and_acquire_of_one_model_meet(tmp_path):
    async with Rig(tmp_path) as rig:
        lease, _ = await asyncio.gather(rig.store.acquire(A), rig.store.prefetch(A))
        assert rig.store.leases(A) == 1
        lease.release()
        rig.store.evict(A, Tier.DEVICE, "test")
        rig.store.evict(A, Tier.DRAM, "test")
        _, lease = await asyncio.gather(rig.store.prefetch(A), rig.store.acquire(A))
        lease.release()
        rig.assert_quiet()


async def test_progress_is_told_while_a_load_runs_and_not_after(tmp_path):
    async with Rig(tmp_path) as rig:
        assert rig.store.progress(A) is None
        task = asyncio.create_task(rig.store.acquire(A))
        await asyncio.sleep(0)
        progress = rig.store.progress(A)
        assert (progress.bytes_total, progress.source) == (len(rig.bytes[A]), Tier.NVME)
        (await task).release()
        assert rig.store.progress(A) is None


async def test_a_load_has_begun_when_its_first_read_is_issued(tmp_path):
    async with Rig(tmp_path, max_concurrent_loads=1) as rig:
        assert await rig.store.begun(A) is None  # there is none
        gate = Gate(rig)
        first = asyncio.create_task(rig.store.acquire(A))
        second = asyncio.create_task(rig.store.acquire(B))
        await asyncio.sleep(0)
        assert await rig.store.begun(A) is not None
        assert await rig.store.begun(B) is None  # it waits for the first one, which may take long
        assert not first.done()
        gate.open()
        for load in (first, second):
            (await load).release()
        rig.assert_quiet()


async def test_who_waits_for_a_beginning_is_told_of_a_load_that_never_begins(tmp_path):
    async with Rig(tmp_path) as rig:
        load = asyncio.create_task(rig.store.acquire(A))
        await asyncio.sleep(0)
        begun = asyncio.create_task(rig.store.begun(A))
        await asyncio.sleep(0)
        load.cancel()
        await begun
        with pytest.raises(asyncio.CancelledError):
            await load
        await rig.store.settled(A)
        rig.assert_quiet()


# --- faults -------------------------------------------------------------------------------------


async def recovers(rig, error, model="a"):
    """The load fails with `error`; then everything is given back and the next one succeeds."""
    with pytest.raises(error) as caught:
        await rig.store.acquire(ModelId(model))
    rig.assert_quiet()
    rig.files.before_read = lambda offset: None
    rig.files.after_read = lambda view, offset, count: count
    await rig.check(model)
    rig.assert_quiet()
    return caught.value


async def test_a_flipped_bit_is_named_by_shard_offset_and_tensor(tmp_path):
    async with Rig(tmp_path) as rig:

        def flip(view, offset, count):
            if offset == 3 * rig.chunk:
                view[77] ^= 1
            return count

        rig.files.after_read = flip
        error = await recovers(rig, ChecksumError)
        assert (error.shard, error.offset, error.tensors) == (
            "shard-00000.bin", 3 * rig.chunk, (f"t0.{rig.scale * 3 * CHUNK}",)
        )  # fmt: skip
        assert rig.metrics.registry.get_sample_value("sllm_checksum_failures_total") == 1


async def test_an_io_error_is_named(tmp_path):
    async with Rig(tmp_path) as rig:

        def fail(offset):
            raise OSError(5, "Input/output error")

        rig.files.before_read = fail
        assert "EIO" in str(await recovers(rig, StorageReadError))


async def test_a_short_read_is_named(tmp_path):
    async with Rig(tmp_path) as rig:
        rig.files.after_read = lambda view, offset, count: count - 4096
        assert "bytes came" in str(await recovers(rig, StorageReadError))


async def test_a_truncated_shard_is_named_and_what_was_cached_is_dropped(tmp_path):
    async with Rig(tmp_path, chunks=2) as rig:
        await rig.check("a")
        shard = tmp_path / "a" / "shard-00000.bin"
        shard.write_bytes(shard.read_bytes()[:CHUNK])
        with pytest.raises((CheckpointChangedError, CheckpointFormatError)):
            await rig.store.acquire(A)
        write_checkpoint(tmp_path, "a")
        await rig.check("a")


async def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path):
    async with Rig(tmp_path) as rig:
        shard = tmp_path / "a" / "shard-00000.bin"
        rig.files.before_read = lambda offset: shard.write_bytes(b"")
        with pytest.raises(CheckpointChangedError, match="truncated"):
            await rig.store.acquire(A)
        rig.files.before_read = lambda offset: None
        rig.assert_quiet()
        write_checkpoint(tmp_path, "a")
        await rig.check("a")


async def test_a_replaced_checkpoint_is_never_mixed_with_what_was_cached(tmp_path):
    async with Rig(tmp_path, chunks=2) as rig:
        await rig.check("a")
        rig.bytes[A] = write_checkpoint(tmp_path, "a", seed=1)
        await rig.check("a")
        assert rig.reports[-1].bytes_from_dram == 0


async def test_a_shard_replaced_after_the_index_was_read_is_refused(tmp_path):
    async with Rig(tmp_path) as rig:
        shard = tmp_path / "a" / "shard-00001.bin"
        data = shard.read_bytes()
        rig.files.opening = lambda path: replace_file(shard, data) if path == shard else None
        with pytest.raises(CheckpointChangedError, match="replaced"):
            await rig.store.acquire(A)
        rig.files.opening = lambda path: None
        rig.assert_quiet()
        await rig.check("a")


async def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    async with Rig(tmp_path) as rig:

        def fail(path):
            raise OSError(24, "Too many open files")

        rig.files.opening = fail
        with pytest.raises(StorageReadError, match="EMFILE"):
            await rig.store.acquire(A)

        def vanish(path):
            raise FileNotFoundError(2, "gone")

        rig.files.opening = vanish
        with pytest.raises(CheckpointChangedError, match="removed"):
            await rig.store.acquire(A)
        rig.files.opening = lambda path: None
        rig.assert_quiet()
        await rig.check("a")


async def test_a_pool_whose_chunks_are_all_pinned_is_told_at_once(tmp_path):
    async with Rig(tmp_path, chunks=UNITS) as rig:
        await rig.store.prefetch(A)
        rig.store.pin(A, Tier.DRAM)
        with pytest.raises(PoolExhaustedError):
            await rig.store.acquire(B)
        rig.assert_quiet()
        with pytest.raises(ModelBusyError):
            rig.store.evict(A, Tier.DRAM, "test")
        rig.store.unpin(A, Tier.DRAM)
        await rig.check("b")


async def test_lent_chunks_are_nobody_elses_until_they_are_given_back(tmp_path):
    async with Rig(tmp_path, chunks=6) as rig:
        await rig.store.prefetch(A)
        assert rig.store.lend(5) is None
        loan = rig.store.lend(4)
        assert [len(view) for view in loan.views] == [rig.store.chunk_bytes] * 4
        for number, view in enumerate(loan.views):
            view[:] = bytes([number]) * len(view)
        await rig.check("b")  # through the two that are left
        assert [bytes(view) for view in loan.views] == [
            bytes([number]) * rig.store.chunk_bytes for number in range(4)
        ]
        loan.close()
        loan.close()
        assert rig.store.lend(4) is not None


async def test_a_loan_that_is_refused_evicts_nothing(tmp_path):
    async with Rig(tmp_path, chunks=UNITS + 2) as rig:
        await rig.store.prefetch(A)
        there = rig.store.residency(A)[Tier.DRAM]
        assert rig.store.lend(UNITS + 1) is None
        assert rig.store.residency(A)[Tier.DRAM] == there > 0
        rig.store.lend(UNITS).close()
        assert rig.store.residency(A)[Tier.DRAM] < there


@pytest.mark.parametrize("is_pinned_first", [False, True])
async def test_a_pin_after_a_loan_leaves_chunks_for_other_loads(tmp_path, is_pinned_first):
    async with Rig(tmp_path, chunks=UNITS + 2) as rig:
        loan = rig.store.lend(2)
        if is_pinned_first:
            rig.store.pin(A, Tier.DRAM)
        await rig.check("a")
        rig.store.pin(A, Tier.DRAM)
        await rig.check("b")
        assert rig.store.residency(A)[Tier.DRAM] > 0
        assert rig.store.pool_chunks_used + rig.store.pool_chunks_lent <= rig.store.pool_chunks
        loan.close()


async def test_two_loads_at_once_end_where_one_is_pinned_and_chunks_are_lent(tmp_path):
    async with Rig(tmp_path, chunks=UNITS + 2) as rig:
        loan = rig.store.lend(UNITS)
        rig.store.pin(A, Tier.DRAM)
        await asyncio.gather(rig.check("a"), rig.check("b"))
        loan.close()


async def test_who_waits_behind_a_prefetch_is_told_no_beginning(tmp_path):
    async with Rig(tmp_path) as rig:
        prefetch = asyncio.create_task(rig.store.prefetch(A))
        await asyncio.sleep(0)
        load = asyncio.create_task(rig.store.acquire(A))
        await asyncio.sleep(0)
        assert await rig.store.begun(A) is None
        await prefetch
        (await load).release()
        rig.assert_quiet()


async def test_a_full_device_is_told_at_once(tmp_path):
    async with Rig(tmp_path, memory=10 * CHUNK) as rig:
        lease = await rig.store.acquire(A)
        with pytest.raises(DeviceMemoryError):
            await rig.store.acquire(B)
        lease.release()
        rig.store.evict(A, Tier.DEVICE, "test")
        await rig.check("b")


async def test_an_unknown_model_is_not_found(tmp_path):
    async with Rig(tmp_path) as rig:
        with pytest.raises(ModelNotFoundError):
            await rig.store.acquire(ModelId("nobody"))
        rig.assert_quiet()


async def test_chunks_that_do_not_fit_the_pool_are_refused_with_both_sizes(tmp_path):
    async with Rig(tmp_path) as rig:
        rig.store._config = type(rig.store._config)(chunk_bytes=4096)
        with pytest.raises(CheckpointFormatError, match=rf"{rig.chunk}.*4096"):
            await rig.store.acquire(A)


async def test_dram_that_went_bad_is_found_when_everything_is_verified(tmp_path):
    async with Rig(tmp_path, verify="always") as rig:
        await rig.check("a")
        chunk = chunk_of(rig.store._ledger, A, 2)
        rig.store._machinery.pool.view(chunk, 16)[3] ^= 1
        with pytest.raises(ChecksumError):
            await rig.store.acquire(A)
        rig.assert_quiet()
        await rig.check("a")
        await rig.store.prefetch(A)


async def test_nothing_is_verified_when_that_is_the_wish(tmp_path):
    async with Rig(tmp_path, verify="never") as rig:
        await rig.check("a")
        assert rig.reports[0].verified_bytes == 0


# --- cancellation -------------------------------------------------------------------------------


class Gate:
    """Stops reader threads at the n-th read until it is opened; tells the loop when one is there."""

    def __init__(self, rig, at_read=0):
        self._loop = asyncio.get_running_loop()
        self._open = threading.Event()
        self._count, self._at = 0, at_read
        self._lock = threading.Lock()
        self.reached = asyncio.Event()
        rig.files.before_read = self._wait

    def _wait(self, offset):
        with self._lock:
            self._count += 1
            here = self._count > self._at
        if here:
            self._loop.call_soon_threadsafe(self.reached.set)
            self._open.wait()

    def open(self):
        self._open.set()


@pytest.mark.parametrize("at_read", range(UNITS))
async def test_a_load_cancelled_at_any_read_gives_everything_back(tmp_path, at_read):
    async with Rig(tmp_path, chunks=4) as rig:
        gate = Gate(rig, at_read)
        task = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await rig.check("a")
        rig.assert_quiet()


async def test_one_who_leaves_does_not_take_the_load_from_the_others(tmp_path):
    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        first, second = (asyncio.create_task(rig.store.acquire(A)) for _ in range(2))
        await gate.reached.wait()
        first.cancel()
        gate.open()
        lease = await second
        assert rig.store.leases(A) == 1
        lease.release()
        rig.assert_quiet()


async def test_a_load_waiting_for_its_turn_can_be_cancelled(tmp_path):
    async with Rig(tmp_path, max_concurrent_loads=1) as rig:
        gate = Gate(rig)
        first = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        second = asyncio.create_task(rig.store.acquire(B))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        (await first).release()
        rig.assert_quiet()
        await rig.check("b")


async def test_a_caller_cancelled_in_the_moment_the_load_ends_leaves_no_lease(tmp_path):
    async with Rig(tmp_path) as rig:
        task = asyncio.create_task(rig.store.acquire(A))
        rig.store.on_load = lambda report: task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.store.is_on_device(A)
        rig.assert_quiet()


async def test_who_comes_while_a_load_is_being_cancelled_gets_a_new_one(tmp_path):
    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        first = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(rig.store.acquire(A))
        third = asyncio.create_task(rig.store.prefetch(A))
        await asyncio.sleep(0)
        gate.open()
        (await second).release()
        await third
        rig.assert_quiet()


async def test_closing_the_store_ends_loads_with_a_typed_error(tmp_path):
    rig = Rig(tmp_path)
    async with rig:
        gate = Gate(rig)
        task = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        closing = asyncio.create_task(rig.store.close())
        await asyncio.sleep(0)
        gate.open()
        await closing
        with pytest.raises(LoadFailedError):
            await task


async def test_a_device_that_fails_to_copy_fails_the_load(tmp_path):
    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        task = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        rig.store._flights.loads[A].targets[0].buffer._array = None
        gate.open()
        with pytest.raises(LoadFailedError):
            await task


class RefusingStream(CpuStream):
    """Refuses one copy, or the event behind it, when told to."""

    refuses = ""

    def copy_in(self, destination, offset, source):
        self._refuse("copy_in")
        super().copy_in(destination, offset, source)

    def copy_device(self, destination, offset, source, source_range):
        self._refuse("copy_device")
        super().copy_device(destination, offset, source, source_range)

    def record(self):
        self._refuse("record")
        return super().record()

    def _refuse(self, call):
        if self.refuses == call:
            self.refuses = ""
            raise DeviceError("cpu", "no event can be had")


class RefusingDevice(CpuDevice):
    def __init__(self, name):
        super().__init__(1 << 20, name)

    def stream(self):
        return RefusingStream()


@pytest.mark.parametrize(
    ("there", "refused"),
    [("disk", "record"), ("disk", "copy_in"), ("dram", "record"), ("dram", "copy_in"),
     ("sibling", "record"), ("sibling", "copy_device")],
)  # fmt: skip
async def test_a_stream_that_refuses_a_copy_or_an_event_fails_the_load(tmp_path, there, refused):
    devices = [RefusingDevice(f"cpu:{number}") for number in range(2)]
    async with Rig(tmp_path, devices=devices, relay=False) as rig:
        if there == "dram":
            await rig.store.prefetch(A)
        if there == "sibling":
            (await rig.store.acquire(A, rig.store.whole(A, "cpu:1"))).release()
        rig.store._tiers["cpu:0"].own.stream.refuses = refused
        with pytest.raises(DeviceError, match="no event can be had"):
            await rig.store.acquire(A, rig.store.whole(A, "cpu:0"))
        rig.assert_quiet()
        assert rig.store._tiers["cpu:0"].own.outstanding == 0
        await rig.check("a", rig.store.whole(A, "cpu:0"))


async def test_forgetting_a_removed_checkpoint_frees_its_chunks(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.store.prefetch(A)
        rig.store.forget(A)
        assert rig.store.pool_chunks_used == 0
        rig.store.forget(A)


async def test_addresses_of_a_checkpoint_forgotten_in_use_are_freed_when_it_is_evicted(tmp_path):
    async with Rig(tmp_path) as rig:
        lease = await rig.store.acquire(A)
        rig.store.forget(A)
        lease.release()
        rig.store.evict(A, Tier.DEVICE, "room")
        assert A not in rig.store._tiers["cpu:0"]._ranges
        assert rig.device.memory_used == 0
        await rig.check("a")


async def test_addresses_of_a_forgotten_checkpoint_are_freed_at_once_when_nobody_holds_it(tmp_path):
    async with Rig(tmp_path) as rig:
        await rig.check("a", reason="room")
        rig.store.forget(A)
        assert A not in rig.store._tiers["cpu:0"]._ranges


async def test_pins_hold_a_model_on_the_device(tmp_path):
    async with Rig(tmp_path) as rig:
        rig.store.pin(A, Tier.DEVICE)
        (await rig.store.acquire(A)).release()
        with pytest.raises(ModelBusyError):
            rig.store.evict(A, Tier.DEVICE, "test")
        rig.store.unpin(A, Tier.DEVICE)
        rig.store.evict(A, Tier.DEVICE, "test")
        rig.store.evict(A, Tier.DEVICE, "test")
        assert rig.device.memory_used == 0


@pytest.mark.parametrize("seed", range(6))
async def test_random_loads_cancels_and_evictions_leave_nothing_behind(tmp_path, seed):
    import random

    numbers = random.Random(seed)
    async with Rig(tmp_path, chunks=numbers.choice([2, 5, 9, 20]), max_concurrent_loads=2) as rig:
        tasks = []
        for _ in range(60):
            model = numbers.choice("abc")
            act = numbers.random()
            if act < 0.5:
                tasks.append(asyncio.create_task(hold(rig, model)))
            elif act < 0.8 and tasks:
                numbers.choice(tasks).cancel()
            else:
                await asyncio.sleep(0)
                if not (rig.store.leases(ModelId(model)) or model in rig.store._flights.loads):
                    rig.store.evict(ModelId(model), numbers.choice([Tier.DEVICE, Tier.DRAM]), "t")
        await asyncio.gather(*tasks, return_exceptions=True)
        while rig.store._flights.loads:
            await next(iter(rig.store._flights.loads.values())).ended
        rig.assert_quiet()
        for model in "abc":
            rig.store.evict(ModelId(model), Tier.DEVICE, "test")
            await rig.check(model)


async def hold(rig, model):
    with await rig.store.acquire(ModelId(model)) as lease:
        await asyncio.sleep(0)
        assert delivered_by(lease) == rig.bytes[ModelId(model)]


async def test_settled_does_not_wait_for_a_prefetch(tmp_path):
    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        prefetch = asyncio.create_task(rig.store.prefetch(A))
        await gate.reached.wait()
        settled = asyncio.create_task(rig.store.settled(A))
        await asyncio.sleep(0)
        is_settled = settled.done()
        gate.open()
        await asyncio.gather(prefetch, settled)
        assert is_settled


async def test_prefetches_that_joined_do_not_hold_up_an_abort(tmp_path):
    async def abort():
        wanted.cancel()
        await asyncio.gather(wanted, return_exceptions=True)
        await rig.store.settled(A)
        rig.store.evict(A, Tier.DEVICE, "aborted")

    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        wanted = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        prefetches = [asyncio.create_task(rig.store.prefetch(A))]
        await asyncio.sleep(0)
        aborting = asyncio.create_task(abort())
        for _ in range(3):
            await asyncio.sleep(0)
        prefetches.append(asyncio.create_task(rig.store.prefetch(A)))
        await asyncio.sleep(0)
        gate.open()
        await aborting
        await asyncio.gather(*prefetches)
        assert not rig.store.is_on_device(A)
        assert rig.store.residency(A)[Tier.DRAM] == rig.stored[A]
        rig.assert_quiet()


async def test_a_prefetch_that_joined_a_load_is_told_of_its_failure(tmp_path):
    async with Rig(tmp_path) as rig:
        gate = Gate(rig)
        wanted = asyncio.create_task(rig.store.acquire(A))
        await gate.reached.wait()
        prefetch = asyncio.create_task(rig.store.prefetch(A))
        await asyncio.sleep(0)
        rig.files.after_read = lambda view, offset, count: 0
        gate.open()
        ended = await asyncio.gather(wanted, prefetch, return_exceptions=True)
        assert type(ended[0]) is type(ended[1])
        assert isinstance(ended[1], SllmError)
        rig.assert_quiet()


async def test_closing_with_a_lease_out_gives_everything_else_back(tmp_path):
    rig = Rig(tmp_path, devices=2)
    await rig.store.start()
    held = await rig.store.acquire(A)
    for model in (A, B):
        (await rig.store.acquire(model, rig.store.whole(model, "cpu:1"))).release()
    (await rig.store.acquire(C)).release()
    machinery = rig.store._machinery
    assert machinery is not None
    pool = machinery.pool
    with pytest.raises(ModelBusyError, match="model 'a' is in use while"):
        await rig.store.close()
    assert delivered_by(held) == rig.bytes[A]
    kept = held.parts[0].buffer
    assert rig.devices[0].memory_used == align_up(kept.size, rig.device.granularity)
    assert rig.devices[1].memory_used == 0
    assert len(pool.view(0, 1)) == 0
    with pytest.raises(RuntimeError, match="shutdown"):
        rig.store._tiers["cpu:0"].own.stream.record()
    held.release()
    kept.close()
