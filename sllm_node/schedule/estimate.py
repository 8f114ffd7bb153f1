"""How long a load will take: n / b over the slowest tier of the path, b refined by each load.

All tiers of a load work at once, chunk by chunk, so a load lasts as long as its slowest part: the
bytes that come from NVMe at that tier's bandwidth, or all bytes on the way from DRAM to the device.
The waiting time in front of a load (q in q + n / b) is the scheduler's to know.
"""

from typing import Final

from sllm_node.core.types import LoadReport, Tier

_FIRST_GUESS_BYTES_PER_S: Final = {Tier.NVME: 1e9, Tier.DRAM: 5e9}
"""Before the first load: slow hardware, since a promise kept early does no harm."""
_WEIGHT: Final = 0.3
"""Of the newest sample; about the last ten count."""


class MovingAverage:
    """An exponentially weighted mean of samples."""

    __slots__ = ("_is_guess", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._is_guess = True

    def observe(self, sample: float) -> None:
        """Take one more sample; the first one replaces the guess."""
        weight = 1.0 if self._is_guess else _WEIGHT
        self.value += weight * (sample - self.value)
        self._is_guess = False


class LoadEstimator:
    """Expected duration of loads on this node."""

    def __init__(self) -> None:
        self._bandwidth = {
            tier: MovingAverage(guess) for tier, guess in _FIRST_GUESS_BYTES_PER_S.items()
        }

    def load_s(self, bytes_total: int, bytes_from_nvme: int) -> float:
        """Return the expected seconds of a load of which a part still lies on NVMe."""
        return max(self._parts(bytes_total, bytes_from_nvme).values())

    def observe(self, report: LoadReport) -> None:
        """Learn from a finished load: it tells the bandwidth of the tier that held it up."""
        moved = report.bytes_total - report.bytes_kept
        if moved <= 0 or report.elapsed_s <= 0 or report.bytes_from_sibling:
            return
        parts = self._parts(moved, report.bytes_from_nvme)
        slowest = max(parts, key=lambda tier: parts[tier])
        size = report.bytes_from_nvme if slowest is Tier.NVME else moved
        self._bandwidth[slowest].observe(size / report.elapsed_s)

    def _parts(self, bytes_total: int, bytes_from_nvme: int) -> dict[Tier, float]:
        return {
            Tier.NVME: bytes_from_nvme / self._bandwidth[Tier.NVME].value,
            Tier.DRAM: bytes_total / self._bandwidth[Tier.DRAM].value,
        }
