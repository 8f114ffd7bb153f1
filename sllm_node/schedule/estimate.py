"""How long a load will take: n / b over the slowest tier of the path, b refined by each load.

All tiers of a load work at once, chunk by chunk, so a load lasts as long as its slowest part: the
bytes that come from a remote or from NVMe at that tier's bandwidth, or all bytes on the way from DRAM
to the device. Bytes are decoded ones. Raw and encoded checkpoints have bandwidths of their own: a disk
delivers half as much again of an encoded one, a CPU that decodes much less.
What a load takes beside its bytes (`beside_s`) is learned apart: for models whose module is kept from an
earlier load, and for others, which take many times as long. So is what an eviction in front of it takes.
The waiting time in front of a load (q in q + n / b) is the scheduler's to know.
"""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final

from sllm_node.core.types import LoadReport, Tier, Waited

PEER: Final = "peer"
"""Other nodes of the cluster: farther than this node's tiers, and mostly nearer than its remotes."""
_FIRST_GUESS_BYTES_PER_S: Final[dict[Tier | str, float]] = {
    Tier.NVME: 1e9, Tier.DRAM: 5e9, Tier.REMOTE: 1e8, PEER: 1e9,
}  # fmt: skip
"""Before the first load: slow hardware, since a promise kept early does no harm."""
_BESIDE_GUESS_S: Final = {False: 0.1, True: 0.02}
"""For what a load takes beside its bytes, before the first one; True: its module is kept."""
_WEIGHT: Final = 0.3
"""Of the newest sample; about the last ten count."""
_MEDIAN_OF: Final = 5


class MovingAverage:
    """An exponentially weighted mean of samples."""

    __slots__ = ("_is_guess", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._is_guess = True

    def observe_least(self, sample: float) -> None:
        """Take a sample that tells no more than that the value is not below it."""
        if self._is_guess or sample > self.value:
            self.observe(sample)

    def observe(self, sample: float) -> None:
        """Take one more sample; the first one replaces the guess."""
        weight = 1.0 if self._is_guess else _WEIGHT
        self.value += weight * (sample - self.value)
        self._is_guess = False


class RunningMedian:
    """The median of the last few samples: one that a stall made long does not move it."""

    __slots__ = ("_guess", "_last")

    def __init__(self, guess: float, count: int = _MEDIAN_OF) -> None:
        self._guess = guess
        self._last: deque[float] = deque(maxlen=count)

    @property
    def value(self) -> float:
        """Return it; before the first sample, the guess."""
        return median(self._last) if self._last else self._guess

    def observe(self, sample: float) -> None:
        """Take one more sample."""
        self._last.append(sample)


_Bandwidth = dict[Tier | str, MovingAverage]


def path_s(parts: Iterable[tuple[float, float]]) -> float:
    """Return the seconds of a path whose tiers work at once, of (bytes, bytes a second) of each.

    A tier with bytes to carry and no bandwidth makes it infinite.
    """
    slowest = 0.0
    for size, bandwidth in parts:
        if size > 0:
            slowest = max(slowest, size / bandwidth if bandwidth > 0 else math.inf)
    return slowest


def waited(opened: float, granted: float, load: tuple[float, float] | None) -> Waited:
    """Return what a session waited for that came and ran then; `load`: when its model's began and ended."""
    begun, ended = load or (granted, granted)
    load_s = max(0.0, min(granted, ended) - max(opened, begun))
    return Waited(granted - opened - load_s, load_s)


class LoadEstimator:
    """Expected duration of loads on this node."""

    def __init__(self) -> None:
        self._raw = _first_guesses()
        self._encoded = _first_guesses()
        self._beside = {kept: RunningMedian(s) for kept, s in _BESIDE_GUESS_S.items()}
        self._evict = RunningMedian(0.0)

    def load_s(
        self,
        bytes_total: int,
        bytes_from_nvme: int,
        bytes_from_remote: int = 0,
        *,
        is_encoded: bool = False,
        is_peer: bool = False,
    ) -> float:
        """Return the expected seconds of a load of which a part still lies on NVMe or farther.

        `is_peer`: what comes from a remote comes from peers.
        """
        bandwidth = self._encoded if is_encoded else self._raw
        sizes = _sizes(bytes_total, bytes_from_nvme, bytes_from_remote, is_peer=is_peer)
        return max(_parts(bandwidth, sizes).values())

    def expect_from_peers(self, bytes_per_s: float) -> None:
        """Reckon loads from peers with this rate until the first one has come."""
        for bandwidth in (self._raw, self._encoded):
            bandwidth[PEER] = MovingAverage(bytes_per_s)

    def bandwidth(self, tier: Tier | str, *, is_encoded: bool = False) -> float:
        """Return the delivered bytes a second that loads from `tier` are reckoned with."""
        return (self._encoded if is_encoded else self._raw)[tier].value

    def beside_s(self, *, is_kept: bool) -> float:
        """Return what a load takes beside its bytes: the module if it is not kept, tokenizer, KV memory."""
        return self._beside[is_kept].value

    @property
    def evict_s(self) -> float:
        """Return what it takes until the memory of an idle replica is free."""
        return self._evict.value

    def observe_eviction(self, elapsed_s: float) -> None:
        """Learn from an eviction."""
        self._evict.observe(elapsed_s)

    def observe_whole(self, report: LoadReport, elapsed_s: float, *, is_kept: bool) -> None:
        """Learn from a replica that came, its bytes as `report` says, so long after it was asked for."""
        self._beside[is_kept].observe(max(0.0, elapsed_s - report.elapsed_s))

    def observe(self, report: LoadReport, *, is_peer: bool = False, is_alone: bool = True) -> None:
        """Learn from a finished load: it tells the bandwidth of the tier that held it up.

        One that had others beside it shared that, and tells no more than that it is not less: who
        waits behind others has their time added anyway.
        """
        moved = report.bytes_total - report.bytes_kept
        if moved <= 0 or report.elapsed_s <= 0 or report.bytes_from_sibling:
            return
        far = report.bytes_from_remote
        sizes = _sizes(moved, report.bytes_from_nvme, far, is_peer=is_peer)
        bandwidth = self._encoded if report.is_encoded else self._raw
        parts = _parts(bandwidth, sizes)
        slowest = max(parts, key=lambda tier: parts[tier])
        rate = sizes[slowest] / report.elapsed_s
        if is_alone:
            bandwidth[slowest].observe(rate)
        else:
            bandwidth[slowest].observe_least(rate)


def _first_guesses() -> _Bandwidth:
    return {tier: MovingAverage(guess) for tier, guess in _FIRST_GUESS_BYTES_PER_S.items()}


def _sizes(
    bytes_total: int, bytes_from_nvme: int, bytes_from_remote: int, *, is_peer: bool
) -> dict[Tier | str, int]:
    """Return the bytes that each tier has to carry, the farthest first: of equals it is the slowest."""
    return {
        PEER if is_peer else Tier.REMOTE: bytes_from_remote,
        Tier.NVME: bytes_from_nvme,
        Tier.DRAM: bytes_total,
    }


def _parts(bandwidth: _Bandwidth, sizes: dict[Tier | str, int]) -> dict[Tier | str, float]:
    """Return the seconds that each tier needs for its part of a load."""
    return {tier: path_s([(size, bandwidth[tier].value)]) for tier, size in sizes.items()}
