import numpy as np
import pytest

from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import adjustments
from sllm_node.engine.sampling import SamplingRow
from sllm_node.engine.sampling_plan import ADJUSTED_MIN, SamplingPlan, Variant

GREEDY = SamplingParameters(temperature=0.0)
PLAIN = SamplingParameters(seed=(1 << 64) - 1)
TOP_K = SamplingParameters(top_k=4)
BIASED = SamplingParameters(temperature=0.0, logit_bias=((3, 1.0),))


def row(parameters, logprobs=None):
    return SamplingRow(parameters, 0, logprobs, adjustments(parameters, (), ()))


def variant(*rows, padded=None):
    return SamplingPlan(rows, 100, padded).variant


def test_a_greedy_batch_needs_nothing_from_the_host():
    assert variant(row(GREEDY), row(GREEDY)) == Variant(2, 0, 0, 0, 0, 0)
    assert variant(row(GREEDY)).size == 0


def test_every_row_costs_only_what_it_asks_for():
    made = variant(row(GREEDY), row(PLAIN), row(TOP_K), row(BIASED), row(GREEDY, 0), row(PLAIN, 5))
    assert made == Variant(6, 2, 1, 1, 2, 5)


def test_padded_batches_of_one_kind_share_a_variant():
    one = variant(row(PLAIN), row(TOP_K, 3), row(BIASED), padded=8)
    other = variant(*[row(PLAIN)] * 4, *[row(TOP_K, 4)] * 2, row(BIASED), row(BIASED), padded=8)
    assert one == other == Variant(8, 8, 8, ADJUSTED_MIN, 8, 4)
    assert variant(row(GREEDY), padded=8) == Variant(8, 0, 0, 0, 0, 0)


def test_padding_repeats_a_row_that_is_there():
    plan = SamplingPlan([row(GREEDY), row(PLAIN), row(TOP_K)], 100, 4)
    buffer = plan.buffer()
    arrays = {f.name: buffer[f.start : f.end].view(f.dtype) for f in plan.variant.fields()}
    assert arrays["row"].tolist() == [1] * 4 + [2] * 4
    assert arrays["seed"].view(np.uint64).tolist() == [(1 << 64) - 1] * 4 + [0] * 4


def test_the_arrays_lie_behind_each_other_aligned_to_their_numbers():
    fields = list(Variant(7, 3, 2, 5, 1, 1).fields())
    assert [f.start for f in fields[1:]] == [f.end for f in fields[:-1]]
    assert all(f.start % np.dtype(f.dtype).itemsize == 0 for f in fields)


def test_a_plan_fills_memory_that_is_given():
    plan = SamplingPlan([row(PLAIN), row(BIASED)], 100)
    memory = np.zeros(plan.variant.size + 16, np.uint8)
    plan.write(memory[8:-8])
    assert memory[8:-8].tolist() == plan.buffer().tolist()
    assert not memory[:8].any()
    assert not memory[-8:].any()


def test_a_row_whose_changes_were_forgotten_is_a_mistake():
    with pytest.raises(AssertionError, match="adjustments"):
        SamplingPlan([SamplingRow(BIASED, 0)], 100)
