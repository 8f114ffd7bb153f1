"""The simulator as users run it: whole runs of a small cluster."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sllm_node.sim.description import Chaos, Description, load_description
from sllm_node.sim.runs import CONTESTANTS, run
from sllm_node.sim.trace import Gamma, gamma_rows, read_rows, scaled

ROOT = Path(__file__).parent.parent.parent
BURSTY = Gamma(rate=8, cv=8, duration_s=60)


@pytest.fixture(scope="module")
def described() -> Description:
    return load_description(ROOT / "configs" / "simulation.toml")


@pytest.mark.parametrize("name", CONTESTANTS)
def test_one_seed_gives_one_digest(described, name):
    rows = gamma_rows(BURSTY, 3)
    assert run(described, rows, name, 3) == run(described, rows, name, 3)


def test_another_seed_gives_another_digest(described):
    rows = gamma_rows(BURSTY, 3)
    assert run(described, rows, "ours", 3).digest != run(described, rows, "ours", 4).digest


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_request_of_the_trace_ends_once(described, name):
    text = (ROOT / "tests" / "data" / "azure_code_excerpt.csv").read_text()
    rows = scaled(read_rows(text.splitlines(), "excerpt"), 2.5, 1)
    report = run(described, rows, name, 1)
    counts = report.counts
    assert report.requests == len(rows) == counts["arrive"]
    assert counts["finish"] + counts.get("timeout", 0) == len(rows)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_crashes_lose_no_request(described, name):
    chaos = msgspec.structs.replace(
        described, chaos=Chaos(crashes_per_node_hour=120.0, restart_s=5.0)
    )
    rows = gamma_rows(replace(BURSTY, rate=15, duration_s=120), 5)
    report = run(chaos, rows, name, 5)
    assert report.counts["crash"] > 10
    assert report.counts["interrupt"] > 0
    assert report.requests == len(rows)
