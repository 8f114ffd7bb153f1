"""How long a load will take: n / b over the slowest tier of the path, b refined by each load.

All tiers of a load work at once, chunk by chunk, so a load lasts as long as its slowest part: the
bytes that come from a remote or from NVMe at that tier's bandwidth, or all bytes on the way from DRAM
to the device.
The waiting time in front of a load (q in q + n / b) is the scheduler's to know.
"""

import math
from collections.abc import Iterable
from typing import Final

from sllm_node.core.types import LoadReport, Tier

_FIRST_GUESS_BYTES_PER_S: Final = {Tier.NVME: 1e9, Tier.DRAM: 5e9, Tier.REMOTE: 1e8}
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


def path_s(parts: Iterable[tuple[float, float]]) -> float:
    """Return the seconds of a path whose tiers work at once, of (bytes, bytes a second) of each.

    A tier with bytes to carry and no bandwidth makes it infinite.
    """
    slowest = 0.0
    for size, bandwidth in parts:
        if size > 0:
            slowest = max(slowest, size / bandwidth if bandwidth > 0 else math.inf)
    return slowest


class LoadEstimator:
    """Expected duration of loads on this node."""

    def __init__(self) -> None:
        self._bandwidth = {
            tier: MovingAverage(guess) for tier, guess in _FIRST_GUESS_BYTES_PER_S.items()
        }

    def load_s(self, bytes_total: int, bytes_from_nvme: int, bytes_from_remote: int = 0) -> float:
        """Return the expected seconds of a load of which a part still lies on NVMe or farther."""
        return max(self._parts(bytes_total, bytes_from_nvme, bytes_from_remote).values())

    def bandwidth(self, tier: Tier) -> float:
        """Return the bytes a second that loads from `tier` are reckoned with."""
        return self._bandwidth[tier].value

    def observe(self, report: LoadReport) -> None:
        """Learn from a finished load: it tells the bandwidth of the tier that held it up."""
        moved = report.bytes_total - report.bytes_kept
        if moved <= 0 or report.elapsed_s <= 0 or report.bytes_from_sibling:
            return
        sizes = {
            Tier.NVME: report.bytes_from_nvme,
            Tier.DRAM: moved,
            Tier.REMOTE: report.bytes_from_remote,
        }
        parts = self._parts(moved, report.bytes_from_nvme, report.bytes_from_remote)
        slowest = max(parts, key=lambda tier: parts[tier])
        self._bandwidth[slowest].observe(sizes[slowest] / report.elapsed_s)

    def _parts(
        self, bytes_total: int, bytes_from_nvme: int, bytes_from_remote: int
    ) -> dict[Tier, float]:
        sizes = {
            Tier.NVME: bytes_from_nvme,
            Tier.DRAM: bytes_total,
            Tier.REMOTE: bytes_from_remote,
        }
        return {tier: path_s([(size, self.bandwidth(tier))]) for tier, size in sizes.items()}
