"""Where the bytes of one shard go while it is written: to the file as they are, or encoded.

Encoding runs in threads, several chunks at once; chunks are written in their order. At most as many
wait as there are threads, and one more, so memory is bounded.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

import numpy as np

from sllm_node.checkpoint.digest import ChunkDigests, chunk_digest
from sllm_node.checkpoint.index import Shard, TensorEntry
from sllm_node.checkpoint.output import OutputFiles, write_all
from sllm_node.codec.chunks import codec_for, encode_chunk
from sllm_node.codec.names import RAW
from sllm_node.core.units import MIB, PAGE, align_up

THREADS: Final = min(16, len(os.sched_getaffinity(0)))
"""That encode; numpy lets them run at once."""
RAW_CHUNK_BYTES: Final = 16 * MIB
ENCODED_CHUNK_BYTES: Final = MIB
"""Small enough that whole encoded chunks, of uneven sizes, fill a chunk of the pool to 97 %."""


def chunk_bytes_or_default(chunk_bytes: int | None, codec: str) -> int:
    """Return what a digest covers, in decoded bytes; None: what suits `codec`."""
    if chunk_bytes is not None:
        return chunk_bytes
    return RAW_CHUNK_BYTES if codec == RAW else ENCODED_CHUNK_BYTES


def chunk_shares(entry: TensorEntry, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (number in the shard, bytes of the tensor in it) of each chunk that a tensor lies in."""
    start, end = entry.offset, entry.offset + entry.size
    for number in range(start // chunk_bytes, -(-end // chunk_bytes)):
        low, high = number * chunk_bytes, (number + 1) * chunk_bytes
        yield number, min(end, high) - max(start, low)


def chunk_codecs(
    entries: Sequence[TensorEntry], shard_size: int, chunk_bytes: int
) -> tuple[str, ...]:
    """Return the codec to try on each chunk of a shard that holds `entries`."""
    held: list[Counter[str]] = [Counter() for _ in range(0, shard_size, chunk_bytes)]
    for entry in entries:
        for number, size in chunk_shares(entry, chunk_bytes):
            held[number][entry.dtype] += size
    return tuple(codec_for(bytes_by_dtype) for bytes_by_dtype in held)


class Sink(Protocol):
    """Takes the bytes of one shard in order."""

    def append(self, data: memoryview) -> None:
        """Take the next bytes, of format 'B'; `data` may change afterwards."""

    def finish(self, name: str) -> Shard:
        """Return what the index says of the shard."""


class RawSink:
    """Writes the bytes as they are."""

    def __init__(self, descriptor: int, files: OutputFiles, chunk_bytes: int) -> None:
        self._descriptor = descriptor
        self._files = files
        self._digests = ChunkDigests(chunk_bytes)
        self._size = 0

    def append(self, data: memoryview) -> None:
        write_all(self._files, self._descriptor, data)
        self._digests.update(data)
        self._size += len(data)

    def finish(self, name: str) -> Shard:
        return Shard(name, self._size, self._digests.finish())


class EncodingSink:
    """Cuts the bytes into chunks and writes each encoded by its codec, or raw if that is as good."""

    def __init__(
        self,
        descriptor: int,
        files: OutputFiles,
        chunk_bytes: int,
        codecs: Sequence[str],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._descriptor = descriptor
        self._files = files
        self._chunk_bytes = chunk_bytes
        self._codecs = codecs
        self._threads = threads
        self._buffer = bytearray()
        self._waiting: deque[Future[tuple[str, memoryview, int]]] = deque()
        self._given = 0
        self._size = 0
        self._written: list[tuple[str, int, int]] = []

    def append(self, data: memoryview) -> None:
        while data:
            piece = data[: self._chunk_bytes - len(self._buffer)]
            self._buffer += piece
            self._size += len(piece)
            data = data[len(piece) :]
            if len(self._buffer) == self._chunk_bytes:
                self._give()

    def finish(self, name: str) -> Shard:
        if self._buffer:
            self._give()
        while self._waiting:
            self._write()
        codecs, sizes, digests = zip(*self._written, strict=True)
        return Shard(name, self._size, digests, codecs, sizes)

    def _give(self) -> None:
        codec = self._codecs[self._given]
        self._waiting.append(self._threads.submit(_encoded, codec, self._buffer))
        self._given += 1
        self._buffer = bytearray()
        if len(self._waiting) > THREADS:
            self._write()

    def _write(self) -> None:
        codec, stored, digest = self._waiting.popleft().result()
        write_all(self._files, self._descriptor, stored)
        self._written.append((codec, len(stored), digest))


def _encoded(codec: str, data: bytearray) -> tuple[str, memoryview, int]:
    """Return a chunk as it is stored, padded to whole pages. Runs in any thread."""
    given, encoded = encode_chunk(codec, memoryview(data))
    padded = np.zeros(align_up(len(encoded), PAGE), np.uint8)
    padded[: len(encoded)] = encoded
    if given != RAW and len(padded) >= len(data):
        given, padded = RAW, np.frombuffer(data, np.uint8)
    return given, padded.data, chunk_digest(padded.data)
