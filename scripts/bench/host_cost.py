"""What a load costs the host: checkpoints of any size onto GPUs that are not there.

    python -m scripts.bench.host_cost [--shapes 8b,32b] [--links 1,4] [--rate 55.3] [--map-ms 1.6]

The driver is a null driver (`null_driver.py`), files and pinned memory hold no bytes; index, plans,
ledgers, event loop, threads and the device's own code are the real ones. Without `--rate` copies take
no time, so the seconds of a load are the host's alone; with it, and with what mapping a piece takes,
what a load takes beyond the bytes' own time shows. `cpu` are seconds of all threads, of the first load,
which makes plans, and of a later one: on a machine that others use they tell more than seconds do.
What the driver itself does in a call, 1 to 5 us, is not there.
"""

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop

from scripts.bench.null_driver import NullDevice, NullDriver
from sllm_node.bench.shapes import find_shape
from sllm_node.checkpoint.catalog import Checkpoint, ShardIdentity
from sllm_node.checkpoint.index import Shard, TensorIndex, shard_name
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Tier
from sllm_node.core.units import GIB, MIB, PAGE
from sllm_node.store.store import Store

SHARD_BYTES = 4 * GIB
RATIO = 0.68
"""Of encoded to decoded bytes, for bf16."""


def made_checkpoint(shape: str, codec: str) -> Checkpoint:
    """Return a checkpoint of `shape` without files; encoded ones have chunks of 1 MiB."""
    specs = [TensorSpec(t.name, "BF16", t.dimensions) for t in find_shape(shape).tensors]
    layout = plan_layout(specs, SHARD_BYTES)
    step = 16 * MIB if codec == RAW else MIB
    shards = []
    for number, size in enumerate(layout.shard_sizes):
        count = -(-size // step)
        digests, stored = tuple(range(count)), tuple[int, ...]()
        if codec != RAW:
            drawn = np.random.default_rng(number).integers(-1, 2, count) + int(RATIO * step) // PAGE
            last = size - (count - 1) * step
            stored = (
                *(int(pages) * PAGE for pages in drawn[:-1]),
                min(last, int(drawn[-1]) * PAGE),
            )
        codecs = ("exp-bf16",) * len(stored)
        shards.append(Shard(shard_name(number), size, digests, codecs, stored))
    index = TensorIndex(
        1 if codec == RAW else 2, shape, "Handmade", "BF16", 4096, step, 0, tuple(shards),
        layout.tensors, (), codec,
    )  # fmt: skip
    identities = tuple(ShardIdentity(0, 0, 0, shard.file_size) for shard in shards)
    return Checkpoint(ModelId(f"{shape}-{codec}"), Path("none"), index, identities)


class _Files:
    """Shards that are read without a byte."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._identities = dict(
            zip((s.name for s in checkpoint.index.shards), checkpoint.identities, strict=True)
        )

    def open(self, path: Path) -> Any:
        identity = self._identities[path.name]
        return SimpleNamespace(
            read_into=lambda view, offset: len(view), identity=lambda: identity, close=lambda: None
        )


class Collections:
    """Times the cyclic collector, by generation."""

    def __init__(self) -> None:
        self.seconds = [0.0, 0.0, 0.0]
        self._begun = 0.0
        gc.callbacks.append(self._note)

    def close(self) -> None:
        """Look no more."""
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.perf_counter()
        else:
            self.seconds[about["generation"]] += time.perf_counter() - self._begun


async def measure(
    checkpoint: Checkpoint, links: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Load `checkpoint` over and over; the first load, which makes plans, is told apart."""
    config = StoreConfig(
        path="none", pool_bytes=ByteSize(checkpoint.index.file_size // GIB * GIB + 3 * GIB),
        chunk_bytes=ByteSize(options.chunk * MIB), verify="never", relay=links > 1,
    )  # fmt: skip
    devices = [NullDevice(n, siblings=[o for o in range(links) if o != n]) for n in range(links)]
    catalog = SimpleNamespace(get=lambda model: checkpoint)
    store = Store(
        catalog, devices, config, MonotonicClock(), Metrics(), files=_Files(checkpoint)
    )  # fmt: skip
    await store.start()
    await store.prefetch(checkpoint.model)
    gc.collect()
    gc.freeze()  # as a node does when it starts
    seconds, first_copies, busy, collections = [], [], [], Collections()
    profile = cProfile.Profile()
    for number in range(options.rounds + 1):
        if options.profile and number == 1:
            profile.enable()
        start, begun = time.perf_counter(), time.process_time()
        lease = await store.acquire(checkpoint.model)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - begun)
        assert lease.report is not None
        first_copies.append(1e3 * lease.report.first_copy_s)
        if not number:
            collections.seconds = [0.0] * 3
        lease.release()
        store.evict(checkpoint.model, Tier.DEVICE, "operator")
        for device in devices:
            await asyncio.to_thread(device.free_bytes)  # when all is unmapped
    profile.disable()
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
    await store.close()
    collections.close()
    gc.unfreeze()
    for device in devices:
        device.close()
    return {
        "first_s": seconds[0], "median_s": statistics.median(seconds[1:]), "worst_s": max(seconds[1:]),
        "first_cpu_s": busy[0], "cpu_s": statistics.median(busy[1:]),
        "first_copy_ms": statistics.median(first_copies[1:]), "worst_first_copy_ms": max(first_copies[1:]),
        "collector_ms": [1e3 * s / options.rounds for s in collections.seconds],
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="8b,32b")
    parser.add_argument("--codecs", default=f"{RAW},{EXPONENT}")
    parser.add_argument("--links", default="1,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=16, help="MiB")
    parser.add_argument("--rate", type=float, default=0.0, help="GB/s of a link; 0: no time at all")
    parser.add_argument("--map-ms", type=float, default=0.0, help="to map a piece")
    parser.add_argument("--no-gc", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.no_gc:
        gc.disable()
    found = {}
    for links in map(int, options.links.split(",")):
        NullDriver(links, 1e9 * options.rate, options.map_ms / 1e3).install()
        for shape in options.shapes.split(","):
            for codec in options.codecs.split(","):
                checkpoint = made_checkpoint(shape, codec)
                result = uvloop.run(measure(checkpoint, links, options))
                found[f"{shape} {codec} {links}"] = result
                print(
                    f"{shape:4} {codec:8} {links} links  first {result['first_s']:.4f} s"
                    f"  then {result['median_s']:.4f} s (worst {result['worst_s']:.4f})"
                    f"  cpu {result['first_cpu_s']:.4f}, {result['cpu_s']:.4f}"
                    f"  first copy {result['first_copy_ms']:.1f} ms (worst"
                    f" {result['worst_first_copy_ms']:.1f})  collector"
                    f" {', '.join(f'{ms:.1f}' for ms in result['collector_ms'])} ms",
                    flush=True,
                )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
