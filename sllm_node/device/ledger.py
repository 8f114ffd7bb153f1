"""How much of a device's memory is mapped: one count, whoever asks, from whichever thread."""

import threading

from sllm_node.core.errors import DeviceMemoryError


class Ledger:
    """Bytes of one device."""

    def __init__(self, device: str, total: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._used = 0
        self.total = total

    @property
    def used(self) -> int:
        """Bytes taken."""
        return self._used

    def take(self, size: int) -> None:
        """Count `size` bytes as taken.

        Raises:
            DeviceMemoryError: so many are not left.
        """
        with self._lock:
            free = self.total - self._used
            if size > free:
                raise DeviceMemoryError(self._device, size, free, self.total)
            self._used += size

    def give_back(self, size: int) -> None:
        """Count `size` bytes as free."""
        with self._lock:
            self._used -= size
            assert self._used >= 0
