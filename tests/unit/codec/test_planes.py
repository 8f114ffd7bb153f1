import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.codec.planes import (
    pack,
    pack_triples,
    plane_bytes,
    triples_bytes,
    unpack,
    unpack_triples,
)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@given(count=st.integers(0, 200))
def test_a_plane_gives_back_what_was_packed(bits, count):
    values = (
        np.random.default_rng(count).integers(0, 1 << bits, count).astype(f"<u{max(1, bits // 8)}")
    )
    plane = np.zeros(plane_bytes(count, bits), np.uint8)
    pack(values, bits, plane)
    assert unpack(plane, bits, count).tolist() == values.tolist()


def test_narrow_numbers_lie_from_the_low_bits_up():
    plane = np.zeros(16, np.uint8)
    pack(np.array([1, 2, 3, 0, 3], np.uint8), 2, plane)
    assert plane[:2].tolist() == [0b00111001, 0b11]


@given(st.lists(st.integers(0, 7), max_size=100))
def test_a_triple_stream_gives_back_what_was_packed(values):
    stream = np.zeros(triples_bytes(len(values)), np.uint8)
    pack_triples(np.array(values, np.uint8), stream)
    assert unpack_triples(stream, len(values)).tolist() == values
    wanted = sum(value << 3 * i for i, value in enumerate(values))
    assert int.from_bytes(stream.tobytes(), "little") == wanted
