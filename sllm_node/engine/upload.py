"""Brings small values from the host onto a device without waiting for what the device is doing.

From ordinary memory, torch would wait for all work that was launched before; from page-locked memory
the copy takes its place behind that work. Torch keeps such memory until its copies are done.
"""

from collections.abc import Sequence

import torch


def upload(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """Return `values` on `device`; numbers as int64."""
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.long)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
