from itertools import combinations, product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.library.overlap import Extent, overlapping


def extent(name, start, sizes, steps, item=4, device="cpu"):
    return Extent(name, device, start, item, tuple(sizes), tuple(steps))


def addresses(one):
    """Return the addresses of all bytes."""
    indices = product(*(range(size) for size in one.sizes))
    starts = (sum(i * step for i, step in zip(at, one.steps, strict=True)) for at in indices)
    return {one.start + start + byte for start in starts for byte in range(one.item)}


def names_of(pair):
    return pair and {one.name for one in pair}


@st.composite
def extents(draw):
    item = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    steps = draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    start = draw(st.integers(0, 20)) * item
    return extent("", start, sizes, [step * item for step in steps], item)


@given(st.lists(extents(), max_size=4))
def test_what_is_said_to_be_apart_has_no_byte_in_common(found):
    if overlapping(found) is None:
        assert all(not addresses(a) & addresses(b) for a, b in combinations(found, 2))


@given(extents())
def test_a_solid_tensor_has_every_byte_unless_it_has_some_twice(one):
    found = addresses(one)
    assert one.start <= min(found) <= max(found) == one.end - 1
    if one.is_solid:
        twice = prod(n for n, step in zip(one.sizes, one.steps, strict=True) if step) * one.item
        assert len(found) == one.length() or len(found) < twice


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, (10, 5), (40, 4)), (20, (10, 5), (40, 4))],  # columns
        [(0, (5,), (8,)), (4, (5,), (8,))],  # every other one
        [(12 * n, (4, 3), (36, 4)) for n in range(3)],  # q, k and v of each head
        [(0, (2, 2, 3), (60, 12, 4)), (24, (2, 3, 3), (60, 12, 4))],  # blocks within planes
        [(0, (10, 5), (40, 4)), (40 * 10, (3,), (4,)), (20, (10, 5), (40, 4))],  # one behind both
    ],
)
def test_slices_of_one_tensor_are_apart(cuts):
    assert overlapping([extent(str(n), *cut) for n, cut in enumerate(cuts)]) is None


def test_the_two_that_overlap_are_named():
    left, right = extent("left", 0, (4, 2), (16, 4)), extent("right", 8, (4, 2), (16, 4))
    wide = extent("wide", 4, (4, 2), (16, 4))
    row, far = extent("row", 56, (2,), (4,)), extent("far", 56, (2,), (4,), device="cuda:0")
    assert overlapping([left, right, far]) is None
    assert names_of(overlapping([left, right, row])) == {"right", "row"}
    assert names_of(overlapping([right, left, wide])) == {"left", "wide"}


def test_many_columns_are_told_apart_at_once():
    columns = [extent(str(n), 4 * n, (3,), (4 * 5000,)) for n in range(5000)]
    assert overlapping(columns) is None
