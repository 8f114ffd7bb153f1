r"""Loads onto GPUs against the ceilings of the same run: what the loader adds to copying bytes.

    python -m scripts.bench.gpu_load --shape 8b --store /dev/shm/store \
        --devices cuda:0,cuda:1 --scenarios dram,disk,relay,clone,small-pool --out result.json

Contestants are interleaved round by round: `copy` is nothing but one long copy from pinned memory,
`reader` nothing but threads that read the files by direct I/O. Every scenario compares every byte
on the device once, against bytes made again from their seeds.
"""

import argparse
import asyncio
import gc
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
import uvloop

from scripts.bench import random_checkpoint
from scripts.bench.device import wait
from sllm_node.bench.shapes import ELEMENT_BYTES, SHAPE_NAMES, find_shape
from sllm_node.checkpoint.catalog import Catalog, Checkpoint, open_checkpoint
from sllm_node.checkpoint.recode import recode
from sllm_node.codec.names import EXPONENT
from sllm_node.core.allocator import keep_freed_memory
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Part, Placement, Tier
from sllm_node.core.units import GIB, MIB, align_up
from sllm_node.device.base import Device
from sllm_node.device.cpu import CpuDevice
from sllm_node.device.host import map_memory, touch
from sllm_node.engine.weights import torch_name
from sllm_node.store.bench import PlainReader
from sllm_node.store.lease import Lease
from sllm_node.store.store import Store


@dataclass
class Run:
    """What all scenarios share."""

    checkpoint: Checkpoint
    devices: Sequence[Device]
    config: StoreConfig
    rounds: int
    seed: int
    encoded: Checkpoint | None = None
    """The same numbers, encoded."""
    kind: random_checkpoint.Kind = random_checkpoint.FINITE
    """Of numbers."""
    with_disk: bool = True
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Seconds, by contestant."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> ModelId:
        """The model that is loaded."""
        return self.checkpoint.model

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.checkpoint.index.size

    def whole(self, device: int) -> Placement:
        """All of it on one device."""
        return (Part(self.devices[device].name, 0, self.size),)

    def note(self, name: str, seconds: float) -> None:
        """Keep a sample."""
        self.samples.setdefault(name, []).append(seconds)

    async def rounds_of(self, *contestants: tuple[str, Callable[[], Awaitable[float]]]) -> None:
        """Run everyone once a round; the first round does not count."""
        for number in range(self.rounds + 1):
            for name, contestant in contestants:
                seconds = await contestant()
                if number:
                    self.note(name, seconds)


def same_bytes(run: Run, lease: Lease) -> bool:
    """Compare every byte on the device."""
    (part,) = lease.parts
    flat = torch.as_tensor(part.buffer.array, device=torch_name(part.part.device))
    with ThreadPoolExecutor(cpu_count() or 1) as threads:
        made = list(random_checkpoint.chunks(run.checkpoint.index, run.seed))
        for start in range(0, len(made), COMPARED_AT_ONCE):
            some = made[start : start + COMPARED_AT_ONCE]
            wanted = threads.map(
                lambda chunk: random_checkpoint.chunk_bytes(chunk[1], chunk[2], kind=run.kind),
                some,
            )
            for (place, _, size), data in zip(some, wanted, strict=True):
                host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if not torch.equal(flat[place : place + size], host.to(flat.device)):
                    return False
    return True


COMPARED_AT_ONCE = 128
COPIED_BYTES = 4 * GIB
SMALL_POOL_BYTES = GIB // 2
HELD_SHARE = 2
"""Of the raw bytes: what the pool of `codec` and the copy's memory take, not more, as both checkpoints
come on top of it."""


async def store_of(run: Run, **config: Any) -> Store:
    """Start a store on the run's devices."""
    catalog = Catalog(run.checkpoint.path.parent)
    catalog.scan()
    values = {f: getattr(run.config, f) for f in run.config.__struct_fields__} | config
    store = Store(catalog, run.devices, StoreConfig(**values), MonotonicClock(), Metrics())
    await store.start()
    return store


