import pytest
import torch

from sllm_node.bench.scenarios import Race
from sllm_node.core.clock import ManualClock
from tests.unit.bench.rig import WEIGHTS, FixedCeiling, Slow, make_field


@pytest.fixture
def clock():
    return ManualClock()


def test_every_contestant_loads_once_a_round_and_the_first_round_does_not_count(
    files, tmp_path, clock
):
    fast, slow = Slow("fast", clock, 1.0, WEIGHTS), Slow("slow", clock, 3.0, WEIGHTS)
    result = Race(make_field(files, [fast, slow], tmp_path, clock=clock)).run("cached", 4)
    assert result.seconds("fast") == [1.0] * 4
    assert result.seconds("slow") == [3.0] * 4
    assert (len(fast.loads), fast.freed) == (5, 5)


def test_the_order_of_a_round_is_drawn_anew(files, tmp_path, clock):
    contestants = [Slow(name, clock, 1.0, WEIGHTS) for name in "abcd"]
    result = Race(make_field(files, contestants, tmp_path, clock=clock)).run("cached", 5)
    names = [sample.name for sample in result.samples]
    assert len({tuple(names[start : start + 4]) for start in range(0, 24, 4)}) > 1


def test_cached_loads_one_model_warm_and_random_draws_from_the_copies_cold(files, tmp_path, clock):
    one = Slow("one", clock, 1.0, WEIGHTS)
    race = Race(make_field(files, [one], tmp_path, clock=clock))
    race.run("cached", 2)
    assert set(one.loads) == {("tiny-0", True)}
    one.loads.clear()
    race.run("random", 8)
    assert set(one.loads) == {("tiny-0", False), ("tiny-1", False)}


def test_a_contestant_that_fails_is_told_and_the_others_go_on(files, tmp_path, clock):
    bad = Slow("bad", clock, 1.0, WEIGHTS, fails_at=2)
    good = Slow("good", clock, 1.0, WEIGHTS)
    result = Race(make_field(files, [bad, good], tmp_path, clock=clock)).run("cached", 3)
    assert result.problems == {"bad": "ValueError: out of breath"}
    assert len(bad.loads) == 2
    assert len(result.seconds("good")) == 3


def test_a_wrong_byte_is_a_problem_and_the_load_is_freed(files, tmp_path, clock):
    wrong = {**WEIGHTS, "a": WEIGHTS["a"] + torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.int16)}
    liar = Slow("liar", clock, 1.0, wrong)
    result = Race(make_field(files, [liar], tmp_path, clock=clock)).run("cached", 1)
    assert "1 tensors differ" in result.problems["liar"]
    assert liar.freed == 1


def test_a_missing_tensor_is_a_problem_unless_names_are_the_modules(files, tmp_path, clock):
    some = {"a": WEIGHTS["a"]}
    peer, module = Slow("peer", clock, 1.0, some), Slow("module", clock, 1.0, some)
    module.in_module_layout = True
    result = Race(make_field(files, [peer, module], tmp_path, clock=clock)).run("cached", 1)
    assert "1 are missing: b" in result.problems["peer"]
    assert result.compared["module"] == "1 tensors equal, 1 of other names"
    assert "module" not in result.problems


def test_ceilings_take_their_turn_where_they_say_something(files, tmp_path, clock):
    ceiling = FixedCeiling(files[0].size / 2)
    race = Race(make_field(files, [], tmp_path, [ceiling], clock))
    assert race.run("random", 2).seconds("plain reader") == [2.0, 2.0]
    assert race.run("cached", 2).seconds("plain reader") == []


def test_no_round_begins_that_would_end_after_the_deadline(files, tmp_path, clock):
    slow = Slow("slow", clock, 10.0, WEIGHTS)
    result = Race(make_field(files, [slow], tmp_path, clock=clock)).run("cached", 9, 35.0)
    assert len(result.seconds("slow")) == 2


def test_one_round_counts_even_after_the_deadline(files, tmp_path, clock):
    slow = Slow("slow", clock, 10.0, WEIGHTS)
    result = Race(make_field(files, [slow], tmp_path, clock=clock)).run("cached", 9, 0.0)
    assert len(result.seconds("slow")) == 1
