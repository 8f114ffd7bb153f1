"""Memory that the steps of all models of a device use in turn.

Steps of one device run one after the other on one stream, and nothing in a step's scratch memory is
needed by the next one. So all replicas, and all graphs that they have captured, may use the same
bytes: keeping graphs of many models costs no more memory than those of the largest.
"""

import torch

_ALIGNMENT = 256


class ScratchMemory:
    """One piece of memory for each power of two; lives as long as somebody refers to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[int, torch.Tensor] = {}

    def take(self, sizes: list[int]) -> list[torch.Tensor]:
        """Return (size,) uint8 for each of `sizes`, side by side; others get the same bytes."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        whole = 1 << (max(end, 1) - 1).bit_length()
        if whole not in self._pieces:
            self._pieces[whole] = torch.zeros(whole, dtype=torch.uint8, device=self._device)
        flat = self._pieces[whole]
        return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
