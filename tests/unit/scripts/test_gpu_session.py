"""What the scripts for GPU machines do besides measuring: time is shared out, logs become a table."""

import argparse

from scripts import gpu_session
from scripts.bench.cluster_gpu import way_of


def test_what_comes_later_keeps_its_time():
    asked = argparse.Namespace(chaos_minutes=2.0)
    assert gpu_session.kept_s(asked, ["engine", "chaos"]) == 150 + 120 + gpu_session.CHAOS_MORE_S
    assert gpu_session.kept_s(asked, []) == 0


def test_the_table_has_what_failed_and_the_last_line():
    log = "....F\n\nFAILED tests/gpu/test_x.py::test_y - Wrong\n1 failed, 4 passed in 3.00s\n"
    assert gpu_session.found_in(log, "tests") == log.splitlines()[2:]


def test_results_of_the_engine_lose_their_rounds():
    log = 'Loading\ndecode         {"ms_per_token": 4.25001, "rounds_ms": [1, 2]}\nbatch "no time left"\n'
    assert gpu_session.found_in(log, "engine") == [
        'decode         {"ms_per_token": 4.25}',
        'batch          "no time left"',
    ]


def test_a_log_of_another_kind_shows_its_end():
    log = "a\nb\nTraceback\nValueError: x\n"
    assert gpu_session.found_in(log, "engine") == ["b", "Traceback", "ValueError: x"]


def test_a_way_says_from_where_and_at_whom():
    line = {"way": "load", "why": "soonest (load from dram)", "node": "a", "on": "b"}
    assert way_of(line) == "load dram peer"
    assert way_of({**line, "way": "serve", "why": "resident", "on": "a"}) == "serve here"
