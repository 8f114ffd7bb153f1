import pytest

from sllm_node.core.errors import ArgumentError
from sllm_node.core.units import GIB, KIB, MIB
from sllm_node.library.opened import default_pool_bytes, store_config


def test_a_pool_takes_a_gibibyte_at_most():
    assert MIB < default_pool_bytes() <= GIB


def test_a_pool_is_cut_into_chunks_that_hold_whole_file_chunks():
    config = store_config(MIB, 48 * KIB)
    assert (config.pool_bytes, config.chunk_bytes) == (MIB, 96 * KIB)


def test_a_pool_of_less_than_two_chunks_is_refused():
    with pytest.raises(ArgumentError, match="98304 at least"):
        store_config(64 * KIB, 48 * KIB)