def loader(
    run: Run,
    store: Store,
    placement: Placement,
    reason: str,
    *,
    cold: bool,
    model: ModelId | None = None,
) -> Any:
    """Return a contestant: load, give back, evict."""
    wanted = model or run.model
    checked: list[bool] = []

    async def load() -> float:
        start = time.perf_counter()
        lease = await store.acquire(wanted, placement)
        seconds = time.perf_counter() - start
        report = lease.report
        assert report is not None
        if not checked:
            checked.append(same_bytes(run, lease))
            assert checked[0], "the bytes on the device are not those of the checkpoint"
        run.extra.setdefault("first_copy_ms", []).append(1e3 * report.first_copy_s)
        run.extra["relayed_share"] = report.bytes_relayed / run.size
        if report.decode_s:
            run.extra.setdefault("decode_gbps", []).append(run.size / report.decode_s / 1e9)
        lease.release()
        store.evict(wanted, Tier.DEVICE, reason, placement)
        if cold:
            store.evict(wanted, Tier.DRAM, reason)
        begun = time.perf_counter()
        for device in run.devices:  # a load is measured from memory that is free, not becoming so
            await asyncio.to_thread(device.free_bytes)
        run.extra.setdefault("unmap_ms", []).append(1e3 * (time.perf_counter() - begun))
        return seconds

    return load


def copier(run: Run) -> tuple[Callable[[], Awaitable[float]], Callable[[], None]]:
    """Return the ceiling: copies of 1 GiB enqueued back to back, one wait at the end; and its end.

    They copy the whole size, 4 GiB of pinned memory again and again: the seconds of fewer bytes would
    have to be multiplied, and with them what it costs to begin.
    """
    size = min(COPIED_BYTES, align_up(run.size, MIB))
    device = run.devices[0]
    pinned, target, stream = (
        device.pin(size, huge_pages=True),
        device.allocate(size),
        device.stream(),
    )

    async def copy() -> float:
        copied, start = 0, time.perf_counter()
        while copied < run.size:
            at = copied % size
            end = min(at + GIB, size, at + run.size - copied)
            stream.copy_in(target, at, pinned.view[at:end])
            copied += end - at
        wait(stream.record())
        return time.perf_counter() - start

    def close() -> None:
        stream.close()
        target.close()
        pinned.close()

    return copy, close


async def dram(run: Run) -> None:
    """From the pinned pool to one device."""
    store = await store_of(run, relay=False)
    copy, close = copier(run)
    await store.prefetch(run.model)
    assert store.residency(run.model)[Tier.DRAM] == run.size
    await run.rounds_of(
        ("copy", copy), ("ours", loader(run, store, run.whole(0), "operator", cold=False))
    )
    close()
    await store.close()


