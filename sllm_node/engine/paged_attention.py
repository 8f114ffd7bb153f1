"""Attention of decode steps over the paged KV cache, by our own kernel.

The kernel reads lengths, tables and the keys and values of older tokens before the kernel before it has
ended: none of our kernels of the same step may write those. The new token's are another matter.

A session's keys and values are cut into splits, so that few sessions with long contexts fill a GPU too.
The number of splits is fixed when a launch is made (or captured); lengths are read when it runs. A
session's result depends on its length and on the number of splits, not on other sessions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from sllm_node.device.step_parameters import ATTENTION, Variant
from sllm_node.engine.kernel_tensors import (
    ALIGNMENT,
    Kernels,
    aligned_address,
    check_heads,
    check_integers,
    kind_of,
    need,
    stream_of,
)

HEAD_SIZES: Final = (64, 80, 96, 128, 256)
GROUP_MAX: Final = 16
"""Query heads that share keys and values."""
SPLITS_MAX: Final = 128
_NAME: Final = "paged_attention"
_THREADS: Final = 128
_SPLIT_TOKENS: Final = 64
"""A split has at least so many tokens: a tile of 16 for each of 4 warps."""
_BLOCKS_WANTED: Final = 2
"""Thread blocks on a multiprocessor that keep enough bytes on their way."""
_GOOD_ENOUGH: Final = 0.95


@dataclass(frozen=True, slots=True)
class KvTables:
    """A layer's cache, and where each session's tokens lie in it."""

    keys: torch.Tensor  # (slots, kv heads, size)
    values: torch.Tensor  # (slots, kv heads, size)
    tables: torch.Tensor  # (sessions, blocks) int32
    lengths: torch.Tensor  # (sessions,) int32, with the new token; 0: not there
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """How queries and keys become weights."""

    scaling: float
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None: all before it."""
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Splits:
    """How many parts a session is cut into, and memory for their sums; one serves all layers."""

    count: int
    sums: torch.Tensor
    scales: torch.Tensor
    arrived: torch.Tensor


AttendLayer = Callable[[torch.Tensor, torch.Tensor], None]
"""Attends to one layer's keys and values; everything else is the same in all layers."""


