"""Writes the shards of a layout in one pass, padding them and taking digests on the way."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sllm_node.checkpoint.index import (
    ENCODED_VERSION,
    INDEX_FILE,
    VERSION,
    Shard,
    TensorEntry,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.checkpoint.layout import Layout
from sllm_node.checkpoint.output import OutputFiles, write_all
from sllm_node.checkpoint.sinks import THREADS, EncodingSink, RawSink, Sink, chunk_codecs
from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.core.units import MIB

_ZEROS: Final = memoryview(bytes(MIB))


class ShardWriter:
    """Takes the tensors of a layout one after another: `begin` each, `write` its bytes, `finish`.

    Or all of a shard at once, padding included: `write_shard`. With any `codec` but raw, chunks are
    encoded where that pays.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        chunk_bytes: int,
        files: OutputFiles,
        codec: str = RAW,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._files = files
        self._threads = ThreadPoolExecutor(THREADS, "encode") if codec != RAW else None
        self._shards: list[Shard] = []
        self._descriptor: int | None = None
        self._sink: Sink | None = None
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
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
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
        assert self._position + len(data) <= self._end, "more bytes than the tensor has"
        self._append(data)

    def write_shard(self, pieces: Iterable[memoryview]) -> None:
        """Write the next shard from its bytes in order."""
        self._open_shard()
        for piece in pieces:
            self._append(piece)
        self._end = self._position
        self._end_shard()

    def finish(self) -> tuple[Shard, ...]:
        """End the last shard and return all of them."""
        assert self._position == self._end, "the last tensor is not whole"
        while len(self._shards) < len(self._layout.shard_sizes):
            self._end_shard()
        return tuple(self._shards)

    def _open_shard(self) -> None:
        if self._sink is None:
            number = len(self._shards)
            self._descriptor = self._files.create(self._folder / shard_name(number))
            self._sink = self._make_sink(self._descriptor, number)
            self._position = self._end = 0

    def _make_sink(self, descriptor: int, number: int) -> Sink:
        if self._threads is None:
            return RawSink(descriptor, self._files, self._chunk_bytes)
        entries = [entry for entry in self._layout.tensors if entry.shard == number]
        size = self._layout.shard_sizes[number]
        codecs = chunk_codecs(entries, size, self._chunk_bytes)
        return EncodingSink(descriptor, self._files, self._chunk_bytes, codecs, self._threads)

    def _end_shard(self) -> None:
        self._open_shard()
        assert self._descriptor is not None
        assert self._sink is not None
        number = len(self._shards)
        self._pad_to(self._layout.shard_sizes[number])
        self._shards.append(self._sink.finish(shard_name(number)))
        self._sink = None
        self._files.sync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        self._position = self._end = 0

    def _pad_to(self, offset: int) -> None:
        assert self._position <= offset
        while self._position < offset:
            self._append(_ZEROS[: offset - self._position])

    def _append(self, data: memoryview) -> None:
        assert self._sink is not None
        self._sink.append(data)
        self._position += len(data)


def with_shards(index: TensorIndex, shards: tuple[Shard, ...]) -> TensorIndex:
    """Return `index` with shards as they were written; version 1 if all of them are raw."""
    is_raw = all(codec == RAW for shard in shards for codec in shard.codecs)
    if is_raw:
        shards = tuple(replace(shard, codecs=(), stored=()) for shard in shards)
    version, codec = (VERSION, RAW) if is_raw else (ENCODED_VERSION, EXPONENT)
    return replace(index, version=version, codec=codec, shards=shards)


def write_index(folder: Path, index: TensorIndex, files: OutputFiles) -> None:
    """Write the tensor index, the last file of a checkpoint."""
    descriptor = files.create(folder / INDEX_FILE)
    try:
        write_all(files, descriptor, memoryview(to_json(index)))
        files.sync(descriptor)
    finally:
        os.close(descriptor)
