"""Opens the devices that the config names; what poisons one ends the process."""

import logging
import os
from typing import Final

from sllm_node.core.config import DeviceConfig
from sllm_node.core.errors import DeviceError, DeviceLostError
from sllm_node.device.base import Device
from sllm_node.device.cpu import CpuDevice
from sllm_node.device.optional import import_cuda
from sllm_node.node.systemd import Notifier

log = logging.getLogger(__name__)

EXIT_DEVICE_LOST: Final = 70
"""EX_SOFTWARE of sysexits.h; systemd starts the node again."""


def open_devices(config: DeviceConfig, notifier: Notifier) -> tuple[Device, ...]:
    """Return the devices that `config` names.

    Raises:
        DeviceError: one is not there, or has no free memory.
    """
    if config.names[0].startswith("cpu"):
        return tuple(CpuDevice(config.cpu_bytes, name) for name in config.names)
    return _open_gpus(config, notifier)


def _open_gpus(config: DeviceConfig, notifier: Notifier) -> tuple[Device, ...]:
    cuda = import_cuda(config.names[0])
    numbers = [int(name.partition(":")[2]) for name in config.names if ":" in name]
    if not numbers:
        numbers = list(range(cuda.device_count()))
    if not numbers:
        raise DeviceError("cuda", "this process sees no GPU")

    def on_lost(error: DeviceLostError) -> None:
        end_process(error, notifier)

    opened: list[Device] = []
    try:
        for number in numbers:
            made = cuda.CudaDevice(
                number,
                config.memory_bytes or None,
                reserve_bytes=config.reserve_bytes,
                siblings=[other for other in numbers if other != number],
                on_lost=on_lost,
            )
            opened.append(made)
    except DeviceError:
        for device in opened:
            device.close()
        raise
    return tuple(opened)


def end_process(error: DeviceLostError, notifier: Notifier) -> None:
    """End at once, from any thread: nothing on the device works any more, and closing would hang."""
    log.critical("device lost, the process ends", extra={"error": str(error)})
    notifier.status(f"device lost: {error}")
    os._exit(EXIT_DEVICE_LOST)
