import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import Adjuster, adjustments

tokens = st.lists(st.integers(0, 300), max_size=200)


def plainly(made):
    return sorted(zip(*(a.tolist() for a in (made.tokens, made.factors, made.minus, made.biases)), strict=True))  # fmt: skip


@given(tokens, tokens, st.lists(st.integers(0, 200), max_size=5), st.floats(0.5, 2))
def test_what_grew_step_by_step_is_what_is_counted_at_once(prompt, output, cuts, penalty):
    rules = SamplingParameters(
        repetition_penalty=penalty, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias=((3, 1.5), (299, -2.0)),
    )  # fmt: skip
    grown = Adjuster(rules, tuple(prompt))
    for cut in sorted(cuts):
        grown.after(output[:cut])
    expected = adjustments(rules, tuple(prompt), output)
    assert expected is not None
    assert plainly(grown.after(output)) == plainly(expected)


def test_each_token_is_there_once_with_all_that_changes_about_it():
    rules = SamplingParameters(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias=((7, 1.5), (9, -2.0)),
    )  # fmt: skip
    made = adjustments(rules, (5, 7, 5), [7, 7, 8])
    assert made is not None
    assert plainly(made) == [(5, 2, 0, 0), (7, 2, 1, 1.5), (8, 2, 0.75, 0), (9, 1, 0, -2)]


def test_the_prompt_does_not_matter_to_presence_and_frequency():
    made = adjustments(SamplingParameters(presence_penalty=0.5), (1, 2), [3])
    assert made is not None
    assert plainly(made) == [(3, 1, 0.5, 0)]


def test_a_session_that_changes_nothing_has_none():
    assert adjustments(SamplingParameters(), (1, 2), [3]) is None


def test_what_was_returned_does_not_change_when_the_output_grows():
    grown = Adjuster(SamplingParameters(frequency_penalty=1.0), ())
    before = grown.after([4])
    grown.after([4, 4])
    assert before.minus.tolist() == [1.0]


def test_tokens_outside_the_vocabulary_are_left_out():
    rules = SamplingParameters(repetition_penalty=2.0)
    made = adjustments(rules, (1, 40, 2), ())
    assert made is not None
    assert made.within(40).tokens.tolist() == [1, 2]
    assert made.within(41) is made
    assert made.within(40).factors.dtype == np.float32
