import csv
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.config import ModelConfig, ScheduleConfig
from sllm_node.core.types import ModelId
from tests.sim.schedule_world import EVICTION_S, Arrival, World

EXCERPT = Path(__file__).parents[1] / "data" / "azure_code_excerpt.csv"
NAMES = [ModelId(name) for name in ("a", "b", "c")]
SIZES = dict.fromkeys(NAMES, 4)
LOAD_S = 2.0
MAX_WAIT_S = 10.0
PREFILL_S_PER_TOKEN = 1e-4
DECODE_S_PER_TOKEN = 0.03


def trace() -> list[Arrival]:
    """Real arrivals, spread over three models by a property of the request."""
    rows = list(csv.DictReader(EXCERPT.read_text(encoding="utf-8").splitlines()))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival(
            (time - times[0]).total_seconds(),
            NAMES[int(row["ContextTokens"]) % len(NAMES)],
            int(row["ContextTokens"]) * PREFILL_S_PER_TOKEN
            + int(row["GeneratedTokens"]) * DECODE_S_PER_TOKEN,
        )
        for time, row in zip(times, rows, strict=True)
    ]


def play(arrivals, capacity=4, models=None, sizes=SIZES, **config):
    world = World(
        ScheduleConfig(**({"max_wait_s": MAX_WAIT_S} | config)),
        sizes,
        capacity=capacity,
        load_s=LOAD_S,
        models=models,
    )
    return world.play(arrivals)


def strict_fifo_loads(arrivals):
    """One model at a time, requests in order of arrival: a load at every change of model."""
    return 1 + sum(former.model != latter.model for former, latter in pairwise(arrivals))


def test_on_a_real_trace_grouping_needs_a_fraction_of_the_loads_of_strict_order():
    arrivals = trace()
    outcome = play(arrivals)
    assert len(outcome.finished) == len(arrivals) == 300
    assert outcome.loads * 4 <= strict_fifo_loads(arrivals)


def test_a_longer_maximum_wait_means_fewer_loads():
    patient, hasty = play(trace(), max_wait_s=20.0), play(trace(), max_wait_s=0.0)
    assert patient.loads < hasty.loads
    assert patient.end < hasty.end


def test_where_all_models_fit_each_is_loaded_once():
    assert play(trace(), capacity=12).loads == 3


def test_the_same_trace_gives_the_same_record():
    assert play(trace()).log == play(trace()).log


def test_alternating_arrivals_wait_for_one_turn_of_the_other_model_at_most():
    arrivals = [Arrival(i * 0.5, NAMES[i % 2], 1.0) for i in range(400)]
    outcome = play(arrivals)
    assert len(outcome.finished) == 400
    turn_s = EVICTION_S + LOAD_S + 1.0  # the last session drains, eviction, load
    # Overdue, then a turn; the other model may have been loading just for its own overdue request.
    assert max(outcome.waits.values()) <= MAX_WAIT_S + 2 * turn_s
    assert outcome.loads <= 400 * 0.5 / MAX_WAIT_S + 3


def test_a_stream_of_higher_priority_does_not_starve_a_lower_one():
    stream = [Arrival(i * 0.5, NAMES[0], 1.0) for i in range(200)]
    outcome = play(
        sorted([*stream, Arrival(1.1, NAMES[1], 1.0)], key=lambda arrival: arrival.at),
        models={"a": ModelConfig(priority=5)},
    )
    assert len(outcome.finished) == 201
    assert outcome.loads == 3
    assert max(outcome.waits.values()) <= MAX_WAIT_S + 2 * (EVICTION_S + LOAD_S + 1.0)


arrival = st.builds(
    Arrival,
    st.floats(0, 60),
    st.sampled_from(NAMES),
    st.floats(0.01, 5.0),
    st.integers(-1, 1),
)


@pytest.mark.parametrize("capacity", [4, 8])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(arrivals=st.lists(arrival, max_size=60))
def test_every_request_is_granted_within_a_bound(capacity, arrivals):
    outcome = play(sorted(arrivals, key=lambda arrival: arrival.at), capacity)
    check_waits(arrivals, outcome)


SPLIT = {"a": 4, "b": {"x": 4, "y": 4}, "c": {"y": 5, "x": 1}}


@pytest.mark.parametrize("capacity", [{"x": 4, "y": 5}, {"x": 8, "y": 6}, {"x": 5, "y": 9, "z": 4}])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(arrivals=st.lists(arrival, max_size=60))
def test_models_split_over_devices_have_the_same_bound(capacity, arrivals):
    sizes = {ModelId(name): size for name, size in SPLIT.items()}
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at)
    check_waits(arrivals, play(arrivals, capacity, sizes=sizes))


def check_waits(arrivals, outcome):
    assert len(outcome.finished) == len(arrivals)
    # Overdue requests go in order of arrival. Before one's turn come, at most: the rest of the turn
    # under way and one turn of each model, each of which serves 8 at once.
    turns = 2 * len(NAMES) + len(arrivals) // 8
    turn_s = 5.0 + EVICTION_S + LOAD_S
    assert max(outcome.waits.values(), default=0.0) <= MAX_WAIT_S + turns * turn_s
    assert not outcome.refused
