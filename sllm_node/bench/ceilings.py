"""The most that this machine can give in this run: its disk read plainly, its link copied plainly."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from sllm_node.bench.devices import Slot, settle
from sllm_node.bench.files import ModelFiles
from sllm_node.bench.scenarios import Scenario
from sllm_node.core.clock import Clock
from sllm_node.core.config import StoreConfig
from sllm_node.core.units import MIB
from sllm_node.store.reader import DirectFileSystem, close_shards, open_shards
from sllm_node.store.residency import units_of

_COPY_BYTES: Final = 256 * MIB
_COPIES: Final = 32
_WARM_UP: Final = 8
"""An idle link takes some tens of milliseconds to come up to speed."""
PLAIN_READER: Final = "plain reader"
PLAIN_COPY: Final = "plain copy"


class DiskCeiling:
    """Threads that read our shards by direct I/O, each into its own chunk again and again."""

    name = PLAIN_READER
    scenarios: tuple[Scenario, ...] = ("random",)

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._chunks = [
            Slot(config.chunk_bytes, "cpu") for _ in range(config.reader_threads)
        ]  # the memory is touched here, not while the clock runs

    def measure(self, files: ModelFiles, clock: Clock) -> float:
        """Read everything once and return bytes per second."""
        config, checkpoint = self._config, files.checkpoint
        units = units_of(checkpoint.index, config.chunk_bytes)
        count = config.reader_threads
        opened = open_shards(checkpoint, DirectFileSystem(direct=config.direct_io))

        def read(number: int) -> int:
            view = self._chunks[number].view
            return sum(
                opened[unit.shard].read_into(view[: unit.size], unit.offset)
                for unit in units[number::count]
            )

        try:
            with ThreadPoolExecutor(count, "bench-read") as threads:
                start = clock.now()
                done = sum(threads.map(read, range(count)))
                seconds = clock.now() - start
        finally:
            close_shards(opened)
        assert done == sum(unit.size for unit in units)
        return done / seconds


class CopyCeiling:
    """Copies from page-locked host memory to the device, large and one after another."""

    name = PLAIN_COPY
    scenarios: tuple[Scenario, ...] = ("cached", "random")

    def __init__(self, device: str) -> None:
        self._device = device
        self._slot = Slot(_COPY_BYTES, device)
        self._target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        self._copy(1)

    def measure(self, files: ModelFiles, clock: Clock) -> float:
        """Copy some gigabytes and return bytes per second."""
        self._copy(_WARM_UP)
        start = clock.now()
        self._copy(_COPIES)
        return _COPIES * _COPY_BYTES / (clock.now() - start)

    def _copy(self, count: int) -> None:
        for _ in range(count):
            self._slot.copy_to(self._target)
        settle({}, self._device)
