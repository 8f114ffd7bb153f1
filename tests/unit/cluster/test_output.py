"""What a session has given, and for how long its entry held it."""

from sllm_node.cluster.output import Output
from sllm_node.core.types import GenerationChunk


def chunk(*tokens, cached=0):
    return GenerationChunk("", tokens, (), None, None, cached)


def test_a_prompt_counts_as_cached_as_it_was_first_met():
    output = Output()
    assert output.take(chunk(1, cached=7), 0.0).cached_tokens == 7
    assert output.take(chunk(2, 3, cached=90), 1.0).cached_tokens == 7
    assert output.tokens == [1, 2, 3]


def test_the_first_token_has_no_gap_before_it():
    output = Output()
    assert output.gap_s(5.0) is None
    output.take(chunk(1), 5.0)
    assert output.gap_s(7.5) == 2.5


def test_a_chunk_is_held_since_its_first_token_came():
    output = Output()
    output.take(chunk(1), 1.0)
    output.take(chunk(2), 2.0)
    assert output.passed_on(4.0, is_all=False) == 3.0
    assert output.passed_on(5.0, is_all=True) == 3.0
    assert output.passed_on(6.0, is_all=True) is None


def test_what_its_client_has_already_is_not_held():
    output = Output()
    output.begin_with((1, 2), 4, 10.0)
    assert output.passed_on(11.0, is_all=True) is None
    assert output.gap_s(11.0) == 1.0
    assert output.take(chunk(3, cached=9), 12.0).cached_tokens == 4
