"""What the kernels of decode steps are told: the structures of their sources, as numpy has them."""

from dataclasses import dataclass
from typing import Final

import numpy as np


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel and the macros it is compiled with."""

    name: str
    defines: tuple[tuple[str, int], ...] = ()


def _structure(pointers: str, numbers: str, floats: str = "") -> np.dtype[np.void]:
    """Return addresses, then numbers of 32 bits, laid out as in C."""
    fields = [(name, "<u8") for name in pointers.split()]
    fields += [(name, "<u4") for name in numbers.split()]
    fields += [(name, "<f4") for name in floats.split()]
    return np.dtype(fields, align=True)


MATRIX: Final = _structure("weight bias output", "rows output_stride")
MATRICES_MAX: Final = 3
PRODUCT: Final = np.dtype(
    [
        *((name, "<u8") for name in ("x", "norm", "residual")),
        ("matrix", MATRIX, (MATRICES_MAX,)),
        *(
            (name, "<u4")
            for name in ("rows", "inner", "x_stride", "residual_stride", "tiles", "is_gelu")
        ),
        ("epsilon", "<f4"),
        ("norm_offset", "<f4"),
    ],
    align=True,
)
ATTENTION: Final = _structure(
    "query keys values tables lengths output sums scales arrived",
    "kv_heads group block_tokens table_stride window query_stride output_stride",
    "scale softcap",
)
ROTATION: Final = _structure(
    "query key value query_norm key_norm cosines sines slots keys values",
    "heads kv_heads size rotary query_stride key_stride value_stride angle_stride angles_are_f32",
    "epsilon norm_offset",
)
NORM: Final = _structure(
    "x delta norm sum output",
    "size x_stride delta_stride sum_stride output_stride",
    "epsilon norm_offset",
)
GATE: Final = _structure("gate up output", "size gate_stride up_stride output_stride is_gelu")
JOIN: Final = _structure(
    "near_part far_parts near_logs far_logs places output",
    "heads size tokens near_stride output_stride near_logs_stride far_logs_stride group",
)
GATHER: Final = _structure(
    "keys values query slots rows key value queries",
    "tokens width query_rows query_width query_stride size group",
)
