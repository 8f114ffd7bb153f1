"""Which file chunks of a checkpoint lie together in a chunk of the pinned pool. Pure."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.errors import CheckpointFormatError


def grouped(places: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield runs [first, last) of chunks of at most `size` bytes, each as long as can be."""
    first = 0
    while first < len(places) - 1:
        last = max(bisect_right(places, places[first] + size) - 1, first + 1)
        yield first, last
        first = last


def check_chunks(index: TensorIndex, chunk_bytes: int) -> None:
    """Refuse a checkpoint whose file chunks do not fit into pool chunks of `chunk_bytes`.

    Raises:
        CheckpointFormatError: raw ones do not fill one evenly, or an encoded one is larger.
    """
    if index.is_encoded:
        largest = max(size for shard in index.shards for size in shard.stored)
        if largest > chunk_bytes:
            raise CheckpointFormatError(
                index.model,
                f"has chunks of up to {largest} bytes, more than store.chunk_bytes = "
                f"{chunk_bytes}; recode it with a smaller --chunk-size or change the config",
            )
        return
    if chunk_bytes % index.chunk_bytes:
        raise CheckpointFormatError(
            index.model,
            f"its chunks are {index.chunk_bytes} bytes, of which store.chunk_bytes = {chunk_bytes} "
            f"is no multiple; convert it with --chunk-size {chunk_bytes} or change the config",
        )
