"""Checkpoints of plain bytes, and file layers that fail, for the tests of this folder."""

import errno
import os

import numpy as np

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.index import VERSION, TensorIndex
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.output import (
    DiskFiles,
    SpaceNeeded,
    publish,
    write_errors_named,
)
from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.checkpoint.writer import ShardWriter, with_shards, write_index

SPECS = (
    TensorSpec("a", "U8", (5000,)),
    TensorSpec("b", "F32", (3, 100)),
    TensorSpec("nothing", "F32", (0, 7)),
    TensorSpec("c", "BF16", (4000,)),
    TensorSpec("d", "I64", ()),
)

WEIGHTS = (
    TensorSpec("a", "U8", (5000,)),
    TensorSpec("weight", "BF16", (300, 100)),
    TensorSpec("scales", "F32", (10,)),
    TensorSpec("weight.other", "BF16", (20_000,)),
)


def content(spec):
    """Return bytes that tell tensors from each other; those of weights can be encoded."""
    if spec.name.startswith("weight"):
        drawn = np.random.default_rng(len(spec.name)).standard_normal(spec.size // 2)
        return (drawn.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return bytes((len(spec.name) + ord(spec.name[0]) + i) % 251 for i in range(spec.size))


def write_raw(
    store,
    name="m",
    specs=SPECS,
    *,
    chunk_bytes=4096,
    shard_bytes=8192,
    files=None,
    replace=False,
    codec="raw",
):
    """Write a checkpoint as the conversion does, of made-up bytes."""
    files = files or DiskFiles()
    layout = plan_layout(specs, shard_bytes)
    space = SpaceNeeded()
    with write_errors_named(store, space, files), temporary_folder(store, name) as folder:
        space.require(layout.size, store, files)
        with ShardWriter(folder, layout, chunk_bytes, files, codec) as writer:
            for spec, entry in zip(specs, layout.tensors, strict=True):
                writer.begin(entry)
                writer.write(memoryview(content(spec)))
            shards = writer.finish()
        index = TensorIndex(
            version=VERSION,
            model=name,
            architecture="LlamaForCausalLM",
            dtype="BF16",
            context_tokens=512,
            chunk_bytes=chunk_bytes,
            created=1_700_000_000,
            shards=(),
            tensors=layout.tensors,
            aliases=(("tied", "a"),),
        )
        write_index(folder, with_shards(index, shards), files)
        publish(folder, store / name, files, replace=replace)
    return open_checkpoint(store / name)


class CountedFiles(DiskFiles):
    """Calls `at` with the number of each system call, before it is made."""

    def __init__(self, at):
        self.count = 0
        self._at = at

    def _next(self):
        self.count += 1
        self._at(self.count)

    def create(self, path):
        self._next()
        return super().create(path)

    def write(self, descriptor, data):
        self._next()
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self._next()
        super().sync(descriptor)

    def rename(self, source, destination):
        self._next()
        super().rename(source, destination)

    def exchange(self, one, other):
        self._next()
        super().exchange(one, other)


class ShortWrites(DiskFiles):
    """Takes at most `limit` bytes a call, as the system does beyond 2,147,479,552."""

    def __init__(self, limit):
        self.limit = limit

    def write(self, descriptor, data):
        return os.write(descriptor, data[: self.limit])


class FullDisk(DiskFiles):
    """Has room for `room` bytes, whatever it says beforehand."""

    def __init__(self, room, error=errno.ENOSPC, claimed=1 << 40):
        self.room = room
        self.error = error
        self.claimed = claimed

    def write(self, descriptor, data):
        if len(data) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        self.room -= len(data)
        return super().write(descriptor, data)

    def free_bytes(self, folder):
        return self.claimed
