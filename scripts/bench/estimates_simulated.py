"""How many startup estimates are within 20 % or 5 ms on virtual time, at several loads and seeds.

    python -m scripts.bench.estimates_simulated

Four nodes with their real peers and routers, sixteen models, room for two on each device; a load takes
1 s of its node's link, which loads share, and half a second beside it. Results go to
results/estimates_simulated.json: of each load the seconds between two requests on average, and of each
seed how many sessions counted and how many of their estimates were good.
"""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from scripts.bench import figures
from tests.sim.estimates_world import WARM, estimates, is_good

RESULTS = figures.HERE / "results" / "estimates_simulated.json"
LOADS = ((3.0, 150), (1.5, 150), (1.5, 400), (0.8, 400), (0.5, 400))
"""Seconds between requests, and how many come."""
SEEDS = 8


def main() -> None:
    """Play all loads with all seeds."""
    loads = [_load(gap_s, count) for gap_s, count in LOADS]
    found = {
        "machine": figures.describe_machine(),
        "command": "python -m scripts.bench.estimates_simulated",
        "commit": figures.commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "requests_that_warm_up": WARM,
        "loads": loads,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def _load(gap_s: float, count: int) -> dict[str, object]:
    seeds: list[dict[str, int]] = []
    shares: list[float] = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            lines = estimates(Path(folder), seed, gap_s, count)
        good = sum(map(is_good, lines))
        shares.append(round(100 * good / len(lines), 1))
        seeds.append({"seed": seed, "sessions": len(lines), "good": good})
        print(gap_s, count, seeds[-1], shares[-1], flush=True)
    return {
        "gap_s": gap_s,
        "requests": count,
        "percent": round(
            100 * sum(one["good"] for one in seeds) / sum(one["sessions"] for one in seeds), 1
        ),
        "least": min(shares),
        "median": median(shares),
        "most": max(shares),
        "seeds": seeds,
    }


if __name__ == "__main__":
    main()
