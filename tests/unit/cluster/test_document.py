from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.document import decode_state, encode_state
from sllm_node.core.errors import MessageError, ProtocolVersionError
from tests.unit.cluster.clusters import random_model_sizes, random_node


def made(seed):
    rng = Random(seed)
    return random_node(rng, "n", random_model_sizes(rng))


@given(st.integers(0, 10_000))
def test_a_state_comes_back_as_it_was(seed):
    assert decode_state(encode_state(made(seed), 1 << 20)) == made(seed)


@given(st.integers(0, 10_000))
def test_what_is_too_long_keeps_free_places_and_what_may_not_leave(seed):
    whole, short = made(seed), decode_state(encode_state(made(seed), 1))
    assert [r.free_slots for r in short.replicas] == [max(0, r.free_slots) for r in whole.replicas]
    assert [r.is_evictable for r in short.replicas] == [r.is_evictable for r in whole.replicas]
    assert not any(r.sessions for r in short.replicas)


@given(st.binary(max_size=200))
def test_noise_is_refused_with_a_typed_error(data):
    with pytest.raises(MessageError):
        decode_state(data)


def test_a_document_cut_off_or_of_another_format_is_refused():
    document = encode_state(made(1), 1 << 20)
    with pytest.raises(MessageError):
        decode_state(document[:-3])
    with pytest.raises(ProtocolVersionError):
        decode_state(encode_state(replace(made(1), format=99), 1 << 20))