async def codec(run: Run) -> None:
    """Raw and encoded, from the pinned pool over one link and over all, and from storage."""
    assert run.encoded is not None
    chunk, sizes = run.config.chunk_bytes, (run.size, run.encoded.index.file_size)
    pool = sum(int(1.05 * size) // chunk * chunk + 16 * chunk for size in sizes)
    store = await store_of(run, relay=len(run.devices) > 1, pool_bytes=ByteSize(pool))
    names = {"raw": run.model, "codec": run.encoded.model}
    loads = {
        (name, cold, links): loader(run, store, run.whole(0), "operator", cold=cold, model=model)
        for name, model in names.items()
        for cold in (False, True)
        for links in (False, True)
    }

    def over(name: str, *, links: bool, cold: bool = False) -> Callable[[], Awaitable[float]]:
        async def load() -> float:
            store.lend_links(lambda device: not links)
            return float(await loads[name, cold, links]())

        return load

    for model in names.values():
        await store.prefetch(model)
    held = {name: store.residency(model)[Tier.DRAM] for name, model in names.items()}
    run.extra["dram_ratio"] = held["codec"] / held["raw"]
    copy, close = copier(run)
    contestants = [("copy", copy), *((name, over(name, links=False)) for name in names)]
    if len(run.devices) > 1:
        count = len(run.devices)
        contestants += [(f"{name}, {count} links", over(name, links=True)) for name in names]
    await run.rounds_of(*contestants)
    if run.with_disk:
        colds = [(f"{name}, disk", over(name, links=False, cold=True)) for name in names]
        await run.rounds_of(*colds)
    close()
    await store.close()


async def disk(run: Run) -> None:
    """From storage to one device, through a pool that keeps all and through one that keeps little."""
    store = await store_of(run, relay=False)
    small = await store_of(run, relay=False, pool_bytes=ByteSize(SMALL_POOL_BYTES))
    reader = PlainReader(run.checkpoint, run.config, run.devices[0])
    clock = MonotonicClock()

    async def read() -> float:
        return await asyncio.to_thread(reader.read, clock)

    async def read_hot() -> float:
        return await asyncio.to_thread(reader.read, clock, hot=True)

    ours = loader(run, store, run.whole(0), "operator", cold=True)
    through = loader(run, small, run.whole(0), "operator", cold=True)
    await run.rounds_of(
        ("reader", read), ("ours", ours), ("hot reader", read_hot), ("ours, small pool", through)
    )
    reader.close()
    await store.close()
    await small.close()


async def relay(run: Run) -> None:
    """From the pinned pool to one device over the links of all."""
    store = await store_of(run, relay=True)
    await store.prefetch(run.model)
    load = loader(run, store, run.whole(0), "operator", cold=False)

    async def one() -> float:
        store.lend_links(lambda device: True)
        return float(await load())

    async def several() -> float:
        store.lend_links(lambda device: False)
        return float(await load())

    await run.rounds_of(("one link", one), (f"{len(run.devices)} links", several))
    await store.close()


async def clone(run: Run) -> None:
    """From one device to another."""
    store = await store_of(run, relay=False)
    lease = await store.acquire(run.model, run.whole(0))
    ours = loader(run, store, run.whole(1), "operator", cold=False)
    await run.rounds_of(("clone", ours))
    lease.release()
    await store.close()


async def neighbour(run: Run) -> None:
    """What lending its link costs a sibling that decodes: a step that reads 8 GB of its memory."""
    store = await store_of(run, relay=True)
    await store.prefetch(run.model)
    load = loader(run, store, run.whole(0), "operator", cold=False)
    await load()
    name = torch_name(run.devices[1].name)
    weight = torch.ones(1 << 20, 4096, dtype=torch.bfloat16, device=name)
    token = torch.ones(4096, 1, dtype=torch.bfloat16, device=name)
    for _ in range(run.rounds):
        for contestant in ("step alone", "step, link lent"):
            lending = contestant != "step alone"
            loading = asyncio.create_task(load()) if lending else None
            await asyncio.sleep(0.02)
            run.note(contestant, await asyncio.to_thread(_steps, weight, token))
            if loading is not None:
                await loading
    del weight, token
    torch.cuda.empty_cache()
    await store.close()


def _steps(weight: torch.Tensor, token: torch.Tensor) -> float:
    """Return the seconds of a step, of ten in a row."""
    with torch.cuda.device(weight.device):
        make: Any = torch.cuda.Event
        begin, end = make(enable_timing=True), make(enable_timing=True)
        begin.record()
        for _ in range(10):
            weight @ token
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e4


async def small_pool(run: Run) -> None:
    """From storage through a pool of 1 GiB."""
    store = await store_of(run, relay=False, pool_bytes=ByteSize(GIB))
    ours = loader(run, store, run.whole(0), "operator", cold=True)
    await run.rounds_of(("1 GiB pool", ours))
    await store.close()


SCENARIOS = {
    "dram": dram,
    "codec": codec,
    "incompressible": codec,
    "disk": disk,
    "relay": relay,
    "clone": clone,
    "neighbour": neighbour,
    "small-pool": small_pool,
}


TWICE: dict[str, random_checkpoint.Kind] = {
    "codec": random_checkpoint.GAUSSIAN,
    "incompressible": random_checkpoint.NOISE,
}
"""These load the same numbers raw and encoded."""


def summary(run: Run) -> dict[str, Any]:
    """Return medians and rates."""
    found: dict[str, Any] = {"bytes": run.size, "extra": run.extra, "samples_s": run.samples}
    for name, seconds in run.samples.items():
        middle = statistics.median(seconds)
        found[name] = {
            "median_s": middle, "gbps": run.size / middle / 1e9,
            "worst_s": max(seconds), "best_s": min(seconds), "rounds": len(seconds),
        }  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="8b", choices=SHAPE_NAMES)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--scenarios", default="dram,disk")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunk", type=int, default=16, help="MiB")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--verify", default="first")
    parser.add_argument("--block", type=int, default=0, help="MiB; store.read_block_bytes")
    parser.add_argument(
        "--no-disk", action="store_true", help="no loads from storage in codec and incompressible"
    )
    parser.add_argument(
        "--hold", action="store_true",
        help="codec: take the pool's memory before checkpoints on tmpfs take theirs, and give it back;\n"
        "twice the raw bytes, and the checkpoints beside it",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scenarios = options.scenarios.split(",")
    if set(scenarios) - set(TWICE) and not (options.store / options.shape).exists():
        start = time.perf_counter()
        size = random_checkpoint.write(options.store, options.shape)
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)
    catalog = Catalog(options.store)
    catalog.scan()
    checkpoint = None
    if set(scenarios) - set(TWICE):
        checkpoint = catalog.get(ModelId(options.shape))
    results = {}
    for scenario in scenarios:
        encoded, kind = None, TWICE.get(scenario, random_checkpoint.FINITE)
        if scenario in TWICE:
            with _held(HELD_SHARE * _raw_bytes(options.shape) if options.hold else 0):
                checkpoint, encoded = _both(options.store, options.shape, kind)
        assert checkpoint is not None
        devices = _devices(options.devices.split(","), checkpoint.index.size)
        chunk = options.chunk * MIB
        spare = len(checkpoint.index.shards) + 8
        config = StoreConfig(
            path=str(options.store),
            pool_bytes=ByteSize(align_up(checkpoint.index.size, chunk) + spare * chunk),
            chunk_bytes=ByteSize(chunk),
            reader_threads=options.threads,
            verify=options.verify,
            read_block_bytes=ByteSize(options.block * MIB),
        )
        run = Run(
            checkpoint, devices, config, options.rounds, 0, encoded, kind,
            with_disk=not options.no_disk,
        )  # fmt: skip
        start = time.perf_counter()
        gc.collect()
        gc.freeze()  # as a node does when it starts
        uvloop.run(SCENARIOS[scenario](run))
        for device in devices:
            device.close()
        results[scenario] = summary(run)
        for name in run.samples:
            line = results[scenario][name]
            print(
                f"{options.shape} {scenario:10} {name:10} {line['median_s']:8.4f} s "
                f"({line['best_s']:.4f} to {line['worst_s']:.4f})  {line['gbps']:7.2f} GB/s",
                flush=True,
            )
        extra = {
            key: value if isinstance(value, float) else max(value)
            for key, value in run.extra.items()
        }
        print(f"  worst {extra}, scenario took {time.perf_counter() - start:.0f} s", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


@contextmanager
def _held(size: int) -> Iterator[None]:
    """Keep `size` bytes of memory from everybody else meanwhile.

    Of a machine with two sockets, a virtual machine may show one: memory that is taken late then is far
    from the GPUs (27 GB/s were seen, not 55). Checkpoints on tmpfs take theirs before the pool does; a
    node that starts with its machine finds it the other way round, and so does the pool behind this.
    """
    if not size:
        yield
        return
    start = time.perf_counter()
    region = map_memory(size, huge_pages=True)
    try:
        with memoryview(region) as view:
            touch(view, huge_pages=True)
        print(f"held {size / 1e9:.1f} GB after {time.perf_counter() - start:.1f} s", flush=True)
        yield
    finally:
        region.close()


def _raw_bytes(shape: str) -> int:
    sizes = (math.prod(tensor.dimensions) for tensor in find_shape(shape).tensors)
    return ELEMENT_BYTES * sum(sizes)


def _both(store: Path, shape: str, kind: random_checkpoint.Kind) -> tuple[Checkpoint, Checkpoint]:
    """Return weights of `shape`, raw and encoded, written if they are not there."""
    raw, encoded = f"{shape}-{kind}", f"{shape}-{kind}-codec"
    if not (store / raw).exists():
        start = time.perf_counter()
        size = random_checkpoint.write(store, shape, raw, kind=kind)
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)
    if not (store / encoded).exists():
        start = time.perf_counter()
        copy = store / f"{encoded}-new"
        shutil.copytree(store / raw, copy, copy_function=os.link)
        made = recode(open_checkpoint(copy), EXPONENT)
        copy.rename(store / encoded)
        seconds, index = time.perf_counter() - start, made.index
        share = index.file_size / index.size
        print(f"encoded at {index.size / seconds / 1e6:.0f} MB/s to {share:.4f}", flush=True)
    return open_checkpoint(store / raw), open_checkpoint(store / encoded)


def _devices(names: Sequence[str], size: int) -> list[Device]:
    """Open the devices; each may reach the others."""
    if not names[0].startswith("cuda"):
        return [CpuDevice(2 * size + GIB, name) for name in names]
    from sllm_node.device.cuda import CudaDevice

    numbers = [int(name.partition(":")[2]) for name in names]
    return [
        CudaDevice(n, reserve_bytes=2 * GIB, siblings=[o for o in numbers if o != n])
        for n in numbers
    ]


if __name__ == "__main__":
    main()
