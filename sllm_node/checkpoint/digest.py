"""The digest of a chunk: xxh3_64, as fast as memory, against damage and not against malice."""

from array import array

import xxhash

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.types import Weights


def chunk_digest(data: bytes | bytearray | memoryview) -> int:
    """Return the digest of one chunk, an unsigned 64-bit number."""
    return int(xxhash.xxh3_64_intdigest(data))


def weights_of(index: TensorIndex) -> Weights:
    """Return what tells the weights of a checkpoint from others under its name."""
    hasher = xxhash.xxh3_64()
    for shard in index.shards:
        hasher.update(array("Q", shard.digests).tobytes())
    return Weights(index.created, index.file_size, hasher.hexdigest())


class ChunkDigests:
    """Digests of the consecutive chunks of a stream of bytes."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._hasher = xxhash.xxh3_64()
        self._filled = 0
        self._finished: list[int] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes; `data` has format 'B'."""
        while data:
            piece = data[: self._chunk_bytes - self._filled]
            self._hasher.update(piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == self._chunk_bytes:
                self._end_chunk()

    def finish(self) -> tuple[int, ...]:
        """Return the digests of all chunks; the last one may be shorter."""
        if self._filled:
            self._end_chunk()
        return tuple(self._finished)

    def _end_chunk(self) -> None:
        self._finished.append(self._hasher.intdigest())
        self._hasher.reset()
        self._filled = 0
