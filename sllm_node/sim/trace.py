"""Requests that arrive: read from a trace, scaled up, or drawn from a Gamma process.

Traces have the columns TIMESTAMP, ContextTokens, GeneratedTokens. `scale` repeats each row so often,
each copy later by up to `SPREAD_S`, so that bursts stay bursts. Which model a request is for is
drawn by popularity. The same seed gives the same requests.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Final

import numpy as np

from sllm_node.core.errors import ConfigError

SPREAD_S: Final = 1.0
REQUESTS_MOST: Final = 10_000_000
"""Of a Gamma process; each is an object in memory."""
CV_LEAST: Final = 0.01
CV_MOST: Final = 100.0
"""Beyond them no gap can be drawn."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    at_s: float
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, for the model of this number."""

    at_s: float
    model: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Gamma:
    """Arrivals with gaps of a Gamma distribution; CV 1 is Poisson, 8 is bursty."""

    rate: float
    cv: float
    duration_s: float
    tokens_in: float = 512.0
    tokens_out: float = 128.0
    """Means of geometric distributions."""


def read_rows(lines: Iterable[str], origin: str) -> list[Row]:
    """Return the rows of a trace, times from the first one on.

    Raises:
        ConfigError: it is no such trace.
    """
    rows: list[Row] = []
    first: datetime | None = None
    for number, line in enumerate(csv.DictReader(lines), start=2):
        try:
            at = datetime.fromisoformat(line["TIMESTAMP"][:26])
            tokens = int(line["ContextTokens"]), int(line["GeneratedTokens"])
        except (KeyError, ValueError, TypeError) as error:
            what = "TIMESTAMP, ContextTokens, GeneratedTokens are wanted"
            raise ConfigError(origin, (f"line {number}: {error}; {what}",)) from error
        first = first or at
        rows.append(Row((at - first).total_seconds(), *tokens))
    if not rows:
        raise ConfigError(origin, ("the trace has no requests",))
    return sorted(rows, key=lambda row: row.at_s)


def parse_gamma(text: str) -> Gamma:
    """Return what `gamma:cv=8,rate=20,duration=600,in=512,out=128` says.

    Raises:
        ConfigError: it is not of that form.
    """
    names = {"rate": "rate", "cv": "cv", "duration": "duration_s", "in": "tokens_in", "out": "tokens_out"}  # fmt: skip
    values = {"cv": 8.0, "duration_s": 600.0}
    try:
        for part in text.removeprefix("gamma:").split(","):
            key, value = part.split("=")
            values[names[key]] = float(value)
        gamma = Gamma(**values)
    except (KeyError, ValueError, TypeError) as error:
        what = "write gamma:rate=20,cv=8,duration=600,in=512,out=128; rate must be there"
        raise ConfigError(text, (f"is no Gamma process ({error}); {what}",)) from error
    if not all(0 < number < math.inf for number in astuple(gamma)):
        raise ConfigError(text, ("every number must be above 0, and have an end",))
    if not CV_LEAST <= gamma.cv <= CV_MOST:
        raise ConfigError(text, (f"cv must be from {CV_LEAST:g} to {CV_MOST:g}",))
    if gamma.rate * gamma.duration_s > REQUESTS_MOST:
        raise ConfigError(text, (f"rate * duration is above {REQUESTS_MOST:,} requests",))
    return gamma


def gamma_rows(gamma: Gamma, seed: int) -> list[Row]:
    """Return the requests of a Gamma process."""
    rng = np.random.default_rng([seed, 1])
    shape = 1 / gamma.cv**2
    rows: list[Row] = []
    at_s = 0.0
    while True:
        gaps = rng.gamma(shape, 1 / (gamma.rate * shape), 4096)
        ins = rng.geometric(min(1.0, 1 / gamma.tokens_in), 4096)
        outs = rng.geometric(min(1.0, 1 / gamma.tokens_out), 4096)
        for gap, tokens_in, tokens_out in zip(gaps, ins, outs, strict=True):
            at_s += float(gap)
            if at_s >= gamma.duration_s:
                return rows
            rows.append(Row(at_s, int(tokens_in), int(tokens_out)))


def cut(rows: Sequence[Row], start_s: float, duration_s: float) -> list[Row]:
    """Return the rows of a stretch of time, counted from its start."""
    end_s = start_s + duration_s
    return [
        Row(row.at_s - start_s, row.tokens_in, row.tokens_out)
        for row in rows
        if start_s <= row.at_s < end_s
    ]


def scaled(rows: Sequence[Row], scale: float, seed: int) -> list[Row]:
    """Return every row `scale` times, a fraction meaning a chance; copies come up to a second later."""
    rng = np.random.default_rng([seed, 2])
    copies = int(scale) + (rng.random(len(rows)) < scale % 1)
    shifts = rng.random(int(copies.sum())) * SPREAD_S
    made: list[Row] = []
    for row, count in zip(rows, copies, strict=True):
        for i in range(int(count)):
            shift = float(shifts[len(made)]) if i else 0.0
            made.append(Row(row.at_s + shift, row.tokens_in, row.tokens_out))
    return sorted(made, key=lambda row: row.at_s)


def arrivals(
    rows: Sequence[Row], weights: Sequence[float], contexts: Sequence[int], seed: int
) -> list[Arrival]:
    """Return the requests with their models; tokens are cut to the model's context."""
    rng = np.random.default_rng([seed, 3])
    chances = np.cumsum(np.asarray(weights, dtype=float))
    drawn = np.searchsorted(chances, rng.random(len(rows)) * chances[-1], side="right")
    made: list[Arrival] = []
    for row, found in zip(rows, drawn, strict=True):
        model = min(int(found), len(weights) - 1)
        tokens_in = max(1, min(row.tokens_in, contexts[model] - 1))
        tokens_out = max(1, min(row.tokens_out, contexts[model] - tokens_in))
        made.append(Arrival(row.at_s, model, tokens_in, tokens_out))
    return made
