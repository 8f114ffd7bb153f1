"""The parts of a decode step as launches of our own kernels, on tensors of torch.

Everything goes to torch's current stream and may be captured in a graph: nothing is allocated, nothing
waits. A variant of a kernel is compiled and loaded when it is first asked for, so a step runs once before
it is captured. A product reads its first weights before the kernel before it has ended, so nothing may
write weights just before, on the same stream. Sums are in fp32 throughout, and a row's result does not
depend on the other rows, as long as the tuning is the same.

A layer of Llama's kind takes six launches: `linear` (norm, q, k, v), `rotate_and_keep`, attention
(`paged_attention.attend`), `linear` (o, residual), `gated_linear` (norm, gate, up), `linear` (down,
residual). Beyond `ROWS_MAX` rows the products are torch's, and `rms_norm` and `gated` stand beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from sllm_node.device.step_parameters import (
    GATE,
    MATRICES_MAX,
    NORM,
    PRODUCT,
    ROTATION,
    Variant,
)
from sllm_node.engine.kernel_tensors import (
    FLOATS,
    Kernels,
    aligned_address,
    check_heads,
    check_integers,
    check_vector,
    kind_of,
    need,
    rows_of,
    stream_of,
)

ROWS_MAX: Final = 16
"""Of one product; more are torch's."""
NORM_SIZE_MAX: Final = 16384
_HEAD_MAX: Final = 256
_TILE: Final = 8
_STEP: Final = 32
_ROPE_WARPS: Final = 4
_THREADS: Final = 256
_GATED_ELEMENTS: Final = 8 * _THREADS


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Weights of a norm; `offset` is added to them (1 for Gemma)."""

    weight: torch.Tensor  # (size,)
    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear layer, and where its result goes."""

    weight: torch.Tensor  # (outputs, inner)
    output: torch.Tensor  # (rows, outputs)
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class GatedUnit:
    """Weights of a gated unit without biases; its activation is silu, or gelu by tanh."""

    gate: torch.Tensor  # (outputs, inner)
    up: torch.Tensor  # (outputs, inner)
    gelu: bool = False


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a product is cut: `steps` of 32 elements that a warp loads ahead, 16 outputs `tiles` times."""

    warps: int = 8
    steps: int = 4
    tiles: int = 1
    blocks: int = 2
    """On a multiprocessor: bounds registers."""
    ahead: int = 0
    """Times `steps`, beyond two, that come into the L2 cache before the kernel before has ended."""


DEFAULT_TUNING: Final = Tuning()
NARROW_TUNING: Final = Tuning(steps=2, blocks=3)
"""For products whose tiles are too many for two thread blocks on each multiprocessor, not for three."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of a step's tokens; queries are rotated in place."""

    query: torch.Tensor  # (tokens, heads, size)
    key: torch.Tensor  # (tokens, kv heads, size)
    value: torch.Tensor  # (tokens, kv heads, size)


@dataclass(frozen=True, slots=True)
class Angles:
    """As transformers' rotary embeddings make them; `rotary` elements of each head are rotated."""

    cosines: torch.Tensor  # (tokens, rotary)
    sines: torch.Tensor  # (tokens, rotary)


@dataclass(frozen=True, slots=True)
class KvSlots:
    """A layer's cache, and the slots of a step's tokens; below 0 for one that is not kept."""

    keys: torch.Tensor  # (slots, kv heads, size)
    values: torch.Tensor  # (slots, kv heads, size)
    slots: torch.Tensor  # (tokens,) int32


# --- products ---------------------------------------------------------------------------------


