"""The simulator as users run it: whole runs of a small cluster."""

from collections import Counter, defaultdict
from dataclasses import replace
from io import StringIO
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


CROWDED = Gamma(rate=30, cv=8, duration_s=60, tokens_out=512)


def events(described, name):
    """Return the report of a crowded run and what happened in it, word by word."""
    log = StringIO()
    report = run(described, gamma_rows(CROWDED, 7), name, 7, log)
    return report, [line.split() for line in log.getvalue().splitlines()]


def test_sessions_of_one_replica_all_move_to_one_place(described):
    report, lines = events(described, "ours")
    at, went = {}, defaultdict(set)
    sizes = Counter()
    for _, kind, *what in lines:
        if kind == "begin":
            at[what[0]] = what[1]
        if kind == "migrate":
            source, at[what[0]] = at[what[0]], what[1]
            went[source].add(what[1])
            sizes[source] += 1
    assert report.counts["migrate"] == sum(sizes.values()) == report.pauses
    assert max(sizes.values()) > 1
    assert {len(places) for places in went.values()} == {1}


def test_without_moves_no_running_session_is_disturbed(described):
    report, _ = events(described, "ours-without-moves")
    assert report.pauses == 0
    assert not {"migrate", "preemption", "decision_migrate"} & report.counts.keys()


def test_with_preemption_in_the_place_of_moves_a_session_is_stopped_once_at_most(described):
    report, lines = events(described, "ours-preempting")
    stopped = Counter(what[0] for _, kind, *what in lines if kind == "interrupt")
    assert report.counts["preemption"] == sum(stopped.values()) > 0
    assert max(stopped.values()) == 1
    assert "migrate" not in report.counts
