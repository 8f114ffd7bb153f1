"""What each part of the pipeline is worth, as the ServerlessLLM paper takes it apart.

Every step is a small loader of its own, on the same shards, with cold caches:

- per tensor: one buffered read and one copy for each tensor, from ordinary memory.
- +bulk: a shard is read in large pieces, then copied at once.
- +direct: the same past the page cache (O_DIRECT).
- +threads: several threads read the pieces.
- +pinned: into page-locked memory.
- +pipeline: each piece is copied as soon as it is read; nobody waits for a shard.
- +relay: half of the pieces go through a second GPU and its link, where there is one.

Host memory is taken and touched before the clock runs, in every step, so that a step differs from
the one before by its name only.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from sllm_node.bench.devices import Slot, cuda_count, host_memory, is_cuda, settle
from sllm_node.bench.files import ModelFiles, PageCache, read_at
from sllm_node.bench.reference import Reference
from sllm_node.core.clock import Clock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import BenchError
from sllm_node.engine.weights import views_of
from sllm_node.store.reader import DirectFileSystem, ShardFile, close_shards, open_shards
from sllm_node.store.residency import Unit, units_of

_SLOTS = 2
"""Of each thread of the pipeline: one is read into while the other is copied."""


@dataclass(frozen=True, slots=True)
class Step:
    """One loader of the ablation, from `bulk` to `pinned`."""

    direct: bool = False
    threads: int = 1
    pinned: bool = False


class Ablation:
    """The loaders, on one checkpoint and one device."""

    def __init__(self, files: ModelFiles, device: str, config: StoreConfig) -> None:
        self._checkpoint = files.checkpoint
        self._files = files
        self._device = device
        self._config = config
        self._units = units_of(files.checkpoint.index, config.chunk_bytes)
        self._target = torch.empty(files.checkpoint.index.size, dtype=torch.uint8, device=device)

    def steps(self) -> dict[str, Callable[[], "Run"]]:
        """Return the steps in order; each prepares a run."""
        threads = self._config.reader_threads
        found: dict[str, Callable[[], Run]] = {
            "per tensor": self._per_tensor,
            "+bulk": partial(self._by_shard, Step()),
            "+direct": partial(self._by_shard, Step(direct=True)),
            "+threads": partial(self._by_shard, Step(direct=True, threads=threads)),
            "+pinned": partial(self._by_shard, Step(direct=True, threads=threads, pinned=True)),
            "+pipeline": partial(self._pipeline, None),
        }
        if is_cuda(self._device) and cuda_count() > 1:
            other = "cuda:1" if self._device == "cuda:0" else "cuda:0"
            found["+relay"] = partial(self._pipeline, other)
        return found

    def time(self, prepare: Callable[[], "Run"], clock: Clock, cache: PageCache) -> float:
        """Return the seconds of one load with cold caches."""
        run = prepare()
        cache.drop(self._files.all())
        settle({}, self._device)
        start = clock.now()
        run()
        settle({}, self._device)
        return clock.now() - start

    def check(self, step: str, reference: Reference) -> None:
        """Make sure that the last step loaded the right bytes, and forget them.

        Raises:
            BenchError: it did not.
        """
        found = reference.compare(views_of(self._checkpoint.index, [(0, self._target)]))
        self._target.zero_()
        if found.different:
            raise BenchError(f"step {step!r} loads {len(found.different)} tensors wrongly")

    # --- the loaders --------------------------------------------------------------------------

    def _per_tensor(self) -> "Run":
        index = self._checkpoint.index
        largest = max(entry.size for entry in index.tensors)
        memory = host_memory(largest, self._device, pinned=False)
        view = memory.numpy().data

        def run() -> None:
            paths = [self._checkpoint.path / shard.name for shard in index.shards]
            opened = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
            try:
                for entry in index.tensors:
                    read_at(opened[entry.shard], view[: entry.size], entry.offset)
                    start = index.shard_base(entry.shard) + entry.offset
                    self._target[start : start + entry.size].copy_(memory[: entry.size])
            finally:
                for descriptor in opened:
                    os.close(descriptor)

        return run

    def _by_shard(self, step: Step) -> "Run":
        index = self._checkpoint.index
        largest = max(shard.size for shard in index.shards)
        memory = host_memory(largest, self._device, pinned=step.pinned)
        view = memory.numpy().data

        def read(opened: tuple[ShardFile, ...], unit: Unit) -> None:
            opened[unit.shard].read_into(view[unit.offset : unit.offset + unit.size], unit.offset)

        def run() -> None:
            opened = open_shards(self._checkpoint, DirectFileSystem(direct=step.direct))
            try:
                with ThreadPoolExecutor(step.threads, "bench-read") as threads:
                    for number, shard in enumerate(index.shards):
                        mine = [unit for unit in self._units if unit.shard == number]
                        list(threads.map(partial(read, opened), mine))
                        base = index.shard_base(number)
                        self._target[base : base + shard.size].copy_(memory[: shard.size])
            finally:
                close_shards(opened)

        return run

    def _pipeline(self, relay: str | None) -> "Run":
        count, size = self._config.reader_threads, self._config.chunk_bytes
        slots = [
            [Slot(size, self._device, relay if number % 2 else None) for _ in range(_SLOTS)]
            for number in range(count)
        ]

        def work(opened: tuple[ShardFile, ...], number: int) -> None:
            for turn, unit in enumerate(self._units[number::count]):
                slot = slots[number][turn % _SLOTS]
                slot.wait()
                opened[unit.shard].read_into(slot.view[: unit.size], unit.offset)
                start = unit.device_offset
                slot.copy_to(self._target[start : start + unit.size])

        def run() -> None:
            opened = open_shards(self._checkpoint, DirectFileSystem(direct=True))
            try:
                with ThreadPoolExecutor(count, "bench-pipeline") as threads:
                    list(threads.map(partial(work, opened), range(count)))
                for slot in (slot for row in slots for slot in row):
                    slot.wait()
            finally:
                close_shards(opened)

        return run


Run = Callable[[], None]


@dataclass(frozen=True, slots=True)
class AblationResult:
    """Seconds of every load, by step."""

    size: int
    seconds: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class AblationPlan:
    """How often and how long."""

    rounds: int
    seed: int = 0
    deadline: float | None = None
    page_cache: PageCache = field(default_factory=PageCache)


def run_ablation(
    ablation: Ablation, files: ModelFiles, reference: Reference, clock: Clock, plan: AblationPlan
) -> AblationResult:
    """Run every step once a round, in an order drawn anew; the first run of each is checked.

    No round but the first begins after the deadline.

    Raises:
        BenchError: a step loads wrong bytes.
    """
    numbers = np.random.default_rng(plan.seed)
    steps = ablation.steps()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in _rounds(plan, clock):
        for place in numbers.permutation(len(steps)):
            name = list(steps)[place]
            seconds[name].append(ablation.time(steps[name], clock, plan.page_cache))
            if number == 0:
                ablation.check(name, reference)
    return AblationResult(files.size, seconds)


def _rounds(plan: AblationPlan, clock: Clock) -> Iterator[int]:
    longest = 0.0
    for number in range(plan.rounds):
        start = clock.now()
        if number and plan.deadline is not None and start + longest > plan.deadline:
            return
        yield number
        longest = max(longest, clock.now() - start)
