"""Matrices are taken as one only if they lie side by side."""

from typing import Any

import torch

from sllm_node.engine import joined

MEMORY = torch.arange(200.0)


def joined_rows(matrices) -> Any:
    return joined.joined_rows(matrices)


def joined_columns(parts) -> Any:
    return joined.joined_columns(parts)


def test_matrices_that_follow_each_other_are_one():
    one, two = MEMORY[8:28].view(4, 5), MEMORY[28:38].view(2, 5)
    assert torch.equal(joined_rows([one, two]), MEMORY[8:38].view(6, 5))


def test_matrices_with_something_between_stay_apart():
    assert joined_rows([MEMORY[8:28].view(4, 5), MEMORY[30:40].view(2, 5)]) is None
    assert joined_rows([MEMORY[28:38].view(2, 5), MEMORY[8:28].view(4, 5)]) is None


def test_matrices_of_other_widths_or_memory_stay_apart():
    assert joined_rows([MEMORY[8:28].view(4, 5), MEMORY[28:40].view(3, 4)]) is None
    assert joined_rows([MEMORY[8:28].view(4, 5), MEMORY[28:38].clone().view(2, 5)]) is None
    assert joined_rows([MEMORY[:40].view(4, 10)[:, :5], MEMORY[40:60].view(4, 5)]) is None


def test_columns_that_follow_each_other_are_one():
    whole = MEMORY.view(10, 20)
    parts = torch.tensor_split(whole[:, 2:], (7, 10), 1)
    assert torch.equal(joined_columns(parts), whole[:, 2:])
    joined_columns(parts[:2]).zero_()
    assert not whole[:, 2:12].any()


def test_columns_of_one_row_are_one_only_within_it():
    parts = MEMORY.view(1, 200)[:, :50], MEMORY.view(1, 200)[:, 50:60]
    assert joined_columns(parts).shape == (1, 60)


def test_columns_of_several_matrices_stay_apart():
    assert joined_columns([MEMORY[:20].view(4, 5), MEMORY[20:40].view(4, 5)]) is None
    assert joined_columns([MEMORY.view(10, 20)[:, :4], MEMORY.view(10, 20)[:, 5:9]]) is None
