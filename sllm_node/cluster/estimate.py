"""How long it takes until a node serves: loads over the best path, sessions resumed from tokens.

After ServerlessLLM (OSDI 2024, sections 5.1 and 5.2): a load lasts q + n / b, with q the wait in the
node's queue, n the bytes and b the bandwidth of the slowest tier of the path; a migrated session
resumes in a * (t_in + t_out) + b seconds, a and b per model and node. All tiers of a load work at
once (`schedule.estimate.path_s`): links carry stored bytes, the device puts out decoded ones.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sllm_node.cluster.state import Bandwidths, HeldModel, NodeId, ResumeFit
from sllm_node.schedule.estimate import MovingAverage, RunningMedian, path_s

RESUME_GUESS: Final = ResumeFit(2e-4, 0.05)
"""Before the first observation: prefill of 5,000 tokens a second, 50 ms for the rest."""
_FORGET: Final = 0.98
"""What an observation weighs after the next one: about the last fifty count."""
ENDS: Final = 2
"""Of a forward: the entry node and the one that serves."""
_FORWARDS: Final = 11
"""Forwards that count for the next one: single ones vary widely, what they hang on changes slowly."""
_COMING_S: Final = 0.001
"""What a replica is away at least that does not decode yet."""
_LATE_S: Final = 1.0
"""By which an estimate may be wrong: that of a first load is, and a load elsewhere would be as late."""
_LEAST_SPREAD: Final = 1e-6
"""Of token counts, relative to their mean square: below it they tell nothing of the slope."""


class Source(Enum):
    """Where the farthest bytes of a load come from."""

    CLONE = "clone"
    """Another device of the same node."""
    DRAM = "dram"
    NVME = "nvme"
    PEER = "peer"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class LoadPath:
    """The quickest path of a model onto a device of a node."""

    load_s: float
    """Without the wait in the queue; infinite: there is no path."""
    source: Source


def load_path(
    held: HeldModel, bandwidths: Bandwidths, *, peer_rate: float, has_replica: bool
) -> LoadPath:
    """Return the quickest path; `peer_rate`: stored bytes a second that some peer can send."""
    from_nvme = max(0, held.bytes_nvme - held.bytes_dram)
    missing = max(0, held.bytes_stored - held.bytes_dram - from_nvme)
    from_peer = min(bandwidths.peer, peer_rate)
    far = max(from_peer, bandwidths.remote)
    parts: list[tuple[float, float]] = [
        (held.bytes_stored, bandwidths.dram),
        (from_nvme, bandwidths.nvme),
        (missing, far),
    ]
    if held.bytes_stored != held.bytes_decoded:
        parts.append((held.bytes_decoded, bandwidths.decode))
    beside_s = bandwidths.kept_s if held.is_kept else bandwidths.beside_s
    load_s = path_s(parts) + beside_s
    if has_replica:
        clone_s = path_s([(held.bytes_decoded, bandwidths.clone)]) + beside_s
        if clone_s <= load_s:
            return LoadPath(clone_s, Source.CLONE)
    if missing and from_peer >= bandwidths.remote:
        return LoadPath(load_s + bandwidths.peer_s, Source.PEER)
    if missing:
        return LoadPath(load_s, Source.REMOTE)
    return LoadPath(load_s, Source.NVME if from_nvme else Source.DRAM)


def send_rate(held: HeldModel, bandwidths: Bandwidths) -> float:
    """Return the stored bytes a second at which a node can send a whole model; 0: it has not all."""
    if held.bytes_dram >= held.bytes_stored:
        return bandwidths.dram
    if max(held.bytes_dram, held.bytes_nvme) >= held.bytes_stored:
        return bandwidths.nvme
    return 0.0


def resume_s(fit: ResumeFit | None, tokens: float, sessions: int = 1) -> float:
    """Return the expected seconds until sessions of so many tokens together decode again, in turn."""
    fit = fit or RESUME_GUESS
    return fit.a_s_per_token * tokens + fit.b_s * sessions


def coming_s(expected_s: float, passed_s: float = 0.0) -> float:
    """Return how long a replica is still away that was expected in `expected_s`, `passed_s` ago.

    One that is overdue takes as long again as it is late: nobody knows what holds it up. It may come
    any moment while it is late by no more than estimates are wrong.
    """
    late_s = passed_s - expected_s
    return late_s if late_s > _LATE_S else max(_COMING_S, -late_s)


@dataclass(frozen=True, slots=True)
class StartupParts:
    """What a startup is made of: estimated, or as it came."""

    queue_s: float = 0.0
    """For a place and for room at the node that serves."""
    load_s: float = 0.0
    """For a load of its own, or the rest of one that is under way."""
    forward_s: float = 0.0
    """For passing the request on and hearing that it runs: what the others leave."""

    def later(self, seconds: float) -> "StartupParts":
        """Return what is left of it so long after: first the queue passes, then the load."""
        queue_s = max(0.0, self.queue_s - seconds)
        load_s = max(0.0, self.load_s - max(0.0, seconds - self.queue_s))
        return StartupParts(queue_s, load_s, self.forward_s)


class ErrorTrack:
    """How far estimates were from what came: a mean of the last ones and the worst."""

    __slots__ = ("_absolute", "_signed", "count", "worst_s")

    def __init__(self) -> None:
        self._absolute = MovingAverage(0.0)
        self._signed = MovingAverage(0.0)
        self.count = 0
        self.worst_s = 0.0

    def observe(self, expected_s: float, actual_s: float) -> None:
        """Take one estimate and what came of it."""
        error = actual_s - expected_s
        self._absolute.observe(abs(error))
        self._signed.observe(error)
        self.count += 1
        self.worst_s = max(self.worst_s, abs(error))

    @property
    def mean_s(self) -> float:
        """Return the mean distance of estimate and fact, in seconds."""
        return self._absolute.value

    @property
    def bias_s(self) -> float:
        """Return the mean of fact less estimate: above 0, estimates are too short."""
        return self._signed.value


class ForwardEstimator:
    """What passing a request on adds to its startup: mostly as long as lately, from the same to the same.

    A node that computes or loads answers later than one with nothing to do, many times so where it computes
    on its CPU. So times are learned apart by how many of the two ends are busy.
    """

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        self._peers: dict[tuple[NodeId, int], RunningMedian] = {}

    def seconds(self, peer: NodeId, busy_ends: int) -> float:
        """Return what is expected; of a peer not seen so, what the most alike case took."""
        alike = (busy_ends, *range(busy_ends - 1, -1, -1), *range(busy_ends + 1, ENDS + 1))
        known = (self._peers.get((peer, count)) for count in alike)
        found = next((one for one in known if one is not None), None)
        return self._guess_s if found is None else found.value

    def observe(self, peer: NodeId, busy_ends: int, elapsed_s: float) -> None:
        """Learn from a session: what it took until it ran, less what it waited for at the peer."""
        fresh = RunningMedian(self._guess_s, _FORWARDS)
        self._peers.setdefault((peer, busy_ends), fresh).observe(elapsed_s)


def errors_by_part(expected: StartupParts, actual: StartupParts) -> dict[str, float]:
    """Return how much longer than estimated each part took, in seconds."""
    return {
        "queue": actual.queue_s - expected.queue_s,
        "load": actual.load_s - expected.load_s,
        "forward": actual.forward_s - expected.forward_s,
    }


class ResumeEstimator:
    """One model's resume time on this node: a line through (tokens, seconds), fitted as they come.

    Weighted least squares with forgetting, by sums alone. Neither a nor b falls below 0: a negative
    slope is the mean instead, a negative intercept the line through the origin.
    """

    __slots__ = ("_s", "_st", "_t", "_tt", "_weight", "errors")

    def __init__(self) -> None:
        self._weight = self._t = self._s = self._tt = self._st = 0.0
        self.errors = ErrorTrack()

    @property
    def fit(self) -> ResumeFit:
        """Return the line as it is now; with one observation: the guess, scaled to pass through it."""
        if not self._weight:
            return RESUME_GUESS
        mean_t, mean_s = self._t / self._weight, self._s / self._weight
        spread = self._tt / self._weight - mean_t * mean_t
        if spread <= _LEAST_SPREAD * max(1.0, mean_t * mean_t):
            scale = mean_s / resume_s(RESUME_GUESS, mean_t)
            return ResumeFit(RESUME_GUESS.a_s_per_token * scale, RESUME_GUESS.b_s * scale)
        a = (self._st / self._weight - mean_t * mean_s) / spread
        if a < 0:
            return ResumeFit(0.0, mean_s)
        b = mean_s - a * mean_t
        return ResumeFit(a, b) if b >= 0 else ResumeFit(self._st / self._tt, 0.0)

    def observe(self, tokens: int, elapsed_s: float) -> None:
        """Learn from a session that resumed with so many tokens in all; nonsense is passed over."""
        if tokens <= 0 or elapsed_s <= 0 or not math.isfinite(elapsed_s):
            return
        self.errors.observe(resume_s(self.fit, tokens), elapsed_s)
        for name, value in (
            ("_weight", 1.0), ("_t", tokens), ("_s", elapsed_s),
            ("_tt", tokens * tokens), ("_st", tokens * elapsed_s),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * _FORGET + value)
