"""Numbers people compare: medians, spreads, rates, shares of the ceiling, speed-ups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sllm_node.bench.ceilings import PLAIN_COPY, PLAIN_READER
from sllm_node.bench.contestants import OF_OURS, OURS
from sllm_node.bench.scenarios import ScenarioResult


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of several loads."""

    median: float
    p10: float
    p90: float
    count: int


def spread_of(seconds: Sequence[float]) -> Spread:
    """Return median and percentiles of `seconds`, which are not empty."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90))
    return Spread(float(median), float(p10), float(p90), len(seconds))


def gigabytes(size: int) -> str:
    """Return `size` in decimal gigabytes, as disks and links count."""
    return f"{size / 1e9:.3g} GB"


@dataclass(frozen=True, slots=True)
class Row:
    """What a table and a plot say of one contestant in one scenario."""

    name: str
    version: str
    spread: Spread | None
    """None: it has no samples; `remark` says why."""
    bytes_per_s: float | None
    ceiling_share: float | None
    speedup: float | None
    """Its median over ours: how many times longer it takes."""
    remark: str


def ceiling_of(result: ScenarioResult) -> tuple[str, float] | None:
    """Return name and bytes/s of what limits this scenario: the slowest plain part of the way."""
    rates = [
        (name, result.size / spread_of(seconds).median)
        for name in (PLAIN_READER, PLAIN_COPY)
        if (seconds := result.seconds(name))
    ]
    return min(rates, key=lambda rate: rate[1], default=None)


def rows_of(result: ScenarioResult, versions: dict[str, str | None]) -> list[Row]:
    """Return a row for each contestant, the fastest first, those without samples last."""
    seconds = result.seconds(OURS)
    ours = spread_of(seconds) if seconds else None
    rows = [
        _row(result, name, version or "not installed", ours) for name, version in versions.items()
    ]
    return sorted(rows, key=lambda row: row.spread.median if row.spread else float("inf"))


def _row(result: ScenarioResult, name: str, version: str, ours: Spread | None) -> Row:
    seconds = result.seconds(name) if name not in result.problems else []
    remark = result.problems.get(name) or result.compared.get(name, "")
    if not seconds:
        return Row(name, version, None, None, None, None, remark or "no time left for a load")
    spread, ceiling = spread_of(seconds), ceiling_of(result)
    rate = result.size / spread.median
    return Row(
        name=name,
        version=version,
        spread=spread,
        bytes_per_s=rate,
        ceiling_share=rate / ceiling[1] if ceiling else None,
        speedup=spread.median / ours.median if ours else None,
        remark=remark,
    )


def headline(
    results: Sequence[ScenarioResult], versions: dict[str, str | None]
) -> dict[str, float]:
    """Return the figures of the register that these results decide."""
    found: dict[str, float] = {}
    for result in results:
        rows = {row.name: row for row in rows_of(result, versions) if row.spread}
        peers = [row.speedup for name, row in rows.items() if name not in OF_OURS and row.speedup]
        if result.scenario == "cached" and (row := rows.get("safetensors")) and row.speedup:
            found["cached_speedup_over_safetensors"] = row.speedup
        if result.scenario == "random" and peers:
            found["random_speedup_over_best_peer"] = min(peers)
        if result.scenario == "random" and OURS in rows and (share := rows[OURS].ceiling_share):
            found["disk_to_device_ratio"] = share
    return found
