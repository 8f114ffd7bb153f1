import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.digest import ChunkDigests, chunk_digest, weights_of
from sllm_node.checkpoint.index import VERSION, Shard, TensorIndex
from sllm_node.core.types import Weights


@given(st.lists(st.binary(max_size=50), max_size=10), st.integers(1, 40))
def test_digests_do_not_depend_on_how_the_bytes_arrive(pieces, chunk_bytes):
    digests = ChunkDigests(chunk_bytes)
    for piece in pieces:
        digests.update(memoryview(piece))
    whole = b"".join(pieces)
    chunks = [whole[at : at + chunk_bytes] for at in range(0, len(whole), chunk_bytes)]
    assert digests.finish() == tuple(chunk_digest(chunk) for chunk in chunks)


def test_the_digest_is_xxh3_64():
    assert chunk_digest(b"abc") == xxhash.xxh3_64_intdigest(b"abc") == 0x78AF5F94892F3950


def index_of(*digests, created=7, stored=()):
    codecs = ("exponent",) * len(stored)
    shard = Shard("shard-00000.bin", 8192, digests, codecs, stored)
    return TensorIndex(VERSION, "m", "Fake", "F32", 512, 4096, created, (shard,), ())


def test_weights_are_the_same_if_their_bytes_are_or_if_one_conversion_was_recoded():
    first = weights_of(index_of(1, 2))
    assert first.is_same(weights_of(index_of(1, 2, created=8)))
    assert not first.is_same(weights_of(index_of(1, 3)))
    assert not first.is_same(weights_of(index_of(1, 3, created=8)))
    packed = weights_of(index_of(5, 6, stored=(4096, 0)))
    assert first.is_same(packed)
    assert not first.is_same(weights_of(index_of(5, 6, created=8, stored=(4096, 0))))


def test_of_a_release_that_tells_no_digest_weights_are_taken_as_the_same():
    first = weights_of(index_of(1, 2))
    assert first.is_same(Weights(9, 1))
    assert Weights(9, 1).is_same(first)
