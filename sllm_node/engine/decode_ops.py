"""What a decode step is made of: the same few operations by our kernels, or by plain torch.

`KernelOps` is for GPUs; nothing in it allocates once a step of that many rows has run, so that it can be
captured. `ReferenceOps` is the oracle, and runs anywhere. Results go where the caller says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch.nn import functional

from sllm_node.engine import decode_kernels as launches
from sllm_node.engine import decode_reference as reference
from sllm_node.engine import gathered, segments
from sllm_node.engine import paged_attention as paged
from sllm_node.engine.decode_kernels import (
    Angles,
    GatedUnit,
    Heads,
    KvSlots,
    Matrix,
    RmsNorm,
)
from sllm_node.engine.flash import PieceOps
from sllm_node.engine.gathered import Gathered, GatherLayer
from sllm_node.engine.joined import joined_columns, joined_rows
from sllm_node.engine.kernel_tensors import HALVES, Kernels
from sllm_node.engine.paged_attention import AttendLayer, KvTables, Scoring, Splits
from sllm_node.engine.segments import JoinLayer, Look

OURS_MAX: Final = 8
"""Rows up to which our products are faster than torch's: on an H200 5 to 10 % at 1 to 8, slower at 16."""
Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (outputs, inner) and bias."""


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Where the weights of a layer lie, and how it attends."""

    attention_norm: RmsNorm
    qkv: tuple[Linear, Linear, Linear]
    head_norms: tuple[RmsNorm, RmsNorm] | None
    out: Linear
    unit_norm: RmsNorm
    unit: GatedUnit
    down: Linear
    heads: int
    kv_heads: int
    head_size: int
    scoring: Scoring


