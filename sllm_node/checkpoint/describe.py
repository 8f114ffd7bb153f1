"""What people ask about a checkpoint, as plain data."""

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import FLOAT_DTYPES


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
        "tensors": len(index.tensors),
        "tied": dict(index.aliases),
        "shards": len(index.shards),
        "chunk_bytes": index.chunk_bytes,
        "chunks": sum(len(shard.digests) for shard in index.shards),
        "codec": index.codec,
        "format_version": index.version,
        "created": datetime.fromtimestamp(index.created, UTC).isoformat(),
        "path": str(checkpoint.path),
    }
