"""What people ask about a checkpoint, as plain data."""

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import FLOAT_DTYPES, TensorIndex
from sllm_node.checkpoint.sinks import chunk_shares
from sllm_node.checkpoint.stored import all_chunks


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's properties; JSON can hold them."""
    index = checkpoint.index
    bytes_by_dtype: Counter[str] = Counter()
    for entry in index.tensors:
        bytes_by_dtype[entry.dtype] += entry.size
    return {
        "name": checkpoint.model,
        "architecture": index.architecture,
        "dtype": index.dtype,
        "parameters": sum(math.prod(e.shape) for e in index.tensors if e.dtype in FLOAT_DTYPES),
        "context_tokens": index.context_tokens,
        "bytes": index.size,
        "bytes_by_dtype": dict(bytes_by_dtype.most_common()),
        "bytes_on_disk": index.file_size,
        "ratio": round(index.file_size / index.size, 4),
        "ratio_by_dtype": _ratios(index),
        "tensors": len(index.tensors),
        "tied": dict(index.aliases),
        "shards": len(index.shards),
        "chunk_bytes": index.chunk_bytes,
        "chunks": sum(len(shard.digests) for shard in index.shards),
        "codec": index.codec,
        "codecs": dict(Counter(chunk.codec for chunk in all_chunks(checkpoint)).most_common()),
        "format_version": index.version,
        "created": datetime.fromtimestamp(index.created, UTC).isoformat(),
        "path": str(checkpoint.path),
    }


def _ratios(index: TensorIndex) -> dict[str, float]:
    """Return stored over decoded bytes of each dtype; a chunk of several counts for each by share."""
    decoded: Counter[str] = Counter()
    stored: dict[str, float] = {}
    ratios = [
        [chunk.size / chunk.decoded_size for chunk in index.file_chunks(number)]
        for number in range(len(index.shards))
    ]
    for entry in index.tensors:
        for number, size in chunk_shares(entry, index.chunk_bytes):
            decoded[entry.dtype] += size
            stored[entry.dtype] = stored.get(entry.dtype, 0) + size * ratios[entry.shard][number]
    return {dtype: round(stored[dtype] / size, 4) for dtype, size in decoded.most_common() if size}
