"""Checkpoints with the shapes of well-known models and random weights, in our own format.

Written straight to shards by many threads, for measuring loads. Each file chunk has a seed of its
own, so its bytes can be made again and compared. Weights are bf16 of random sign and mantissa
between 2^-7 and 2^-3, so that a model made of them computes numbers; they say nothing about how well
trained weights compress.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import cpu_count
from pathlib import Path
from typing import Final, Literal

import numpy as np
import xxhash

from sllm_node.bench.shapes import find_shape
from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.index import (
    CODEC,
    INDEX_FILE,
    VERSION,
    Shard,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.core.units import GIB, MIB
from tests.models import make_source

SHARD_BYTES: Final = 4 * GIB
CHUNK_BYTES: Final = 16 * MIB

Kind = Literal["finite", "gaussian", "noise"]
FINITE: Final[Kind] = "finite"
"""Random numbers of ordinary size, quickly made."""
GAUSSIAN: Final[Kind] = "gaussian"
"""Distributed as in trained weights: what codecs are measured with."""
GAUSSIAN_CHUNKS: Final = 61
"""That differ: they take long to make. No two neighbours are the same."""
NOISE: Final[Kind] = "noise"
"""Every bit random: nothing makes these smaller."""


def write(
    root: Path, shape: str, name: str | None = None, seed: int = 0, *, kind: Kind = FINITE
) -> int:
    """Write the checkpoint `name` of `shape` under `root` and return its bytes.

    `kind`: of numbers.
    """
    found = find_shape(shape)
    specs = [TensorSpec(tensor.name, "BF16", tensor.dimensions) for tensor in found.tensors]
    layout = plan_layout(specs, SHARD_BYTES)
    folder = root / (name or shape)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    with ThreadPoolExecutor(cpu_count() or 1) as threads:
        for number, size in enumerate(layout.shard_sizes):
            path = folder / shard_name(number)
            path.touch()
            with path.open("r+b") as file:
                file.truncate(size)
                jobs = [
                    (
                        file.fileno(),
                        chunk_seed(seed, number, at),
                        at,
                        min(CHUNK_BYTES, size - at),
                        kind,
                    )
                    for at in range(0, size, CHUNK_BYTES)
                ]
                digests = tuple(threads.map(_write_chunk, jobs))
            shards.append(Shard(path.name, size, digests))
    index = TensorIndex(
        VERSION, folder.name, found.config.architectures[0], "BF16",
        found.config.max_position_embeddings, CHUNK_BYTES, 0, tuple(shards), layout.tensors, (), CODEC,
    )  # fmt: skip
    (folder / INDEX_FILE).write_bytes(to_json(index))
    return index.size


def make_servable(folder: Path, shape: str) -> None:
    """Put config and a small byte-level tokenizer beside the weights."""
    with tempfile.TemporaryDirectory() as place:
        source = make_source(Path(place) / "tiny")
        for path in source.iterdir():
            if "tokenizer" in path.name or path.suffix == ".jinja":
                shutil.copy(path, folder)
    find_shape(shape).config.save_pretrained(folder)


def write_served(store: Path, shape: str, names: Sequence[str]) -> int:
    """Write a servable checkpoint of `shape` under these names, where they are not there.

    They share their files. Returns the bytes of one.
    """
    first = store / names[0]
    if not first.exists():
        begun = time.perf_counter()
        made = store / f".new-{first.name}"
        shutil.rmtree(made, ignore_errors=True)
        write(store, shape, made.name)
        make_servable(made, shape)
        made.rename(first)
        print(f"weights written in {time.perf_counter() - begun:.0f} s", flush=True)
    for name in names[1:]:
        if not (store / name).exists():
            shutil.copytree(first, store / name, copy_function=os.link)
    return open_checkpoint(first).index.size


def chunk_seed(seed: int, shard: int, offset: int) -> int:
    """Return the seed of a file chunk."""
    return (seed << 48) + (shard << 36) + offset // CHUNK_BYTES


def chunk_bytes(seed: int, size: int, *, kind: Kind = FINITE) -> bytes:
    """Return the bytes of the file chunk that has this seed."""
    numbers = np.random.Generator(np.random.SFC64(seed))
    if kind == NOISE:
        return numbers.bytes(size)
    if kind == GAUSSIAN:
        return _gaussian(seed % GAUSSIAN_CHUNKS, CHUNK_BYTES)[:size]
    made = numbers.integers(0, 1 << 16, size // 2, np.uint16)
    return bytes((made & 0x81FF | 0x3C00).data)


@cache
def _gaussian(seed: int, size: int) -> bytes:
    drawn = np.random.Generator(np.random.SFC64(seed)).standard_normal(size // 2, np.float32)
    drawn *= np.float32(0.02)
    return bytes((drawn.view(np.uint32) >> 16).astype(np.uint16).data)


def _write_chunk(job: tuple[int, int, int, int, Kind]) -> int:
    from os import pwrite

    descriptor, seed, offset, size, kind = job
    data = chunk_bytes(seed, size, kind=kind)
    done = 0
    while done < size:
        done += pwrite(descriptor, data[done:], offset + done)
    return xxhash.xxh3_64_intdigest(data)


def chunks(index: TensorIndex, seed: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place on the device, seed, size) of every file chunk."""
    for number, shard in enumerate(index.shards):
        base = index.shard_base(number)
        for offset in range(0, shard.size, CHUNK_BYTES):
            size = min(CHUNK_BYTES, shard.size - offset)
            yield base + offset, chunk_seed(seed, number, offset), size
