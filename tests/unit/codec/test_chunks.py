import numpy as np
import pytest

from sllm_node.codec.chunks import CODECS, codec_for, decode_chunk, encode_chunk, least_encoded
from sllm_node.codec.exponent import BF16
from sllm_node.codec.names import RAW
from sllm_node.core.errors import CodecError
from tests.unit.codec.cases import numbers


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_comes_back_whatever_it_gets(codec):
    data = numbers(BF16, 10_000)
    given, encoded = encode_chunk(codec, memoryview(data))
    assert given in (codec, RAW)
    assert decode_chunk(given, encoded.data, len(data)).tobytes() == data


def test_what_does_not_get_smaller_stays_raw():
    noise = np.random.default_rng(0).integers(0, 256, 8192, np.uint8).tobytes()
    codec, encoded = encode_chunk(BF16.name, memoryview(noise))
    assert codec == RAW
    assert encoded.tobytes() == noise


def test_bytes_that_are_not_whole_words_stay_raw():
    assert encode_chunk(BF16.name, memoryview(bytes(4097)))[0] == RAW


def test_a_chunk_gets_the_codec_of_the_dtype_that_most_of_it_has():
    assert codec_for({"F32": 100, "BF16": 101}) == BF16.name
    assert codec_for({"F32": 100, "I64": 101}) == RAW
    assert codec_for({}) == RAW


def test_a_raw_chunk_that_is_too_short_is_refused():
    with pytest.raises(CodecError, match="4 bytes where 8"):
        decode_chunk(RAW, memoryview(bytes(4)), 8)


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_becomes_smaller_than_what_a_disk_must_have_room_for(codec):
    for data in (bytes(1 << 20), numbers(BF16, 10_000)):
        assert len(encode_chunk(codec, memoryview(data))[1]) >= least_encoded(len(data))
    assert least_encoded(1 << 20) == (1 << 20) * 5 // 8
