import pytest

from sllm_node.cluster.pace import Pace
from sllm_node.cluster.state import ResumeFit


def pace(step_s, fit, *, is_replayed=False):
    made = Pace()
    made.came(10, 10 * step_s)
    made.aim(fit, is_replayed=is_replayed)
    return made


def rounds(made, gap):
    """Return the gaps of all rounds and the last one."""
    gaps = [gap]
    while not made.is_last(gaps[-1]) and len(gaps) < 20:
        took_s = made.wait_s(gaps[-1])
        made.resumed(gaps[-1], took_s)
        gaps.append(round(took_s / made.step_s))
    return gaps


def test_with_a_fast_prefill_gaps_shrink_until_nobody_notices():
    gaps = rounds(pace(0.01, ResumeFit(1e-3, 0.005)), 8000)
    assert gaps == sorted(gaps, reverse=True)
    assert pace(0.01, ResumeFit(1e-3, 0.005)).wait_s(gaps[-1]) <= 0.015
    assert len(gaps) <= 5


def test_with_a_high_fixed_cost_rounds_stop_when_they_bring_nothing():
    assert len(rounds(pace(0.01, ResumeFit(1e-4, 0.2)), 8000)) <= 4


def test_where_resuming_is_no_faster_than_decoding_no_round_is_worth_while():
    assert pace(0.02, ResumeFit(1e-4, 0.01), is_replayed=True).is_last(1000)


@pytest.mark.parametrize("gap", [0, 1])
def test_no_gap_and_a_gap_of_one_token_are_the_end_however_slow_the_destination_and_large_the_round_before(
    gap,
):
    made = pace(0.001, ResumeFit(1e-9, 9.0))
    assert not made.is_last(2)
    assert made.is_last(gap)
    made.resumed(8000, 9.0)
    assert not made.is_last(2)
    assert made.is_last(gap)


def test_a_destination_slower_than_it_said_is_believed_by_what_it_does():
    made = pace(0.02, ResumeFit(1e-4, 0.001))
    assert made.is_last(100)
    made.resumed(1000, 0.5)
    assert not made.is_last(100)
    assert made.wait_s(1000) == pytest.approx(0.5)


def test_a_gap_that_a_round_made_much_smaller_gets_another_one_whatever_the_line_says():
    made = pace(0.007, ResumeFit(2e-5, 0.05))
    made.resumed(8192, 1.3)
    assert not made.is_last(215)
    made.resumed(215, 0.045)
    assert not made.is_last(7)
    made.resumed(7, 0.02)
    assert made.is_last(6)


def test_a_new_destination_begins_with_what_it_said():
    made = pace(0.02, ResumeFit(1e-4, 0.03))
    made.resumed(10, 1.0)
    assert made.is_last(10)
    made.aim(ResumeFit(1e-4, 0.03), is_replayed=False)
    assert not made.is_last(10)


def test_a_destination_whose_tokens_take_as_long_as_steps_is_given_all_at_once():
    made = pace(0.02, ResumeFit(1e-4, 0.001))
    made.resumed(1000, 20.0)
    assert made.is_last(100)
