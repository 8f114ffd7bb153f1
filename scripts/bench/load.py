"""Reading speed from this disk, recorded as a figure.

python -m scripts.bench.load --folder DIR --size 2GiB
Writes a checkpoint of random bytes to DIR, measures it with `sllm-node bench load`, deletes it.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from scripts.bench.figures import record
from sllm_node.checkpoint.index import CODEC, VERSION, TensorIndex
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.output import DiskFiles
from sllm_node.checkpoint.writer import ShardWriter, write_index
from sllm_node.core.units import GIB, MIB, parse_size

TENSOR = 64 * MIB
CHUNK = 16 * MIB


def write_random(folder: Path, size: int) -> None:
    """Write a checkpoint of `size` random bytes."""
    folder.mkdir(parents=True)
    numbers, files = np.random.default_rng(0), DiskFiles()
    specs = [TensorSpec(f"t{i}", "U8", (TENSOR,)) for i in range(size // TENSOR)]
    layout = plan_layout(specs, 4 * GIB)
    with ShardWriter(folder, layout, CHUNK, files) as writer:
        for entry in layout.tensors:
            writer.begin(entry)
            writer.write(memoryview(numbers.bytes(entry.size)))
        shards = writer.finish()
    index = TensorIndex(
        VERSION, folder.name, "Random", "U8", 1, CHUNK, 0, shards, layout.tensors, (), CODEC
    )
    write_index(folder, index, files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", type=parse_size, default=2 * GIB)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-loads", type=int, default=50)
    arguments = parser.parse_args()
    store = Path(tempfile.mkdtemp(prefix="bench-load-", dir=arguments.folder))
    try:
        write_random(store / "random", arguments.size)
        command = [
            sys.executable, "-m", "sllm_node", "bench", "load", "random", "--store", str(store),
            "--rounds", str(arguments.rounds), "--warm-loads", str(arguments.warm_loads), "--json",
        ]  # fmt: skip
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        shutil.rmtree(store)
    plain = found["plain_reader_bytes_per_s"]
    ratios = found["loader_over_plain"]
    print(f"plain reader     {statistics.median(plain) / 1e9:.3f} GB/s")
    print(f"loader           {statistics.median(found['loader_bytes_per_s']) / 1e9:.3f} GB/s")
    print(f"ratio            {statistics.median(ratios):.3f}")
    waits_ms = sorted(1e3 * seconds for seconds in found["first_copy_s"])
    p99 = waits_ms[int(0.99 * (len(waits_ms) - 1))]
    print(f"warm acquire     {statistics.median(waits_ms):.3f} ms, p99 {p99:.3f} ms")
    run = f"python -m scripts.bench.load --size {arguments.size // MIB}MiB --rounds {arguments.rounds}"
    record(
        "disk_to_dram_ratio", statistics.median(ratios), ratios, command=run,
        note=f"median of {len(ratios)} rounds; the plain reader's {statistics.median(plain) / 1e9:.2f} GB/s "
        "is the ceiling; checksums on",
    )  # fmt: skip


if __name__ == "__main__":
    main()
