"""Brings small values from the host onto a device without waiting for what the device is doing.

From ordinary memory, torch would wait for all work that was launched before; from page-locked memory
the copy takes its place behind that work. Torch keeps such memory until its copies are done.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.int32]


def upload(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """Return `values` on `device`; numbers as int64."""
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.long)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def upload_all(arrays: Sequence[Numbers], device: torch.device) -> list[torch.Tensor]:
    """Return arrays on `device`, brought there by one copy."""
    flat = np.concatenate([array.ravel() for array in arrays])
    sent = torch.split(upload(torch.from_numpy(flat), device), [array.size for array in arrays])
    return [one.view(array.shape) for one, array in zip(sent, arrays, strict=True)]
