import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.digest import ChunkDigests, chunk_digest


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