def splits_for(pairs: int, tokens: int, multiprocessors: int) -> int:
    """Return a number of splits: the fewest that keep all multiprocessors busy, and alike.

    `pairs`: sessions times kv heads; `tokens`: of the longest session.
    """
    most = max(1, min(SPLITS_MAX, tokens // _SPLIT_TOKENS))
    shares = {count: _busy(pairs * count, multiprocessors) for count in range(1, most + 1)}
    best = max(shares.values())
    return next(count for count, share in shares.items() if share >= _GOOD_ENOUGH * best)


def _busy(blocks: int, multiprocessors: int) -> float:
    most = max(_BLOCKS_WANTED, -(-blocks // multiprocessors))
    return blocks / (most * multiprocessors)


def make_splits(count: int, query: torch.Tensor, kv_heads: int) -> Splits:
    """Return splits for queries like `query`, (sessions, heads, size)."""
    sessions, heads, size = query.shape
    needed = sessions * heads * count if count > 1 else 1
    device = query.device
    return Splits(
        count,
        torch.empty(needed * size, dtype=torch.float32, device=device),
        torch.empty(needed * 2, dtype=torch.float32, device=device),
        torch.zeros(sessions * kv_heads, dtype=torch.int32, device=device),
    )


def attend(
    kernels: Kernels,
    query: torch.Tensor,
    cache: KvTables,
    scoring: Scoring,
    splits: Splits,
    output: torch.Tensor,
) -> None:
    """Set `output` to the attention of one token a session; (sessions, heads, size) like `query`.

    Raises:
        KernelError: the tensors don't fit.
    """
    prepared(kernels, query, cache, scoring, splits, output)(cache.keys, cache.values)


def prepared(
    kernels: Kernels,
    query: torch.Tensor,
    cache: KvTables,
    scoring: Scoring,
    splits: Splits,
    output: torch.Tensor,
) -> AttendLayer:
    """Return what sets `output` for the keys and values of any layer like `cache`'s, on this stream.

    Raises:
        KernelError: the tensors don't fit.
    """
    sessions, heads, size = query.shape
    kv_heads = cache.keys.shape[1]
    variant = _variant(query, kv_heads)
    record = np.zeros(1, ATTENTION)
    for label, tensor in (("query", query), ("output", output)):
        check_heads(_NAME, label, tensor, query, (sessions, heads, size))
        record[label] = aligned_address(_NAME, label, tensor)
        record[f"{label}_stride"] = tensor.stride(0)
    _check_cache(query, cache.keys, cache.values)
    check_integers(_NAME, "tables", cache.tables, query, (sessions, cache.tables.shape[1]))
    check_integers(_NAME, "lengths", cache.lengths, query, (sessions,))
    record["tables"], record["table_stride"] = cache.tables.data_ptr(), cache.tables.stride(0)
    record["lengths"], record["block_tokens"] = cache.lengths.data_ptr(), cache.block_tokens
    _put_splits(record, splits, query, kv_heads)
    need(_NAME, cache.block_tokens >= 1, f"blocks of {cache.block_tokens} tokens")
    need(_NAME, scoring.window is None or scoring.window >= 1, f"a window of {scoring.window}")
    record["kv_heads"], record["group"] = kv_heads, heads // kv_heads
    record["window"], record["softcap"] = scoring.window or 0, scoring.softcap or 0
    record["scale"] = scoring.scaling
    grid = (kv_heads, splits.count, sessions)
    launch = kernels.prepared(variant, grid, _THREADS, record, stream_of(query))
    addresses, shape = (record["keys"], record["values"]), cache.keys.shape

    def attend_layer(keys: torch.Tensor, values: torch.Tensor) -> None:
        if not (_is_like(keys, query, shape) and _is_like(values, query, shape)):
            _check_cache(query, keys, values)
            need(_NAME, keys.shape == shape, f"keys {tuple(keys.shape)} of {tuple(shape)}")
        addresses[0][0], addresses[1][0] = keys.data_ptr(), values.data_ptr()
        launch()

    return attend_layer


def _is_like(tensor: torch.Tensor, query: torch.Tensor, shape: torch.Size) -> bool:
    """Whether it is a layer's keys or values as `_check_cache` wants them, without saying why not."""
    return (
        tensor.shape == shape
        and tensor.dtype == query.dtype
        and tensor.device == query.device
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNMENT == 0
    )


def _check_cache(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    slots, kv_heads, _ = keys.shape
    for label, tensor in (("keys", keys), ("values", values)):
        check_heads(_NAME, label, tensor, query, (slots, kv_heads, query.shape[2]))
        need(_NAME, tensor.is_contiguous(), f"{label} that are not contiguous")
        aligned_address(_NAME, label, tensor)


def _variant(query: torch.Tensor, kv_heads: int) -> Variant:
    _, heads, size = query.shape
    need(_NAME, size in HEAD_SIZES, f"heads of {size} elements, of {HEAD_SIZES}")
    need(_NAME, heads % kv_heads == 0, f"{heads} heads for {kv_heads} of keys")
    group = heads // kv_heads
    need(_NAME, group <= GROUP_MAX, f"{group} heads that share keys, of up to {GROUP_MAX}")
    return Variant(_NAME, (("HEAD", size), ("GROUPS_OF_8", -(-group // 8)), kind_of(query)))


def _put_splits(
    record: np.ndarray[tuple[int], np.dtype[np.void]],
    splits: Splits,
    query: torch.Tensor,
    kv_heads: int,
) -> None:
    sessions, heads, size = query.shape
    needed = sessions * heads * splits.count if splits.count > 1 else 0
    need(_NAME, 1 <= splits.count <= SPLITS_MAX, f"{splits.count} splits")
    for label, tensor, least in (
        ("sums", splits.sums, needed * size),
        ("scales", splits.scales, needed * 2),
        ("arrived", splits.arrived, sessions * kv_heads),
    ):
        need(_NAME, tensor.numel() >= least, f"{label} for fewer sessions or splits")
        need(_NAME, tensor.is_contiguous(), f"{label} that are not contiguous")
        need(_NAME, tensor.device == query.device, f"{label} on {tensor.device}")
        record[label] = tensor.data_ptr()
