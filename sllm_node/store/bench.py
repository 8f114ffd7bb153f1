"""How fast this disk's bytes come through the loader, beside a plain reader of the same files.

Both read in the same run, turn by turn, with the same number of threads, the same chunk size and
direct I/O, into pinned memory that was touched before. The plain reader does nothing but read: it is
the ceiling. The loader also keeps the ledger, checks checksums (or not, as a third contestant) and
hands completions through the event loop. Direct I/O passes the page cache by, so there is nothing
to drop between rounds.
"""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.clock import Clock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadReport, ModelId, Tier
from sllm_node.core.units import MIB, align_up
from sllm_node.device.base import Device
from sllm_node.device.cpu import CpuDevice
from sllm_node.store.reader import DirectFileSystem, ShardFile, close_shards, open_shards
from sllm_node.store.residency import Unit, units_of
from sllm_node.store.store import Store

DEVICE_SLACK = 64 * MIB


@dataclass(frozen=True, slots=True)
class LoadBench:
    """Bytes per second of the files, one number a round; `device` counts what is delivered."""

    bytes_total: int
    plain: tuple[float, ...]
    loader: tuple[float, ...]
    """NVMe to DRAM, checksums on."""
    loader_unverified: tuple[float, ...]
    device: tuple[float, ...]
    """DRAM to device."""
    first_copy_s: tuple[float, ...]
    """Of loads from DRAM: from the call to the first chunk copy."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Loader over plain reader, round by round."""
        return tuple(ours / plain for ours, plain in zip(self.loader, self.plain, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)


async def bench_load(
    checkpoint: Checkpoint, config: StoreConfig, clock: Clock, *, rounds: int, warm_loads: int
) -> LoadBench:
    """Measure `rounds` rounds on `checkpoint`, and `warm_loads` loads from DRAM.

    Takes twice the checkpoint's size of memory, and as much again for the device.
    """
    index = checkpoint.index
    size = align_up(index.size, config.chunk_bytes) + len(index.shards) * config.chunk_bytes
    config = msgspec.structs.replace(config, pool_bytes=ByteSize(size))
    catalog = Catalog(checkpoint.path.parent)
    catalog.scan()
    with CpuDevice(index.size + DEVICE_SLACK) as device:
        verified = Store(catalog, [device], _with(config, "always"), clock, Metrics())
        unverified = Store(catalog, [device], _with(config, "never"), clock, Metrics())
        plain = PlainReader(checkpoint, config, device)
        await verified.start()
        await unverified.start()
        result = LoadBench(index.file_size, (), (), (), (), ())
        try:
            for number in range(rounds + 1):  # the first warms up and does not count
                took = [
                    plain.read(clock),
                    await _prefetch(verified, checkpoint.model, clock),
                    await _prefetch(unverified, checkpoint.model, clock),
                ]
                if number:
                    result = _added(result, took)
            return await _warm(result, unverified, checkpoint.model, warm_loads)
        finally:
            plain.close()
            await verified.close()
            await unverified.close()


def _with(config: StoreConfig, verify: str) -> StoreConfig:
    return msgspec.structs.replace(config, verify=verify)


def _added(result: LoadBench, took: list[float]) -> LoadBench:
    plain, loader, unverified = (result.bytes_total / seconds for seconds in took)
    return replace(
        result,
        plain=(*result.plain, plain),
        loader=(*result.loader, loader),
        loader_unverified=(*result.loader_unverified, unverified),
    )


async def _prefetch(store: Store, model: ModelId, clock: Clock) -> float:
    start = clock.now()
    await store.prefetch(model)
    seconds = clock.now() - start
    assert store.residency(model)[Tier.DRAM] == store.residency(model)[Tier.NVME]
    store.evict(model, Tier.DRAM, "bench")
    return seconds


async def _warm(result: LoadBench, store: Store, model: ModelId, loads: int) -> LoadBench:
    await store.prefetch(model)
    reports: list[LoadReport] = []
    store.on_load = reports.append
    for _ in range(loads):
        (await store.acquire(model)).release()
        store.evict(model, Tier.DEVICE, "bench")
    return replace(
        result,
        device=tuple(report.bytes_total / report.elapsed_s for report in reports),
        first_copy_s=tuple(report.first_copy_s for report in reports),
    )


class PlainReader:
    """Threads that read a checkpoint's units, each into its own place, and nothing else."""

    def __init__(self, checkpoint: Checkpoint, config: StoreConfig, device: Device) -> None:
        self._units = units_of(checkpoint.index, config.chunk_bytes)
        self._chunk_bytes = config.chunk_bytes
        self._memory = device.pin(
            len(self._units) * config.chunk_bytes, huge_pages=config.huge_pages
        )
        self._files = open_shards(checkpoint, DirectFileSystem(direct=config.direct_io))
        self._threads_count = config.reader_threads
        self._threads = ThreadPoolExecutor(config.reader_threads, "plain-read")

    def read(self, clock: Clock, *, hot: bool = False) -> float:
        """Read everything once and return the seconds.

        Each unit into its own place, as a load that keeps what it reads; `hot`: all units of a
        thread into the same one, which stays in the processor's caches.
        """
        count = self._threads_count
        start = clock.now()
        jobs = [
            self._threads.submit(self._read_all, self._units[number::count], hot=hot)
            for number in range(count)
        ]
        done = sum(job.result() for job in jobs)
        seconds = clock.now() - start
        assert done == sum(unit.size for unit in self._units)
        return seconds

    def _read_all(self, units: Sequence[Unit], *, hot: bool) -> int:
        return sum(self._read_one(unit, units[0] if hot else unit) for unit in units)

    def _read_one(self, unit: Unit, place: Unit) -> int:
        file: ShardFile = self._files[unit.shard]
        start = place.index * self._chunk_bytes
        return file.read_into(self._memory.view[start : start + unit.size], unit.offset)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._threads.shutdown()
        close_shards(self._files)
        self._memory.close()


def as_json(result: LoadBench, path: Path) -> dict[str, object]:
    """Return the result as plain data."""
    return {
        "checkpoint": str(path),
        "bytes": result.bytes_total,
        "plain_reader_bytes_per_s": result.plain,
        "loader_bytes_per_s": result.loader,
        "loader_without_checksums_bytes_per_s": result.loader_unverified,
        "loader_over_plain": result.ratios,
        "loader_over_plain_median": result.ratio,
        "dram_to_device_bytes_per_s": result.device,
        "first_copy_s": result.first_copy_s,
    }
