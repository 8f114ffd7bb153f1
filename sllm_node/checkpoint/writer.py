"""Writes the shards of a layout in one pass, padding them and taking digests on the way."""

import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sllm_node.checkpoint.digest import ChunkDigests
from sllm_node.checkpoint.index import (
    INDEX_FILE,
    Shard,
    TensorEntry,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.checkpoint.layout import Layout
from sllm_node.checkpoint.output import OutputFiles, write_all
from sllm_node.core.units import MIB

_ZEROS: Final = memoryview(bytes(MIB))


class ShardWriter:
    """Takes the tensors of a layout one after another: `begin` each, `write` its bytes, `finish`."""

    def __init__(self, folder: Path, layout: Layout, chunk_bytes: int, files: OutputFiles) -> None:
        self._folder = folder
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._files = files
        self._shards: list[Shard] = []
        self._descriptor: int | None = None
        self._digests = ChunkDigests(chunk_bytes)
        self._position = 0
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def begin(self, entry: TensorEntry) -> None:
        """Go to the place of `entry`, the next tensor of the layout."""
        assert self._position == self._end, "the tensor before is not whole"
        while len(self._shards) < entry.shard:
            self._end_shard()
        self._open_shard()
        self._pad_to(entry.offset)
        self._end = entry.offset + entry.size

    def write(self, data: memoryview) -> None:
        """Append bytes of the current tensor; `data` has format 'B'."""
        assert self._descriptor is not None
        assert self._position + len(data) <= self._end, "more bytes than the tensor has"
        self._append(data)

    def finish(self) -> tuple[Shard, ...]:
        """End the last shard and return all of them."""
        assert self._position == self._end, "the last tensor is not whole"
        while len(self._shards) < len(self._layout.shard_sizes):
            self._end_shard()
        return tuple(self._shards)

    def _open_shard(self) -> None:
        if self._descriptor is None:
            path = self._folder / shard_name(len(self._shards))
            self._descriptor = self._files.create(path)
            self._digests = ChunkDigests(self._chunk_bytes)
            self._position = self._end = 0

    def _end_shard(self) -> None:
        self._open_shard()
        assert self._descriptor is not None
        number = len(self._shards)
        size = self._layout.shard_sizes[number]
        self._pad_to(size)
        self._files.sync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        self._shards.append(Shard(shard_name(number), size, self._digests.finish()))
        self._position = self._end = 0

    def _pad_to(self, offset: int) -> None:
        assert self._position <= offset
        while self._position < offset:
            self._append(_ZEROS[: offset - self._position])

    def _append(self, data: memoryview) -> None:
        assert self._descriptor is not None
        write_all(self._files, self._descriptor, data)
        self._digests.update(data)
        self._position += len(data)


def write_index(folder: Path, index: TensorIndex, files: OutputFiles) -> None:
    """Write the tensor index, the last file of a checkpoint."""
    descriptor = files.create(folder / INDEX_FILE)
    try:
        write_all(files, descriptor, memoryview(to_json(index)))
        files.sync(descriptor)
    finally:
        os.close(descriptor)
