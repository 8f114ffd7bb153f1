"""What came of a run, in numbers: startup latencies, loads by tier, moves, and the digest of its events."""

from collections.abc import Sequence

import msgspec
import numpy as np

from sllm_node.sim.journal import Journal


class Latency(msgspec.Struct, frozen=True):
    """Of all requests, those that were given up included, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    worst: float


class Report(msgspec.Struct, frozen=True):
    """One run of one policy."""

    policy: str
    seed: int
    requests: int
    to_first_token_s: Latency
    to_loaded_s: Latency
    share_in_time: float
    """Of requests whose first token came within the limit."""
    loads: dict[str, int]
    """By the tier that they came from."""
    bytes_moved: dict[str, int]
    counts: dict[str, int]
    """Migrations, preemptions, timeouts, refusals, decisions by kind and other events."""
    pause_s: Latency
    """Of sessions that moved or were stopped: from one token to the next."""
    pauses: int
    estimate_error_p99_s: float
    """How far loads were from what was expected of them."""
    digest: str
    """SHA-256 of all events in order."""


def latency(values: Sequence[float]) -> Latency:
    """Return mean and percentiles."""
    found = np.asarray(values or [0.0])
    p50, p95, p99 = (float(v) for v in np.percentile(found, [50, 95, 99]))
    return Latency(float(found.mean()), p50, p95, p99, float(found.max()))


def make_report(policy: str, seed: int, journal: Journal, limit_s: float) -> Report:
    """Return the numbers of a run that has ended."""
    first = [session.first_s or 0.0 for session in journal.over]
    loaded = [session.loaded_s or 0.0 for session in journal.over]
    in_time = sum(value <= limit_s for value in first)
    errors = [abs(error) for error in journal.errors_s]
    return Report(
        policy=policy, seed=seed, requests=len(journal.over), to_first_token_s=latency(first),
        to_loaded_s=latency(loaded), share_in_time=in_time / max(1, len(first)),
        loads=dict(sorted(journal.loads.items())),
        bytes_moved=dict(sorted(journal.bytes_moved.items())),
        counts=dict(sorted(journal.counts.items())), pause_s=latency(journal.pauses_s),
        pauses=len(journal.pauses_s),
        estimate_error_p99_s=latency(errors).p99, digest=journal.digest(),
    )  # fmt: skip
