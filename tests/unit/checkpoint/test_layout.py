from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.layout import TensorSpec, plan_layout

sizes = st.lists(st.integers(0, 30_000), max_size=30)


def plan(sizes, shard_bytes):
    return plan_layout([TensorSpec(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)], shard_bytes)


@given(sizes, st.integers(1, 10))
def test_tensors_keep_their_order_and_never_overlap(sizes, pages):
    places = [(e.shard, e.offset, e.size) for e in plan(sizes, pages * 4096).tensors]
    assert [size for _, _, size in places] == sizes
    for (shard, offset, size), (next_shard, next_offset, _) in pairwise(places):
        assert (next_shard, next_offset) >= (shard, offset + size) or next_shard == shard + 1


@given(sizes, st.integers(1, 10))
def test_tensors_are_aligned_and_shards_are_whole_pages(sizes, pages):
    layout = plan(sizes, pages * 4096)
    assert all(entry.offset % 256 == 0 for entry in layout.tensors)
    assert all(size % 4096 == 0 and size > 0 for size in layout.shard_sizes)
    assert all(e.offset + e.size <= layout.shard_sizes[e.shard] for e in layout.tensors)


@given(sizes, st.integers(1, 10))
def test_a_shard_above_the_limit_holds_one_tensor_with_bytes(sizes, pages):
    layout = plan(sizes, pages * 4096)
    for number, size in enumerate(layout.shard_sizes):
        held = [e for e in layout.tensors if e.shard == number and e.size]
        assert size <= pages * 4096 or len(held) == 1


def test_a_model_without_tensors_has_one_page():
    assert plan([], 4096).shard_sizes == (4096,)


def test_a_tensor_that_does_not_fit_begins_the_next_shard():
    layout = plan([4000, 200, 9000, 10], 4096)
    assert [(e.shard, e.offset) for e in layout.tensors] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert layout.shard_sizes == (4096, 4096, 12288, 4096)
    assert layout.size == 24576
