"""Pieces of prompts beside sessions that decode follow what steps take."""

import pytest

from sllm_node.engine.beside import Beside

USUAL = 128


def took_s(decoding, prompt, before, *, step_s=0.005):
    """Return what a step of an 8B model on an H200 takes, roughly: rows, and what lies before."""
    rows = -(-(decoding + prompt) // 64) * 64
    attention = before * (1e-7 + 2e-9 * prompt) if prompt else 0.0
    return step_s + (rows - 64) * 1e-5 + attention


def run(beside, *, prompt=32768, decoding=32, noise=lambda step: 0.0):
    """Return the times of a prompt's steps and the lengths of its pieces."""
    for _ in range(8):
        beside.learn(0, took_s(decoding, 0, 0))
    done, times, pieces = 0, [], []
    while done < prompt:
        piece = beside.tokens(decoding, USUAL)
        seconds = took_s(decoding, piece, done) + noise(len(times))
        beside.learn(piece, seconds)
        times.append(seconds)
        pieces.append(piece)
        done += piece
    return times, pieces


def test_steps_with_a_long_prompt_take_hardly_more_than_the_ratio():
    times, pieces = run(Beside(USUAL, 2.0))
    unlimited, _ = run(Beside(USUAL, 0.0))
    assert max(unlimited) > 3 * 0.005
    assert max(times) < 1.05 * 2 * 0.005
    assert max(pieces) > USUAL  # filled up to what costs the same
    assert min(pieces) < USUAL


def test_a_piece_has_a_quarter_of_the_usual_length_whatever_lies_before():
    _, pieces = run(Beside(USUAL, 2.0), prompt=200_000)
    assert pieces[-1] == min(pieces) == USUAL // 4


def test_one_late_step_halves_the_length_at_most_and_it_grows_again():
    beside = Beside(USUAL, 2.0)
    beside.learn(0, 0.005)
    for _ in range(8):
        beside.learn(160, 0.01)
    assert beside.tokens(32, USUAL) == 160
    beside.learn(160, 0.5)
    assert beside.tokens(32, USUAL) == 96
    for _ in range(4):
        beside.learn(96, 0.007)
    assert beside.tokens(32, USUAL) == 160


def test_after_a_long_prompt_the_next_one_has_the_usual_length_soon():
    beside = Beside(USUAL, 2.0)
    run(beside, prompt=100_000)
    _, pieces = run(beside, prompt=2048)
    assert pieces[0] == USUAL // 4
    assert 160 in pieces[:6]


def test_nothing_is_learnt_from_a_step_that_was_over_before_it_was_looked_for():
    beside = Beside(USUAL, 2.0)
    beside.learn(0, 0.005)
    beside.learn(160, 0.0)
    assert beside.tokens(32, USUAL) == 160


def test_without_a_step_that_only_decoded_the_usual_length_counts():
    beside = Beside(USUAL, 2.0)
    assert beside.tokens(32, USUAL) == 160
    beside.learn(160, 0.05)
    assert beside.tokens(32, USUAL) == 160


@pytest.mark.parametrize(("decoding", "usual", "tokens"), [(4, 3, 3), (3, 9, 9), (64, 192, 192)])
def test_short_pieces_are_not_filled_up(decoding, usual, tokens):
    assert Beside(usual, 0.0).tokens(decoding, usual) == tokens


def test_more_sessions_that_decode_than_a_step_is_filled_up_to_leave_what_is_known():
    beside = Beside(USUAL, 2.0)
    for _ in range(40):
        beside.learn(0, 0.01)
        beside.learn(beside.tokens(128, 384), 0.1)
    assert beside.tokens(128, 384) == USUAL // 4
