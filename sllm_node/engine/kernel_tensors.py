"""What kernels ask of tensors: checked before a launch, because a kernel can't say what is wrong."""

from typing import Final

import torch

from sllm_node.core.errors import KernelError

HALVES: Final = (torch.bfloat16, torch.float16)
FLOATS: Final = (*HALVES, torch.float32)
ALIGNMENT: Final = 16


def need(kernel: str, fits: bool, found: str) -> None:  # noqa: FBT001 - what is asserted
    """Refuse what a kernel does not take.

    Raises:
        KernelError: it does not fit.
    """
    if not fits:
        raise KernelError(kernel, f"it does not take {found}")


def rows_of(
    kernel: str,
    label: str,
    tensor: torch.Tensor,
    like: torch.Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = HALVES,
) -> tuple[int, int]:
    """Return (rows, size) of a tensor whose rows are contiguous, of `like`'s device and dtype."""
    need(kernel, tensor.ndim == 2, f"{label} of {tensor.ndim} dimensions")
    _check_kind(kernel, label, tensor, like, dtypes)
    need(kernel, tensor.stride(1) == 1, f"{label} with rows that are not contiguous")
    return tensor.shape[0], tensor.shape[1]


def check_vector(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, size: int
) -> None:
    """Refuse anything but a contiguous vector of `size` and of `like`'s device and dtype."""
    _check_kind(kernel, label, tensor, like, HALVES)
    shape = tuple(tensor.shape)
    need(kernel, shape == (size,) and tensor.is_contiguous(), f"{label} {shape} of ({size},)")


def check_heads(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse anything but (tokens, heads, size) whose tokens are contiguous."""
    _check_kind(kernel, label, tensor, like, HALVES)
    need(kernel, tuple(tensor.shape) == shape, f"{label} {tuple(tensor.shape)} of {shape}")
    is_contiguous = tensor.stride(2) == 1 and (shape[1] == 1 or tensor.stride(1) == shape[2])
    need(kernel, is_contiguous, f"{label} with tokens that are not contiguous")


def check_integers(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse anything but int32 of `shape` whose last dimension is contiguous."""
    need(kernel, tensor.dtype == torch.int32, f"{label} of {tensor.dtype}, but int32")
    need(kernel, tensor.device == like.device, f"{label} on {tensor.device}, not {like.device}")
    need(kernel, tuple(tensor.shape) == shape, f"{label} {tuple(tensor.shape)} of {shape}")
    need(kernel, tensor.stride(-1) == 1, f"{label} that are not contiguous")


def aligned_address(kernel: str, label: str, tensor: torch.Tensor) -> int:
    """Return the address of a tensor all of whose rows are aligned to 16 bytes."""
    step = tensor.stride(0) * tensor.itemsize if tensor.ndim > 1 else 0
    is_aligned = (tensor.data_ptr() | step) % ALIGNMENT == 0
    need(kernel, is_aligned, f"{label} whose rows are not aligned to {ALIGNMENT} bytes")
    return tensor.data_ptr()


def form_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what tensors that a prepared launch takes in turn have in common."""
    is_aligned = tensor.data_ptr() % ALIGNMENT == 0
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, is_aligned


def kind_of(tensor: torch.Tensor) -> tuple[str, int]:
    """Return the macro for a tensor's floats of 16 bits."""
    return "F16", int(tensor.dtype == torch.float16)


def stream_of(tensor: torch.Tensor) -> int:
    """Return the handle of torch's current stream on a tensor's device; 0 on a CPU."""
    if tensor.device.type != "cuda":
        return 0
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)  # noqa: TID251 - torch's own


def _check_kind(
    kernel: str,
    label: str,
    tensor: torch.Tensor,
    like: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    need(kernel, tensor.dtype in dtypes, f"{label} of {tensor.dtype}")
    if like is None:
        return
    need(kernel, tensor.device == like.device, f"{label} on {tensor.device}, not {like.device}")
    same = tensor.dtype == like.dtype or dtypes is not HALVES
    need(kernel, same, f"{label} of {tensor.dtype} beside {like.dtype}")