class DecodeOps(PieceOps, Protocol):
    """The operations; x is (rows, size), outputs are written in place."""

    @property
    def flash_multiprocessors(self) -> int | None:
        """How many multiprocessors torch's flash attention runs on; None: it can't."""

    def takes(self, layer: FusedLayer) -> bool:
        """Whether it can compute a layer of these shapes and dtype."""

    def linear(
        self,
        x: torch.Tensor,
        matrices: Sequence[Matrix],
        norm: RmsNorm | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Set each matrix' output to norm(x) W^T + bias, plus `residual`, which may be the output."""

    def gated_linear(
        self, x: torch.Tensor, unit: GatedUnit, output: torch.Tensor, norm: RmsNorm
    ) -> None:
        """Set `output` to act(norm(x) gate^T) * (norm(x) up^T)."""

    def rotate_and_keep(
        self,
        heads: Heads,
        angles: Angles,
        kept: KvSlots,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        """Rotate queries in place; put rotated keys, and values, into their slots."""

    def attend(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> None:
        """Set `output` to the attention of one token a session."""

    def prepared(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> AttendLayer:
        """Return what does so with keys and values of other layers that are like `cache`'s."""


class ReferenceOps:
    """Plain torch, rounding where transformers rounds."""

    flash_multiprocessors: int | None = None

    def takes(self, layer: FusedLayer) -> bool:
        """Whether it can: always."""
        return layer.heads % layer.kv_heads == 0

    def linear(
        self,
        x: torch.Tensor,
        matrices: Sequence[Matrix],
        norm: RmsNorm | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        normed = x if norm is None else reference.rms_norm(x, norm)
        for matrix in matrices:
            product = functional.linear(normed, matrix.weight, matrix.bias)
            matrix.output.copy_(product if residual is None else residual + product)

    def gated_linear(
        self, x: torch.Tensor, unit: GatedUnit, output: torch.Tensor, norm: RmsNorm
    ) -> None:
        normed = reference.rms_norm(x, norm)
        gate, up = functional.linear(normed, unit.gate), functional.linear(normed, unit.up)
        output.copy_(reference.gated(gate, up, gelu=unit.gelu))

    def rotate_and_keep(
        self,
        heads: Heads,
        angles: Angles,
        kept: KvSlots,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        query, key = heads.query, heads.key
        if norms is not None:
            query, key = (
                reference.rms_norm(x, n) for x, n in zip((query, key), norms, strict=True)
            )
        heads.query.copy_(reference.rotated(query, angles))
        rows = torch.nonzero(kept.slots >= 0)[:, 0]
        slots = kept.slots[rows].long()
        kept.keys[slots] = reference.rotated(key, angles)[rows]
        kept.values[slots] = heads.value[rows]

    def attend(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> None:
        self.prepared(query, cache, scoring, output)(cache.keys, cache.values)

    def prepared(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> AttendLayer:
        def attend_layer(keys: torch.Tensor, values: torch.Tensor) -> None:
            layer = replace(cache, keys=keys, values=values)
            output.copy_(reference.attention(query, layer, scoring))

        return attend_layer

    def gathering(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        rows: torch.Tensor,
    ) -> GatherLayer:
        def gather_layer(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Gathered:
            return keys[slots], values[slots], reference.grouped(query[rows], keys.shape[1])

        return gather_layer

    def joining(
        self, near: Look, far: Look, places: torch.Tensor, output: torch.Tensor
    ) -> JoinLayer:
        def join_layer(near: Look, far: Look, output: torch.Tensor) -> None:
            output.copy_(reference.joined(near, far, places))

        return join_layer


class KernelOps:
    """Our kernels; products of more than `OURS_MAX` rows are torch's, of few large matrices."""

    def __init__(self, kernels: Kernels, longest: int) -> None:
        self._kernels = kernels
        self._longest = longest
        """Tokens of the longest session that there may be."""
        self._splits: dict[tuple[int, int, int], Splits] = {}

    @property
    def flash_multiprocessors(self) -> int | None:
        """How many multiprocessors torch's flash attention runs on; None: this torch has none."""
        has_flash = torch.backends.cuda.is_flash_attention_available()
        return self._kernels.multiprocessors if has_flash else None

    def takes(self, layer: FusedLayer) -> bool:
        """Whether there are kernels for it."""
        gate = layer.unit.gate
        return (
            gate.dtype in HALVES
            and layer.head_size in paged.HEAD_SIZES
            and layer.heads % layer.kv_heads == 0
            and layer.heads // layer.kv_heads <= paged.GROUP_MAX
            and gate.shape[0] % 8 == 0
            and gate.shape[1] % 8 == 0
        )

    def linear(
        self,
        x: torch.Tensor,
        matrices: Sequence[Matrix],
        norm: RmsNorm | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        is_small = x.shape[0] <= OURS_MAX
        if norm is not None and not (is_small and x.dtype == torch.bfloat16):
            x, norm = self._normed(x, norm), None
        if is_small:
            launches.linear(self._kernels, x, matrices, norm, residual)
            return
        for matrix in _joined(matrices):
            _multiply(x, matrix, residual)

    def gated_linear(
        self, x: torch.Tensor, unit: GatedUnit, output: torch.Tensor, norm: RmsNorm
    ) -> None:
        if x.shape[0] <= OURS_MAX and x.dtype == torch.bfloat16:
            launches.gated_linear(self._kernels, x, unit, output, norm)
            return
        normed = self._normed(x, norm)
        if x.shape[0] <= OURS_MAX:
            launches.gated_linear(self._kernels, normed, unit, output)
            return
        both = joined_rows((unit.gate, unit.up))
        if both is not None:
            gate, up = functional.linear(normed, both).chunk(2, -1)
        else:
            gate, up = functional.linear(normed, unit.gate), functional.linear(normed, unit.up)
        launches.gated(self._kernels, gate, up, output, gelu=unit.gelu)

    def rotate_and_keep(
        self,
        heads: Heads,
        angles: Angles,
        kept: KvSlots,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        launches.rotate_and_keep(self._kernels, heads, angles, kept, norms)

    def attend(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> None:
        self.prepared(query, cache, scoring, output)(cache.keys, cache.values)

    def prepared(
        self, query: torch.Tensor, cache: KvTables, scoring: Scoring, output: torch.Tensor
    ) -> AttendLayer:
        splits = self._splits_of(query, cache)
        return paged.prepared(self._kernels, query, cache, scoring, splits, output)

    def gathering(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        rows: torch.Tensor,
    ) -> GatherLayer:
        return gathered.prepared(self._kernels, query, *cached, slots, rows)

    def joining(
        self, near: Look, far: Look, places: torch.Tensor, output: torch.Tensor
    ) -> JoinLayer:
        return segments.prepared(self._kernels, near, far, places, output)

    def _splits_of(self, query: torch.Tensor, cache: KvTables) -> Splits:
        """Return splits for that many sessions; one memory for all layers, as they run in turn."""
        (sessions, heads, size), kv_heads = query.shape, cache.keys.shape[1]
        known = (sessions, heads * size, kv_heads)
        if known not in self._splits:
            pairs = sessions * kv_heads
            count = paged.splits_for(pairs, self._longest, self._kernels.multiprocessors)
            self._splits[known] = paged.make_splits(count, query, kv_heads)
        return self._splits[known]

    def _normed(self, x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        output = torch.empty_like(x)
        launches.rms_norm(self._kernels, x, norm, output)
        return output


def _joined(matrices: Sequence[Matrix]) -> Sequence[Matrix]:
    """Return them as one matrix, if weights and outputs lie side by side."""
    if len(matrices) == 1 or any(matrix.bias is not None for matrix in matrices):
        return matrices
    weight = joined_rows([matrix.weight for matrix in matrices])
    output = joined_columns([matrix.output for matrix in matrices])
    return matrices if weight is None or output is None else [Matrix(weight, output)]


def _multiply(x: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None) -> None:
    """Set the output of a matrix by torch."""
    weight, added = matrix.weight.t(), matrix.bias
    if residual is not None and added is None:
        torch.addmm(residual, x, weight, out=matrix.output)
    elif added is None:
        torch.mm(x, weight, out=matrix.output)
    else:
        product = torch.addmm(added, x, weight)
        matrix.output.copy_(product if residual is None else product.add_(residual))
