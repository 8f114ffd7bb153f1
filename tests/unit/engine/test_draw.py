from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.types import SamplingParameters
from sllm_node.engine import philox
from sllm_node.engine.adjustments import adjustments
from sllm_node.engine.draw import draw, sample, uniforms
from sllm_node.engine.sampling import Drawn, SamplingRow
from sllm_node.engine.sampling_plan import SamplingPlan
from tests.unit.engine import sampling_reference
from tests.unit.engine.sampling_reference import ReferenceRow

VOCABULARY = 50
words = st.integers(0, (1 << 64) - 1)
token_ids = st.integers(0, VOCABULARY - 1)
past = st.lists(token_ids, max_size=20).map(tuple)
floats = {
    "temperature": st.sampled_from([0.0, 1e-9, 0.3, 1.0, 5.0, 1e30]),
    "top_p": st.sampled_from([0.0, 0.1, 0.7, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    "presence_penalty": st.sampled_from([0.0, 0.0, -1.5, 0.7]),
    "frequency_penalty": st.sampled_from([0.0, 0.0, -0.3, 0.11]),
}
biases = st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=5)
parameters = st.builds(
    SamplingParameters, **floats, top_k=st.sampled_from([0, 0, 1, 3, VOCABULARY, VOCABULARY + 9]),
    logit_bias=biases.map(lambda given: tuple(given.items())), seed=words,
)  # fmt: skip
rows_of = st.lists(
    st.builds(
        ReferenceRow, parameters, words.map(lambda index: index >> 1),
        st.sampled_from([None, None, 0, 1, 5, VOCABULARY, 99]), past, past,
    ),
    min_size=1, max_size=9,
)  # fmt: skip


def ours(rows):
    return [
        SamplingRow(
            row.parameters, row.index, row.logprobs,
            adjustments(row.parameters, row.prompt, row.output),
        )
        for row in rows
    ]  # fmt: skip


def logits_of(seed, count, *, coarse=False):
    """Return random logits; coarse ones have equal values, as those of bfloat16 do."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, VOCABULARY, generator=generator) * 3
    return logits.to(torch.bfloat16) if coarse else logits


def drawn_padded(logits, rows, padded):
    plan = SamplingPlan(rows, logits.shape[-1], padded)
    more = torch.full((padded - len(rows), logits.shape[-1]), float("nan"), dtype=logits.dtype)
    packed = draw(torch.cat([logits, more]), torch.from_numpy(plan.buffer()), plan.variant)
    return plan.read(packed.numpy())


def values(drawn):
    """Return what is compared; of equally likely tokens any may be told."""
    return [(d.token, d.logprob, [value for _, value in d.top]) for d in drawn]


@settings(max_examples=300, deadline=None)
@given(rows_of, st.integers(0, 99), st.booleans(), st.integers(0, 7))
def test_a_mixed_batch_draws_what_the_reference_draws(rows, seed, coarse, padding):
    logits = logits_of(seed, len(rows), coarse=coarse)
    expected = values(sampling_reference.sample(logits, rows))
    assert values(sample(logits, ours(rows))) == expected
    assert values(drawn_padded(logits, ours(rows), len(rows) + padding)) == expected


@settings(max_examples=60, deadline=None)
@given(rows_of, st.integers(0, 99))
def test_a_row_draws_alone_what_it_draws_in_company(rows, seed):
    logits, made = logits_of(seed, len(rows), coarse=True), ours(rows)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(made)]
    assert sample(logits, made) == alone
    assert drawn_padded(logits, made, len(rows) + 3) == alone
    assert sample(logits.flip(0), made[::-1]) == alone[::-1]


@settings(max_examples=60, deadline=None)
@given(
    rows_of, st.integers(0, 99), st.lists(st.sampled_from([None, "nan", "inf", "-inf"]), min_size=9)
)
def test_rows_that_are_no_numbers_spoil_themselves_only(rows, seed, spoilt):
    logits, made = logits_of(seed, len(rows)), ours(rows)
    expected = sample(logits, made)
    for i, value in enumerate(spoilt[: len(rows)]):
        if value is not None:
            logits[i, slice(None) if value == "-inf" else i] = float(value)
            expected[i] = Drawn(-1)
    assert sample(logits, made) == expected
    assert values(sampling_reference.sample(logits, rows)) == values(expected)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=40))
def test_random_numbers_are_those_of_philox(pairs):
    seeds, indices = ([pair[k] for pair in pairs] for k in (0, 1))
    bits = [torch.from_numpy(np.array(w, np.uint64).view(np.int64)) for w in (seeds, indices)]
    assert uniforms(*bits).tolist() == philox.uniforms(seeds, indices).tolist()


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 0.0}],
)
def test_the_narrowest_settings_leave_the_most_likely_token(narrow):
    logits = logits_of(1, 40)
    rows = [SamplingRow(SamplingParameters(seed=s, **narrow), s) for s in range(40)]
    assert [d.token for d in sample(logits, rows)] == logits.argmax(-1).tolist()


def test_a_large_vocabulary_draws_what_the_reference_draws():
    size = 128_256
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(5)) * 4
    prompt, output = tuple(range(0, size, 3)), tuple(range(1000)) * 2
    settings_of: list[dict[str, Any]] = [
        {}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.0, "repetition_penalty": 1.2},
        {"min_p": 0.05, "frequency_penalty": 0.2}, {"presence_penalty": 0.5},
    ]  # fmt: skip
    rows = [
        ReferenceRow(SamplingParameters(seed=s, **given), 7 * s, 3, prompt, output)
        for s, given in enumerate(settings_of)
    ]
    expected = sampling_reference.sample(logits, rows)
    assert sample(logits, ours(rows)) == expected
    assert drawn_padded(logits, ours(rows), 8) == expected


def test_a_bias_that_overflows_spoils_no_other_row_and_stays_in_the_vocabulary():
    logits = logits_of(2, 2)
    logits[0, 4] = 3e38
    biased = SamplingParameters(logit_bias=((4, 3e38),), seed=9)
    rows = [ReferenceRow(biased, 0), ReferenceRow(SamplingParameters(seed=9), 0)]
    assert sample(logits, ours(rows)) == sampling_reference.sample(logits, rows)


def test_what_was_drawn_lies_first_in_the_result_for_the_next_step_to_use():
    logits = logits_of(3, 4)
    rows = [SamplingRow(SamplingParameters(seed=s), s, logprobs=2) for s in range(3)]
    plan = SamplingPlan(rows, VOCABULARY, 4)
    packed = draw(logits, torch.from_numpy(plan.buffer()), plan.variant)
    assert packed.dtype == torch.int64
    assert packed[:3].tolist() == [d.token for d in plan.read(packed.numpy())]
