"""The CUDA device, which is there only where its package is installed."""

from types import ModuleType
from typing import Any

from sllm_node.core.errors import DeviceError
from sllm_node.device.base import Device


def import_cuda(name: str) -> ModuleType:
    """Return `sllm_node.device.cuda`; `name` is the device that somebody wants of it.

    Raises:
        DeviceError: cuda-python is not installed.
    """
    try:
        from sllm_node.device import cuda
    except ImportError as error:
        problem = f"cuda-python is not installed ({error}); install sllm-node[cuda]"
        raise DeviceError(name, problem) from error
    return cuda


def gpu_count() -> int:
    """Return how many NVIDIA GPUs this process can use; 0 without a driver or its package."""
    try:
        return int(import_cuda("cuda").device_count())
    except DeviceError:
        return 0


def step_kernels(device: Device) -> Any | None:
    """Return a `StepKernels` of a CUDA device; None for another one."""
    if not device.name.startswith("cuda"):
        return None
    from sllm_node.device.step_kernels import StepKernels

    cuda = device.cuda  # type: ignore[attr-defined]
    return StepKernels(cuda, cuda.handle)
