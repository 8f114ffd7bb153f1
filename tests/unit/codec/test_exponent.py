import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.codec.exponent import BF16, BLOCK, FORMATS, HEADER_BYTES, decode, encode
from sllm_node.core.errors import CodecError
from tests.unit.codec.cases import FORMAT_NAMES, cases, damaged, numbers, with_unused_codes

formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMAT_NAMES)


def there_and_back(layout, data):
    encoded = encode(layout, memoryview(data))
    assert len(encoded) % 16 == 0
    return decode(layout, encoded, len(data)).tobytes()


@formats
def test_every_case_comes_back_bit_for_bit(layout):
    for name, data in cases(layout).items():
        assert there_and_back(layout, data) == data, name


@given(st.sampled_from(FORMAT_NAMES), st.binary(max_size=4096))
def test_any_bytes_come_back_bit_for_bit(name, data):
    data = data[: len(data) // 4 * 4]
    assert there_and_back(FORMATS[name], data) == data


@given(
    st.sampled_from(FORMAT_NAMES),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9),
    st.integers(1, 3 * BLOCK),
)
def test_few_different_words_come_back_bit_for_bit(name, words, count):
    data = np.resize(np.array(words, "<u4"), count).tobytes()
    assert there_and_back(FORMATS[name], data) == data


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("exp-bf16", 0.685), ("exp-f16", 0.87), ("exp-f32", 0.845), ("exp-f8e5m2", 0.75)],
)
def test_gaussian_weights_get_smaller(name, ratio):
    layout = FORMATS[name]
    data = numbers(layout, 1 << 18)
    assert len(encode(layout, memoryview(data))) < ratio * len(data)


def test_bytes_after_the_end_are_not_looked_at():
    data = numbers(BF16, 1000)
    encoded = np.concatenate((encode(BF16, memoryview(data)), np.full(4096, 255, np.uint8)))
    assert decode(BF16, encoded, len(data)).tobytes() == data


@formats
def test_damage_is_an_error_of_ours_or_changes_numbers_only(layout):
    random = np.random.default_rng(0)
    data = numbers(layout, 2 * BLOCK + 100)
    encoded = encode(layout, memoryview(data)).tobytes()
    refused = 0
    for _ in range(300):
        broken = np.frombuffer(damaged(encoded, random), np.uint8)
        try:
            assert len(decode(layout, broken, len(data))) == len(data)
        except CodecError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (0, "no such chunk"),
        (4, "no such chunk"),
        (8, "bytes where"),
        (19, "more codes than elements"),
        (16, "count the codes"),
        (20, "count the codes"),
    ],
)
def test_a_header_that_is_wrong_is_named(place, problem):
    data = numbers(BF16, BLOCK)
    encoded = encode(BF16, memoryview(data))
    encoded[place] ^= 1
    with pytest.raises(CodecError, match=problem):
        decode(BF16, encoded, len(data))


def test_a_directory_that_is_wrong_is_refused():
    data = numbers(BF16, 2 * BLOCK)
    encoded = encode(BF16, memoryview(data))
    directory = HEADER_BYTES + 2 * BLOCK + 2 * BLOCK // 4
    encoded[directory + 8] ^= 1
    with pytest.raises(CodecError, match="directory"):
        decode(BF16, encoded, len(data))


@formats
def test_codes_before_the_first_block_are_refused(layout):
    data = numbers(layout, 9 * BLOCK)
    made = with_unused_codes(layout, encode(layout, memoryview(data)), len(data))
    with pytest.raises(CodecError, match="count the codes"):
        decode(layout, made, len(data))


def test_a_chunk_of_another_size_is_refused():
    encoded = encode(BF16, memoryview(bytes(8)))
    with pytest.raises(CodecError, match="8 bytes where 12"):
        decode(BF16, encoded, 12)
    with pytest.raises(CodecError, match="no header"):
        decode(BF16, encoded[:48], 8)
