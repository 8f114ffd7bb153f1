"""Opens devices for a program that is not a node: this machine's CPU and the GPUs it may use."""

import os
from pathlib import Path
from typing import Final

import torch

from sllm_node.core.config import DeviceConfig
from sllm_node.core.errors import DeviceError
from sllm_node.core.units import PAGE
from sllm_node.device.base import Device
from sllm_node.device.cpu import CpuDevice
from sllm_node.device.optional import import_cuda

CPU: Final = "cpu"
_DRIVER: Final = Path("/proc/driver/nvidia/version")


def physical_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // PAGE * PAGE


def open_device(name: str) -> Device:
    """Return the device `name`, `cpu` or `cuda:N`.

    A GPU is taken with what is free on it now, less 2 GiB for what torch takes besides; its context
    is torch's own.

    Raises:
        DeviceError: there is no such device.
    """
    if name == CPU:
        return CpuDevice(physical_memory(), name)
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise DeviceError(name, 'is no device; there are "cpu" and "cuda:0", "cuda:1" and so on')
    if not torch.version.cuda:
        raise DeviceError(name, "this build of torch knows no CUDA; install one that does")
    reserve_bytes = DeviceConfig().reserve_bytes
    made: Device = import_cuda(name).CudaDevice(int(number), reserve_bytes=reserve_bytes)
    return made


def gpu_names() -> tuple[str, ...]:
    """Return the GPUs that models may go to; empty where there are none, or torch can't use them.

    Raises:
        DeviceError: there is a GPU, and what is needed to use it is not installed.
    """
    if not torch.version.cuda:
        return ()
    try:
        from sllm_node.device.cuda import device_count
    except ImportError as error:
        if not _DRIVER.exists():
            return ()
        problem = 'cuda-python is not installed; install sllm-node[cuda], or say device_map="cpu"'
        raise DeviceError("cuda", problem) from error
    try:
        return tuple(f"cuda:{number}" for number in range(device_count()))
    except DeviceError:
        return ()  # no driver, so no GPU
