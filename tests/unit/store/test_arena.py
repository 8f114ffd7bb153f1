import pytest

from sllm_node.core.types import ModelId
from sllm_node.store.arena import Arena

A, B = ModelId("a"), ModelId("b")


@pytest.fixture
def arena():
    made = Arena(granularity=4)
    made.open(A, (0, 42), 16)
    made.open(B, (10, 20), 16)
    return made


def fill(arena, model):
    arena.hold(model)
    pieces = arena.missing(model)
    arena.mapped(model, pieces)
    arena.filled(model)
    return pieces


def test_a_row_takes_whole_grains_and_holds_what_belongs_to_it(arena):
    assert arena.memory_of(A, (0, 1, 2)) == 16 + 16 + 12
    assert fill(arena, A) == (0, 1, 2)
    assert arena.filled_bytes(A) == 42
    assert arena.wants(A) == ()
    assert arena.cached_bytes == 0


def test_what_nobody_holds_is_given_up_from_the_tail(arena):
    fill(arena, A)
    assert arena.give_up(100) == []
    arena.release(A)
    assert arena.cached_bytes == 44
    assert arena.give_up(13) == [(A, (2, 1))]
    assert arena.wants(A) == ((16, 42),)
    assert arena.filled_bytes(A) == 16
    assert arena.missing(A) == (1, 2)


def test_what_was_held_longest_ago_goes_first(arena):
    for model in (A, B, A):
        fill(arena, model)
        arena.release(model)
    assert arena.give_up(1) == [(B, (0,))]
    assert arena.give_up(100) == [(A, (2, 1, 0))]
    assert arena.give_up(1) == []


def test_pieces_whose_bytes_did_not_arrive_are_forgotten(arena):
    fill(arena, A)
    arena.release(A)
    arena.give_up(1)
    arena.hold(A)
    arena.mapped(A, (2,))
    arena.release(A)
    assert arena.unfilled(A) == (2,)
    assert arena.filled_bytes(A) == 32


def test_a_part_of_a_checkpoint_counts_in_the_checkpoints_bytes(arena):
    assert arena.is_row(B, 10, 20)
    assert not arena.is_row(B, 0, 20)
    assert arena.wants(B) == ((10, 20),)
    assert arena.start_of(B, 0) == 10
    assert arena.start_of(B, None) == 20


def test_separate_gaps_are_wanted_separately(arena):
    arena.mapped(A, (0, 1, 2))
    arena.hold(A)
    arena.filled(A)
    arena.release(A)
    assert arena.give_up(1) == [(A, (2,))]
    assert arena.empty(A) == (0, 1)
    assert arena.wants(A) == ((0, 42),)


def test_a_row_in_use_is_not_closed(arena):
    fill(arena, A)
    with pytest.raises(AssertionError):
        arena.close(A)
    arena.release(A)
    arena.empty(A)
    arena.close(A)
    assert not arena.knows(A)
