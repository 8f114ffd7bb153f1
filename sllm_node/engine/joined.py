"""Matrices that lie side by side in memory, as one: one large product is faster than several small ones.

A checkpoint's tensors lie in the order of the forward pass, so a layer's q, k and v often do, and so do
gate and up. Nothing is copied; where they lie otherwise, they stay as many as they are.
"""

from collections.abc import Sequence

import torch


def joined_rows(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return matrices of which each begins where the one before ends as one; None: they do not."""
    first = matrices[0]
    ends = first.data_ptr()
    for matrix in matrices:
        if not matrix.is_contiguous() or matrix.data_ptr() != ends or not _alike(matrix, first, 1):
            return None
        ends += matrix.nbytes
    rows = sum(len(matrix) for matrix in matrices)
    return first.as_strided((rows, first.shape[1]), first.stride())


def joined_columns(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return parts of the columns of one matrix that follow each other as one; None: they are not."""
    first = parts[0]
    ends = first.data_ptr()
    for part in parts:
        is_beside = part.data_ptr() == ends and part.stride() == first.stride()
        if not is_beside or part.stride(1) != 1 or not _alike(part, first, 0):
            return None
        ends += part.shape[1] * part.itemsize
    columns = sum(part.shape[1] for part in parts)
    return (
        first.as_strided((len(first), columns), first.stride())
        if columns <= first.stride(0)
        else None
    )


def _alike(one: torch.Tensor, other: torch.Tensor, dimension: int) -> bool:
    """Whether they share memory, dtype and a size."""
    same_memory = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return (
        same_memory and one.dtype == other.dtype and one.shape[dimension] == other.shape[dimension]
    )