def linear(
    kernels: Kernels,
    x: torch.Tensor,
    matrices: Sequence[Matrix],
    norm: RmsNorm | None = None,
    residual: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Set the outputs of up to three matrices to norm(x) W^T + bias; add `residual` to a single one's.

    `residual` may be the output. x is (rows, inner), up to `ROWS_MAX` rows. `tuning` None: by the shape
    of the matrices.

    Raises:
        KernelError: the tensors don't fit.
    """
    need("gemv", 1 <= len(matrices) <= MATRICES_MAX, f"{len(matrices)} matrices")
    need("gemv", residual is None or len(matrices) == 1, "a residual for several matrices")
    product = _product(x, matrices, norm, residual)
    heights = [matrix.weight.shape[0] for matrix in matrices]
    if tuning is None:
        tuning = tuning_for(_tiles(heights, 2 * _TILE), kernels.multiprocessors)
    tiles = _tiles(heights, 2 * _TILE * tuning.tiles)
    _launch_product(kernels, product, x, (tiles, norm is not None, False), tuning)


def gated_linear(
    kernels: Kernels,
    x: torch.Tensor,
    unit: GatedUnit,
    output: torch.Tensor,
    norm: RmsNorm | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Set `output` to act(norm(x) gate^T) * (norm(x) up^T); `tuning` None: by the shape of the unit.

    Raises:
        KernelError: the tensors don't fit.
    """
    gate, up = unit.gate, unit.up
    need("gemv", gate.shape == up.shape, f"gate {tuple(gate.shape)} beside up {tuple(up.shape)}")
    product = _product(x, [Matrix(gate, output), Matrix(up, output)], norm, None)
    product["is_gelu"] = unit.gelu
    if tuning is None:
        tuning = tuning_for(_tiles(gate.shape[:1], _TILE), kernels.multiprocessors)
    tiles = _tiles(gate.shape[:1], _TILE * tuning.tiles)
    _launch_product(kernels, product, x, (tiles, norm is not None, True), tuning)


def tuning_for(tiles: int, multiprocessors: int) -> Tuning:
    """Return how to cut a product of so many tiles of 16 rows of weights, whatever the rows of x."""
    if 2 * multiprocessors < tiles <= 3 * multiprocessors:  # all of them at once
        return NARROW_TUNING
    return DEFAULT_TUNING


def _tiles(heights: Sequence[int], height: int) -> int:
    return sum(-(-one // height) for one in heights)


def _product(
    x: torch.Tensor, matrices: Sequence[Matrix], norm: RmsNorm | None, residual: torch.Tensor | None
) -> npt.NDArray[np.void]:
    name = "gemv"
    rows, inner = rows_of(name, "x", x)
    need(name, 1 <= rows <= ROWS_MAX, f"{rows} rows of x, of 1 to {ROWS_MAX}")
    need(name, inner % 8 == 0, f"an inner dimension of {inner}, which is no multiple of 8")
    product = np.zeros(1, PRODUCT)
    product["x"], product["x_stride"] = aligned_address(name, "x", x), x.stride(0)
    product["rows"], product["inner"] = rows, inner
    for number, matrix in enumerate(matrices):
        product["matrix"][0, number] = _matrix(x, matrix)
    if norm is not None:
        need(name, x.dtype == torch.bfloat16, f"a norm within a product of {x.dtype}")
        check_vector(name, "norm", norm.weight, x, inner)
        product["norm"] = aligned_address(name, "norm", norm.weight)
        product["epsilon"], product["norm_offset"] = norm.epsilon, norm.offset
    if residual is not None:
        shape = rows_of(name, "residual", residual, x)
        outputs = matrices[0].weight.shape[0]
        need(name, shape == (rows, outputs), f"a residual {shape} of {(rows, outputs)}")
        product["residual"] = residual.data_ptr()
        product["residual_stride"] = residual.stride(0)
    return product


def _matrix(x: torch.Tensor, matrix: Matrix) -> tuple[int, int, int, int, int]:
    """Return a `MATRIX`."""
    name, weight = "gemv", matrix.weight
    outputs, inner = rows_of(name, "weight", weight, x)
    need(name, inner == x.shape[1], f"weights {tuple(weight.shape)} for x {tuple(x.shape)}")
    need(name, weight.is_contiguous(), "weights that are not contiguous")
    shape = rows_of(name, "output", matrix.output, x)
    need(name, shape == (x.shape[0], outputs), f"an output {shape} of {(x.shape[0], outputs)}")
    bias = 0
    if matrix.bias is not None:
        check_vector(name, "bias", matrix.bias, x, outputs)
        bias = matrix.bias.data_ptr()
    address = aligned_address(name, "weight", weight)
    return address, bias, matrix.output.data_ptr(), outputs, matrix.output.stride(0)


def _launch_product(
    kernels: Kernels,
    product: npt.NDArray[np.void],
    x: torch.Tensor,
    what: tuple[int, bool, bool],
    tuning: Tuning,
) -> None:
    tiles, is_normed, is_gated = what
    product["tiles"] = tiles
    variant = Variant(
        "gemv",
        (
            ("WARPS", tuning.warps), ("STEPS", tuning.steps), ("TILES_M", tuning.tiles),
            ("BLOCKS", tuning.blocks), ("AHEAD", tuning.ahead), ("TILES_N", -(-x.shape[0] // _TILE)),
            ("NORM", int(is_normed)), ("GATED", int(is_gated)), kind_of(x),
        ),
    )  # fmt: skip
    threads = _STEP * tuning.warps
    blocks = min(tiles, kernels.multiprocessors * kernels.blocks(variant, threads))
    kernels.launch(variant, (blocks, 1, 1), threads, product, stream_of(x))


# --- what stands around products --------------------------------------------------------------


def rotate_and_keep(
    kernels: Kernels,
    heads: Heads,
    angles: Angles,
    kept: KvSlots,
    norms: tuple[RmsNorm, RmsNorm] | None = None,
) -> None:
    """Rotate queries in place; put rotated keys, and values, into their slots; `norms`: of q and k heads.

    Raises:
        KernelError: the tensors don't fit.
    """
    name, query = "rope_kv", heads.query
    tokens, count, size = query.shape
    kv_heads = heads.key.shape[1]
    need(name, size <= _HEAD_MAX, f"heads of {size} elements, of up to {_HEAD_MAX}")
    rotation = np.zeros(1, ROTATION)
    for label in ("query", "key", "value"):
        tensor = getattr(heads, label)
        shape = (tokens, count if label == "query" else kv_heads, size)
        check_heads(name, label, tensor, query, shape)
        rotation[label], rotation[f"{label}_stride"] = tensor.data_ptr(), tensor.stride(0)
    for label, cached in (("keys", kept.keys), ("values", kept.values)):
        check_heads(name, label, cached, query, (cached.shape[0], kv_heads, size))
        need(name, cached.is_contiguous(), f"{label} that are not contiguous")
        rotation[label] = cached.data_ptr()
    check_integers(name, "slots", kept.slots, query, (tokens,))
    rotation["slots"] = kept.slots.data_ptr()
    rotation["heads"], rotation["kv_heads"], rotation["size"] = count, kv_heads, size
    _put_angles(rotation, angles, query)
    if norms is not None:
        for label, norm in zip(("query_norm", "key_norm"), norms, strict=True):
            check_vector(name, label, norm.weight, query, size)
            rotation[label] = norm.weight.data_ptr()
            rotation["epsilon"], rotation["norm_offset"] = norm.epsilon, norm.offset
        same = (norms[0].epsilon, norms[0].offset) == (norms[1].epsilon, norms[1].offset)
        need(name, same, "norms of queries and keys that differ in epsilon or offset")
    grid = (-(-(count + 2 * kv_heads) // _ROPE_WARPS), tokens, 1)
    variant = Variant(name, (kind_of(query),))
    kernels.launch(variant, grid, _STEP * _ROPE_WARPS, rotation, stream_of(query))


def _put_angles(rotation: npt.NDArray[np.void], angles: Angles, query: torch.Tensor) -> None:
    name, (tokens, _, size) = "rope_kv", query.shape
    rotary = angles.cosines.shape[-1]
    for label, tensor in (("cosines", angles.cosines), ("sines", angles.sines)):
        shape = rows_of(name, label, tensor, query, dtypes=FLOATS)
        need(name, shape == (tokens, rotary), f"{label} {shape} of {(tokens, rotary)}")
        rotation[label] = tensor.data_ptr()
    kind = angles.cosines.dtype
    need(name, rotary % 2 == 0 and rotary <= size, f"{rotary} of {size} elements rotated")
    need(name, angles.sines.dtype == kind, f"cosines of {kind}, sines of {angles.sines.dtype}")
    need(name, kind in (query.dtype, torch.float32), f"angles of {kind} for {query.dtype}")
    same = angles.cosines.stride(0) == angles.sines.stride(0)
    need(name, same, "cosines and sines of different strides")
    rotation["rotary"], rotation["angle_stride"] = rotary, angles.cosines.stride(0)
    rotation["angles_are_f32"] = kind == torch.float32


def rms_norm(
    kernels: Kernels,
    x: torch.Tensor,
    norm: RmsNorm,
    output: torch.Tensor,
    delta: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Set `total` (which may be x) to x + delta and `output` to its norm; (rows, size) each.

    Raises:
        KernelError: the tensors don't fit.
    """
    name = "rms_norm"
    shape = rows_of(name, "x", x)
    need(name, shape[1] <= NORM_SIZE_MAX, f"rows of {shape[1]}, of up to {NORM_SIZE_MAX}")
    record = np.zeros(1, NORM)
    given = {"x": x, "delta": delta, "sum": total, "output": output}
    _put_rows(name, record, given, x)
    check_vector(name, "norm", norm.weight, x, shape[1])
    record["norm"] = aligned_address(name, "norm", norm.weight)
    record["epsilon"], record["norm_offset"] = norm.epsilon, norm.offset
    kernels.launch(Variant(name, (kind_of(x),)), (shape[0], 1, 1), _THREADS, record, stream_of(x))


def gated(
    kernels: Kernels,
    gate: torch.Tensor,
    up: torch.Tensor,
    output: torch.Tensor,
    *,
    gelu: bool = False,
) -> None:
    """Set `output` to act(gate) * up; (rows, size) each; act is silu, or gelu by tanh.

    Raises:
        KernelError: the tensors don't fit.
    """
    name = "gated"
    rows, size = rows_of(name, "gate", gate)
    record = np.zeros(1, GATE)
    _put_rows(name, record, {"gate": gate, "up": up, "output": output}, gate)
    record["is_gelu"] = gelu
    grid = (-(-size // _GATED_ELEMENTS), rows, 1)
    kernels.launch(Variant(name, (kind_of(gate),)), grid, _THREADS, record, stream_of(gate))


def _put_rows(
    name: str,
    record: npt.NDArray[np.void],
    given: dict[str, torch.Tensor | None],
    like: torch.Tensor,
) -> None:
    """Put addresses, strides and the size of tensors of one shape."""
    size = like.shape[1]
    need(name, size % 8 == 0, f"rows of {size}, which is no multiple of 8")
    record["size"] = size
    for label, tensor in given.items():
        if tensor is None:
            continue
        shape = rows_of(name, label, tensor, like)
        need(name, shape == tuple(like.shape), f"{label} {shape} of {tuple(like.shape)}")
        record[label] = aligned_address(name, label, tensor)
        record[f"{label}_stride"] = tensor.stride(0)
