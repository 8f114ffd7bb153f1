"""Where loads of a comparison go: opens devices by name and asks torch about them.

The one place of this package that touches torch.cuda. `open_device` is the only way in which it
makes a Device.
"""

import gc
import shutil
import subprocess
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any, Final

import torch

from sllm_node.core.errors import DeviceError
from sllm_node.core.units import PAGE
from sllm_node.device.base import Device
from sllm_node.device.cpu import CpuDevice
from sllm_node.device.optional import import_cuda


def open_device(name: str, memory_bytes: int) -> Device:
    """Return the device `name` (`cpu`, `cuda:0`) with `memory_bytes` for this process.

    Raises:
        DeviceError: there is no such device.
    """
    if name == "cpu":
        return CpuDevice(memory_bytes)
    check_device(name)
    made: Device = import_cuda(name).CudaDevice(int(name.partition(":")[2]), memory_bytes)
    return made


def check_device(name: str) -> None:
    """Make sure that torch knows the device `name`.

    Raises:
        DeviceError: it does not.
    """
    if name == "cpu":
        return
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise DeviceError(name, "is no device; there are cpu and cuda:N")
    if int(number) >= cuda_count():
        raise DeviceError(name, f"is not there: torch sees {cuda_count()} CUDA devices")


def is_cuda(name: str) -> bool:
    """Tell whether `name` is a GPU."""
    return name.startswith("cuda")


def cuda_count() -> int:
    """Return how many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def settle(tensors: Mapping[str, torch.Tensor], device: str) -> None:
    """Return when the last byte of `tensors` can be used on `device`.

    On a GPU, wait for what is enqueued. On the CPU, touch each page: a tensor that is a mapped file
    has no bytes before somebody asks for them.
    """
    if is_cuda(device):
        torch.cuda.synchronize(device)
        return
    for tensor in tensors.values():
        raw = as_bytes(tensor)
        raw[::PAGE].sum()
        raw[-1:].sum()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `tensor` as (size,) uint8."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def free_memory(device: str) -> int:
    """Return the bytes of `device` that are free."""
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def release_cached(device: str) -> None:
    """Give back what torch keeps of freed memory, so that each load starts alike."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def describe_gpus() -> dict[str, object]:
    """Return name, memory and driver of the GPUs; empty without one."""
    if not cuda_count():
        return {}
    first = torch.cuda.get_device_properties(0)
    return {
        "gpu": first.name,
        "gpu_count": cuda_count(),
        "gpu_memory_bytes": first.total_memory,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return done.stdout.partition("\n")[0].strip() or "unknown"


def host_memory(size: int, device: str, *, pinned: bool) -> torch.Tensor:
    """Return (size,) uint8 of touched host memory that begins at a page.

    Page-locked for `device` if `pinned`; on the CPU there is no difference.
    """
    if pinned and is_cuda(device):
        taken = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        assert taken.data_ptr() % PAGE == 0, "page-locked memory begins at a page"
        return taken
    taken = torch.frombuffer(mmap(-1, size), dtype=torch.uint8)
    taken[::PAGE] = 0
    return taken


_NO_STREAM: Final = None


class Slot:
    """Host memory for one chunk on its way to the device, and how far that copy is.

    With `relay`, another GPU's name, bytes go through that GPU and its link.
    """

    def __init__(self, size: int, device: str, relay: str | None = None) -> None:
        self.host = host_memory(size, device, pinned=True)
        self.view = self.host.numpy().data
        self._stream: Any = _NO_STREAM
        self._event: Any = None
        self._staging: torch.Tensor | None = None
        if is_cuda(device):
            self._stream = torch.cuda.Stream(relay or device)  # type: ignore[no-untyped-call]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if relay is not None:
            self._staging = torch.empty(size, dtype=torch.uint8, device=relay)

    def wait(self) -> None:
        """Return when the memory may be filled again."""
        if self._event is not None:
            self._event.synchronize()

    def copy_to(self, target: torch.Tensor) -> None:
        """Enqueue a copy of the first bytes to `target`, device memory."""
        source = self.host[: target.numel()]
        if self._stream is _NO_STREAM:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            if self._staging is not None:
                source = self._staging[: target.numel()].copy_(source, non_blocking=True)
            target.copy_(source, non_blocking=True)
            self._event.record(self._stream)
