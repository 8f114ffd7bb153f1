"""Tensor bytes on their way from a source to a shard: dtypes, casts, slices."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from sllm_node.checkpoint.index import FLOAT_DTYPES
from sllm_node.convert.safetensors import SLICE_BYTES
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES

STORED_DTYPES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
COMPUTE_DTYPES: Final = frozenset({"F16", "BF16", "F32", "F64"})
"""What a forward pass can run in."""

_CAST_TARGETS: Final = FLOAT_DTYPES - {"F8_E8M0"}
"""Every float dtype but the one for scales, which has no sign."""


class SourceTensor(Protocol):
    """A tensor that a source offers."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def slices(self) -> Iterator[memoryview]:
        """Yield the bytes in order, in whole elements; a slice is good until the next one."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view`, as long as the tensor, with its bytes."""


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A tensor that lies in memory."""

    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return STORED_DTYPES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def slices(self) -> Iterator[memoryview]:
        view = as_bytes(self.tensor)
        for start in range(0, self.size, SLICE_BYTES):
            yield view[start : start + SLICE_BYTES]

    def read_into(self, view: memoryview) -> None:
        view[:] = as_bytes(self.tensor)


def check_tensor(name: str, tensor: Any, origin: str) -> None:
    """Refuse what is no plain tensor with numbers of a dtype that the format knows.

    Raises:
        ConversionError: naming the tensor, and what about it is in the way.
    """
    what = f"tensor {name!r}"
    if not isinstance(tensor, torch.Tensor):
        raise ConversionError(origin, f"{what} is no tensor but {type(tensor).__name__}")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ConversionError(origin, f"{what} is a {type(tensor).__name__}; give a plain tensor")
    if tensor.is_meta:
        raise ConversionError(origin, f"{what} is on meta and has no numbers (offloaded?)")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(origin, f"{what} is sparse or quantised; give a dense tensor")
    if tensor.dtype not in STORED_DTYPES:
        raise ConversionError(origin, f"{what} has {tensor.dtype}, which the format doesn't know")


def dtype_named(name: str) -> str:
    """Return the stored name of a float dtype that people write as torch or safetensors do.

    Raises:
        ConversionError: there is no such float dtype.
    """
    short = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32"}
    names = {str(TORCH_DTYPES[stored]).removeprefix("torch."): stored for stored in _CAST_TARGETS}
    found = {**short, **names, **{s.lower(): s for s in _CAST_TARGETS}}.get(name.lower())
    if found is None:
        raise ConversionError(f"dtype {name!r}", f"is none of {', '.join(sorted(names))}")
    return found


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of `tensor`, of which a contiguous one on the host is not copied."""
    plain = tensor.detach().cpu().resolve_neg().contiguous()
    # One element is contiguous whatever its steps are, and no view of bytes with other steps than 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def load(source: SourceTensor) -> torch.Tensor:
    """Return all of `source` as a tensor of its own."""
    tensor = torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype])
    source.read_into(as_bytes(tensor))
    return tensor


def cast_slice(view: memoryview, dtype: str, wanted: str, name: str) -> memoryview:
    """Return the elements in `view` as dtype `wanted`.

    Raises:
        ConversionError: a finite number of tensor `name` would not be one any more.
    """
    if dtype == wanted or not view:
        return view
    before = torch.frombuffer(view, dtype=TORCH_DTYPES[dtype])
    after = before.to(TORCH_DTYPES[wanted])
    if bool(_is_lost(before, after).any()):
        raise ConversionError(f"tensor {name}", f"has numbers too large for {wanted}")
    return as_bytes(after)


def _is_lost(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Tell where a finite number became infinite, or the nearest that 8 bits can say."""
    lost = _is_finite(before) & ~_is_finite(after)
    if after.element_size() == 1:
        lost |= before.float().abs() > torch.finfo(after.dtype).max
    return lost


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.float())
