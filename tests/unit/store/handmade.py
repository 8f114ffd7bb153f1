"""Checkpoints of random bytes, written without the converter, and file systems that fail on demand."""

import random
from pathlib import Path

import numpy as np
import torch
import xxhash

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.index import (
    CODEC,
    INDEX_FILE,
    VERSION,
    Shard,
    TensorEntry,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.codec.chunks import encode_chunk
from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.core.units import align_up
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.weights import torch_name
from sllm_node.store.arena import PieceState
from sllm_node.store.reader import DirectFileSystem
from sllm_node.store.residency import UnitState
from sllm_node.store.store import Store

CHUNK = 8192
PIECE = 12288
"""No multiple of a chunk: units straddle pieces."""


ENCODED_CHUNK = 3 * 4096
"""What `2 * CHUNK` bytes of weights take when they are encoded."""


def pool_chunk(codec: str) -> int:
    """Return the size of a pool chunk that holds one file chunk."""
    return CHUNK if codec == RAW else ENCODED_CHUNK


def weights(size: int, seed: str) -> bytes:
    """Return bf16 numbers as models have them."""
    drawn = np.random.default_rng(list(seed.encode())).standard_normal(size // 2)
    return (drawn.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def write_encoded(root: Path, name: str, shards, seed) -> bytes:
    """Write weights, encoded, in twice as many bytes as `shards` say; return them."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    whole, made, tensors, step = b"", [], [], 2 * CHUNK
    for number, size in enumerate(2 * size for size in shards):
        data = weights(size, f"{name}{seed}{number}")
        whole += data
        cuts = [data[start : start + step] for start in range(0, size, step)]
        stored = []
        for cut in cuts:
            codec, encoded = encode_chunk("exp-bf16", memoryview(cut))
            padded = bytes(encoded).ljust(align_up(len(encoded), 4096), b"\0")
            stored.append((codec, padded) if len(padded) < len(cut) else (RAW, cut))
        (folder / shard_name(number)).write_bytes(b"".join(data for _, data in stored))
        digests = tuple(xxhash.xxh3_64_intdigest(data) for _, data in stored)
        codecs = tuple(codec for codec, _ in stored)
        sizes = tuple(len(data) for _, data in stored)
        made.append(Shard(shard_name(number), size, digests, codecs, sizes))
        tensors += [
            TensorEntry(
                f"t{number}.{i * step}", "BF16", (len(cut) // 2,), number, i * step, len(cut)
            )
            for i, cut in enumerate(cuts)
        ]
    shards, entries = tuple(made), tuple(tensors)
    index = TensorIndex(2, name, "Handmade", "BF16", 16, step, 0, shards, entries, (), EXPONENT)
    (folder / INDEX_FILE).write_bytes(to_json(index))
    return whole


def write_checkpoint(
    root: Path, name: str, shards=(5 * CHUNK, 2 * CHUNK + 4096), seed=0, codec=None
) -> bytes:
    """Write a checkpoint with one tensor a chunk; return its bytes as they lie on a device."""
    if (codec or Rig.codec) != RAW:
        return write_encoded(root, name, shards, seed)
    numbers = random.Random(f"{name}{seed}")
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    whole, made, tensors = b"", [], []
    for number, size in enumerate(shards):
        data = numbers.randbytes(size)
        whole += data
        (folder / shard_name(number)).write_bytes(data)
        cuts = range(0, size, CHUNK)
        digests = tuple(xxhash.xxh3_64_intdigest(data[cut : cut + CHUNK]) for cut in cuts)
        made.append(Shard(shard_name(number), size, digests))
        tensors += [
            TensorEntry(f"t{number}.{cut}", "U8", (min(CHUNK, size - cut),), number, cut, min(CHUNK, size - cut))
            for cut in cuts
        ]  # fmt: skip
    index = TensorIndex(
        VERSION, name, "Handmade", "U8", 16, CHUNK, 0, tuple(made), tuple(tensors), (), CODEC
    )
    (folder / INDEX_FILE).write_bytes(to_json(index))
    return whole


class FaultyFile:
    def __init__(self, file, system):
        self._file, self._system = file, system

    def read_into(self, view, offset):
        self._system.before_read(offset)
        count = self._file.read_into(view, offset)
        return self._system.after_read(view, offset, count)

    def identity(self):
        return self._file.identity()

    def close(self):
        self._system.open_files -= 1
        self._file.close()


class FaultyFileSystem:
    """The real one, with hooks before and after each read and a count of open files."""

    def __init__(self):
        self._real = DirectFileSystem()
        self.open_files = 0
        self.reads = 0
        self.opening = lambda path: None
        self.before_read = lambda offset: None
        self.after_read = lambda view, offset, count: count

    def open(self, path):
        self.opening(path)
        file = self._real.open(path)
        self.open_files += 1
        return FaultyFile(file, self)


def chunk_of(ledger, model, unit):
    """Return the chunk that holds a unit; None: it is not in DRAM."""
    slot = ledger._rows[model].slots[unit]
    return slot.chunk if slot.state is UnitState.FILLED else None


class Rig:
    """A store over handmade checkpoints `a`, `b` and `c`, and what must be true when it is quiet."""

    codec = RAW
    """Of the checkpoints; tests are run with others, too."""

    def __init__(
        self, root: Path, *, chunks=16, memory=1 << 20, names="abc", devices=1, shards=(), **config
    ):
        self.chunk = pool_chunk(self.codec)
        self.scale = 1 if self.codec == RAW else 2
        """Models are larger when they are encoded, with everything on devices."""
        sizes = {"shards": shards} if shards else {}
        self.bytes = {ModelId(name): write_checkpoint(root, name, **sizes) for name in names}
        self.root = root
        self.catalog = Catalog(root)
        self.catalog.scan()
        indexes = {model: self.catalog.get(model).index for model in self.bytes}
        self.stored = {model: index.file_size for model, index in indexes.items()}
        if isinstance(devices, int):
            devices = [CpuDevice(self.scale * memory, f"cpu:{number}") for number in range(devices)]
        self.devices = devices
        self.device = self.devices[0]
        self.metrics = Metrics()
        self.files = FaultyFileSystem()
        settings = {"reader_threads": 2, "huge_pages": False, "read_block_bytes": 4096, **config}
        self.store = Store(
            self.catalog,
            self.devices,
            StoreConfig(
                **{
                    "pool_bytes": ByteSize(chunks * self.chunk),
                    "chunk_bytes": ByteSize(self.chunk),
                    "piece_bytes": ByteSize(self.scale * PIECE),
                    **settings,
                },
            ),
            MonotonicClock(),
            self.metrics,
            files=self.files,
        )
        self.reports = []
        self.store.on_load = self.reports.append

    async def __aenter__(self):
        await self.store.start()
        return self

    async def __aexit__(self, *_):
        await self.store.close()
        assert [device.memory_used for device in self.devices] == [0] * len(self.devices)
        assert self.files.open_files == 0

    async def check(self, model: str, placement=None, reason="test") -> None:
        """Load `model`, compare every byte, take it off the device again."""
        lease = await self.store.acquire(ModelId(model), placement)
        delivered = delivered_by(lease)
        lease.release()
        self.store.evict(ModelId(model), self.TIER_DEVICE, reason, placement)
        assert delivered == self.bytes[ModelId(model)]

    def assert_quiet(self) -> None:
        """Nothing is in flight, nothing is leaked."""
        ledger = self.store._ledger
        assert ledger.in_flight == 0
        assert self.store._flights.loads == {}
        held = sum(slot.chunk >= 0 for row in ledger._rows.values() for slot in row.slots)
        assert held + ledger.free == ledger.chunks
        assert self.files.open_files == 0
        assert all(self.store.leases(model) == 0 for model in self.bytes)
        for device in self.devices:
            arena = self.store._tiers[device.name].arena
            rows = arena._rows.values()
            lent = self.store._tiers[device.name].lent
            for row in rows:
                used = [p for p, s in enumerate(row.states) if s is not PieceState.EMPTY]
                assert row.memory == sum(row.bytes_of(piece) for piece in used)
            assert device.memory_used == sum(row.memory for row in rows) + lent
            assert not any(PieceState.MAPPED in row.states for row in rows)
            placements = [p for _, p, _ in self.store._residents.all()]
            here = [part for p in placements for part in p if part.device == device.name]
            assert sum(row.holds for row in rows) == len(here)

    from sllm_node.core.types import Tier

    TIER_DEVICE = Tier.DEVICE
    TIER_DRAM = Tier.DRAM


def delivered_by(lease) -> bytes:
    """Return all bytes that the parts of a lease hold."""
    return b"".join(_bytes_of(part) for part in lease.parts)


def _bytes_of(part) -> bytes:
    flat = torch.as_tensor(part.buffer.array, device=torch_name(part.part.device))
    return bytes(flat.cpu().numpy())


def replace_file(path: Path, data: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    other.replace(path)
