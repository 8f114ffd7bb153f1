"""What kernels ask of tensors, checked before a launch, and what launches them.

A kernel can't say what is wrong with what it is given.

Checks of tensors come with each launch and put words together only when something is wrong: a dtype's
name alone takes longer than all that is compared.
"""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sllm_node.core.errors import KernelError
from sllm_node.device.step_parameters import Variant

HALVES: Final = (torch.bfloat16, torch.float16)
FLOATS: Final = (*HALVES, torch.float32)
ALIGNMENT: Final = 16


class Kernels(Protocol):
    """What launches kernels: `device.step_kernels.StepKernels`."""

    multiprocessors: int

    def blocks(self, variant: Variant, threads: int) -> int:
        """Return how many thread blocks fit on a multiprocessor at once."""

    def launch(
        self,
        variant: Variant,
        grid: tuple[int, int, int],
        threads: int,
        parameters: npt.NDArray[np.void],
        stream: int,
    ) -> None:
        """Enqueue a variant with one record of parameters."""

    def prepared(
        self,
        variant: Variant,
        grid: tuple[int, int, int],
        threads: int,
        parameters: npt.NDArray[np.void],
        stream: int,
    ) -> Callable[[], None]:
        """Return what enqueues it with what the record holds by then, as often as it is called."""


def need(kernel: str, fits: bool, found: str) -> None:  # noqa: FBT001 - what is asserted
    """Refuse what a kernel does not take.

    Raises:
        KernelError: it does not fit.
    """
    if not fits:
        raise refusal(kernel, found)


def refusal(kernel: str, found: str) -> KernelError:
    """Return the error that says what a kernel does not take."""
    return KernelError(kernel, f"it does not take {found}")


def rows_of(
    kernel: str,
    label: str,
    tensor: torch.Tensor,
    like: torch.Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = HALVES,
) -> tuple[int, int]:
    """Return (rows, size) of a tensor whose rows are contiguous, of `like`'s device and dtype."""
    if tensor.ndim != 2:
        raise refusal(kernel, f"{label} of {tensor.ndim} dimensions")
    _check_kind(kernel, label, tensor, like, dtypes)
    if tensor.stride(1) != 1:
        raise refusal(kernel, f"{label} with rows that are not contiguous")
    return tensor.shape[0], tensor.shape[1]


def check_vector(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, size: int
) -> None:
    """Refuse anything but a contiguous vector of `size` and of `like`'s device and dtype."""
    _check_kind(kernel, label, tensor, like, HALVES)
    shape = tuple(tensor.shape)
    if shape != (size,) or not tensor.is_contiguous():
        raise refusal(kernel, f"{label} {shape} of ({size},)")


def check_heads(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse anything but (tokens, heads, size) whose tokens are contiguous."""
    _check_kind(kernel, label, tensor, like, HALVES)
    if tuple(tensor.shape) != shape:
        raise refusal(kernel, f"{label} {tuple(tensor.shape)} of {shape}")
    if tensor.stride(2) != 1 or (shape[1] != 1 and tensor.stride(1) != shape[2]):
        raise refusal(kernel, f"{label} with tokens that are not contiguous")


def check_integers(
    kernel: str, label: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse anything but int32 of `shape` whose last dimension is contiguous."""
    if tensor.dtype != torch.int32:
        raise refusal(kernel, f"{label} of {tensor.dtype}, but int32")
    if tensor.device != like.device:
        raise refusal(kernel, f"{label} on {tensor.device}, not {like.device}")
    if tuple(tensor.shape) != shape:
        raise refusal(kernel, f"{label} {tuple(tensor.shape)} of {shape}")
    if tensor.stride(-1) != 1:
        raise refusal(kernel, f"{label} that are not contiguous")


def aligned_address(kernel: str, label: str, tensor: torch.Tensor) -> int:
    """Return the address of a tensor all of whose rows are aligned to 16 bytes."""
    step = tensor.stride(0) * tensor.itemsize if tensor.ndim > 1 else 0
    address = tensor.data_ptr()
    if (address | step) % ALIGNMENT:
        raise refusal(kernel, f"{label} whose rows are not aligned to {ALIGNMENT} bytes")
    return address


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
    dtype = tensor.dtype
    if dtype not in dtypes:
        raise refusal(kernel, f"{label} of {dtype}")
    if like is None:
        return
    if tensor.device != like.device:
        raise refusal(kernel, f"{label} on {tensor.device}, not {like.device}")
    if dtype != like.dtype and dtypes is HALVES:
        raise refusal(kernel, f"{label} of {dtype} beside {like.dtype}")
