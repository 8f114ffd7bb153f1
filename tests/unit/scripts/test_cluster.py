"""The benchmark of real clusters judges what it claims to judge."""

import json
from itertools import pairwise
from typing import Any

import pytest

from scripts.bench.cluster_load import Answer, Request, compared, requests_of_trace
from scripts.bench.cluster_logs import Logs, Started, errors
from scripts.bench.cluster_noise import RunDelays, waited_s

REQUEST = Request("r0", 0.0, "m", "p", 3)
RIGHT = ["a", "b", "c"]


def answer(tokens, broken=(), **changes):
    given = {"finish": "length", "usage": {"completion_tokens": len(tokens)}, **changes}
    parts = [Answer(tokens=part) for part in broken]
    return Answer(tokens=tokens, text="".join(tokens), broken=parts, **given)


def judged(one):
    found = compared([REQUEST], {"r0": one}, {"r0": answer(RIGHT)})
    return found["failed"], found["wrong_tokens"], found["of_them_wrong_up_to_there"]


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (answer(RIGHT), (0, 0, 0)),
        (answer(["a", "b"]), (0, 1, 0)),
        (answer(["a", "b", "b", "c"]), (0, 1, 0)),
        (answer(["a", "c", "b"]), (0, 1, 0)),
        (answer(RIGHT, usage={"completion_tokens": 4}), (0, 1, 0)),
        (answer(RIGHT, error="503"), (1, 0, 0)),
        (answer(["a"], finish=None), (1, 0, 0)),
        (answer(RIGHT, broken=[["a"], ["a", "b"]]), (0, 0, 0)),
        (answer(RIGHT, broken=[["b"]]), (0, 0, 1)),
    ],
)
def test_lost_repeated_and_exchanged_tokens_are_found(one, verdict):
    assert judged(one) == verdict


def test_requests_of_a_seed_are_the_same_and_fit_tiny_models():
    models = ["m0", "m1", "m2"]
    found = requests_of_trace(500, models, 3, 1.0)
    assert found == requests_of_trace(500, models, 3, 1.0)
    assert len({request.name for request in found}) == 500
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(found))
    assert all(len(request.prompt) + request.tokens < 512 for request in found)
    assert {request.model for request in found} == set(models)


def test_logs_tell_when_loads_began_and_how_good_estimates_were(tmp_path):
    why = "b cpu: there is room to load it; starts in 0.1 s (wait 0.000 s, load 0.1 s from nvme)"
    placed = {"event": "request placed", "node": "b", "way": "load", "why": why, "model": "m"}
    started = {"event": "session started", "node": "b", "model": "m"}
    lines: dict[str, list[dict[str, Any]]] = {
        "a": [
            {"time": "2026-01-01T00:00:00.010+00:00", **placed},
            {"time": "2026-01-01T00:00:00.120+00:00", **started, "expected_s": 0.1, "startup_s": 0.11},
        ],
        "b": [
            {"time": "2026-01-01T00:00:00.013+00:00", "event": "load started", "model": "m"},
            *[{"time": "2026-01-01T00:00:00.100+00:00", "event": "load finished"}] * 5,
        ],
    }  # fmt: skip
    logs = Logs()
    for node, told in lines.items():
        path = tmp_path / node
        rows = [{"level": "info", "request": "r0-0-tag", **line} for line in told]
        path.write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows))
        logs.read(node, path)
    sent_at = 1767225600.010
    found = logs.report({"r0-0": sent_at})
    assert found["arrival_to_load_begun_ms"]["load peer, tokenizer new"]["median"] == 3.0
    assert found["startup_ms_by_way"]["load nvme peer"]["median"] == 110.0
    assert found["estimates"]["load nvme peer"]["error_ms"]["median"] == 10.0
    assert found["estimates"]["all"]["share_good"] == 1.0


def test_an_estimate_is_good_within_a_fifth_or_five_milliseconds():
    assert errors([Started(0.000, 0.004)])["share_good"] == 1.0
    assert errors([Started(0.080, 0.100)])["share_good"] == 1.0
    assert errors([Started(0.080, 0.101)])["share_good"] == 0.0


def test_what_the_machine_made_longer_is_told_apart_and_excuses_nothing_that_came_too_soon():
    late, soon = Started(0.010, 0.030, 0.016), Started(0.030, 0.010, 0.016)
    assert errors([late])["share_good"] == errors([soon])["share_good"] == 0.0
    assert errors([late])["share_good_without_run_delays"] == 1.0
    assert errors([soon])["share_good_without_run_delays"] == 0.0


def test_errors_are_told_by_part_with_the_part_that_spoils_most():
    ones = [
        Started(0.0, 0.012, off_s={"queue": 0.010, "load": 0.002, "forward": 0.0}),
        Started(0.0, 0.012, off_s={"queue": -0.002, "load": 0.002, "forward": 0.012}),
        Started(0.0, 0.002, off_s={"queue": 0.0, "load": 0.0, "forward": 0.002}),
    ]
    parts = errors(ones)["parts"]
    assert {part: told["most_of_bad"] for part, told in parts.items()} == {
        "queue": 1, "load": 0, "forward": 1,
    }  # fmt: skip
    assert parts["queue"]["bias_ms"] == round(8 / 3, 2)


def test_waits_for_a_processor_count_between_two_times_over_a_nodes_lives():
    delays = RunDelays()
    for process, wait_s, at in ((7, 1.0, 10.0), (7, 3.0, 11.0), (8, 0.0, 12.0), (8, 0.5, 13.0)):
        delays.take("a", process, wait_s, at)
    assert delays.between("a", 10.0, 11.0) == 2.0
    assert delays.between("a", 10.25, 10.75) == 1.0
    assert delays.between("a", 11.0, 13.0) == 0.5
    assert delays.between("b", 10.0, 11.0) == 0.0


def test_the_kernel_tells_a_threads_wait_second():
    assert waited_s("30001 2500000000 7\n") == 2.5
