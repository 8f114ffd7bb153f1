import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.index import (
    DTYPE_BYTES,
    FileChunk,
    Shard,
    TensorEntry,
    TensorIndex,
    from_json,
    tensor_size,
    to_json,
)
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.core.errors import CheckpointFormatError

INDEX = TensorIndex(
    version=1,
    model="m",
    architecture="LlamaForCausalLM",
    dtype="F32",
    context_tokens=512,
    chunk_bytes=4096,
    created=1_700_000_000,
    shards=(Shard("shard-00000.bin", 8192, (1, 2**64 - 1)), Shard("shard-00001.bin", 4096, (3,))),
    tensors=(
        TensorEntry("a", "F32", (4, 64), 0, 0, 1024),
        TensorEntry("b", "BF16", (2048,), 0, 1024, 4096),
        TensorEntry("e", "F32", (0, 9), 1, 0, 0),
        TensorEntry("c", "I64", (), 1, 0, 8),
    ),
    aliases=(("tied", "a"),),
)

specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(min_size=1, max_size=8),
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 40), max_size=4).map(tuple),
    ),
    max_size=12,
    unique_by=lambda spec: spec.name,
)


def test_an_index_comes_back_as_it_was_written():
    assert from_json(to_json(INDEX), "x") == INDEX


@given(specs, st.integers(1, 64), st.integers(1, 8))
def test_whatever_layout_is_planned_makes_an_index_that_is_accepted(tensors, pages, chunk_pages):
    layout = plan_layout(tensors, pages * 4096)
    chunk = chunk_pages * 4096
    shards = tuple(
        Shard(f"shard-{i:05d}.bin", size, tuple(range(-(-size // chunk))))
        for i, size in enumerate(layout.shard_sizes)
    )
    index = replace(INDEX, shards=shards, tensors=layout.tensors, chunk_bytes=chunk, aliases=())
    assert from_json(to_json(index), "x") == index


@given(st.binary(max_size=200))
def test_bytes_that_are_no_index_are_a_format_error(data):
    with pytest.raises(CheckpointFormatError):
        from_json(data, "x")


@given(st.data())
def test_an_index_with_a_byte_changed_is_accepted_or_a_format_error(data):
    stored = bytearray(to_json(INDEX))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] = data.draw(st.integers(0, 255))
    with suppress(CheckpointFormatError):
        from_json(bytes(stored), "x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    ),
    st.sampled_from(sorted(json.loads(to_json(INDEX)))),
)
def test_a_field_of_any_other_kind_is_a_format_error_or_harmless(value, field):
    with suppress(CheckpointFormatError):
        from_json(json.dumps({**json.loads(to_json(INDEX)), field: value}).encode(), "x")


def test_deeply_nested_json_is_a_format_error():
    with pytest.raises(CheckpointFormatError):
        from_json(b'{"version": 1, "x": ' + b"[" * 100_000, "x")


def test_the_index_of_another_version_is_refused_with_what_to_do():
    with pytest.raises(CheckpointFormatError, match=r"format version 3.*convert again"):
        from_json(to_json(replace(INDEX, version=3)), "x")


A, B, E, C = INDEX.tensors
FIRST, SECOND = INDEX.shards


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"codec": "zip"}, "codec 'zip'"),
        ({"context_tokens": 0}, "no context length"),
        ({"chunk_bytes": 5000}, "chunk size 5000"),
        ({"chunk_bytes": 0}, "chunk size 0"),
        ({"shards": ()}, "no shard"),
        ({"shards": (replace(FIRST, name="../x"), SECOND)}, "has the name '../x'"),
        ({"shards": (replace(FIRST, size=8191), SECOND)}, "size 8191"),
        ({"shards": (replace(FIRST, digests=(1,)), SECOND)}, "1 digests for 2 chunks"),
        ({"tensors": (replace(A, dtype="F7"),)}, "unknown dtype 'F7'"),
        ({"tensors": (replace(A, shape=(1,) * 40, size=4),)}, "40 dimensions"),
        ({"tensors": (replace(A, size=1000),)}, "1000 bytes contradict"),
        ({"tensors": (replace(A, shard=2),)}, "no shard 2"),
        ({"tensors": (replace(A, offset=100),)}, "offset 100 is not aligned"),
        ({"tensors": (A, replace(B, offset=4352))}, "ends beyond its shard"),
        ({"tensors": (A, replace(B, offset=768))}, "tensors a and b overlap"),
        ({"tensors": (A, replace(A, offset=1024))}, "two tensors have one name"),
        ({"aliases": (("c", "a"),)}, "an alias has the name"),
        ({"aliases": (("x", "a"), ("x", "b"))}, "an alias has the name"),
        ({"aliases": (("x", "y"),)}, "not stored"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(changes, problem):
    with pytest.raises(CheckpointFormatError, match=problem.replace("(", r"\(")):
        from_json(to_json(replace(INDEX, **changes)), "x")


def test_the_size_on_a_device_is_that_of_all_shards():
    assert (INDEX.size, INDEX.shard_base(0), INDEX.shard_base(1)) == (12288, 0, 8192)


@pytest.mark.parametrize(
    ("shard", "offset", "size", "names"),
    [(0, 0, 1024, ("a",)), (0, 1000, 100, ("a", "b")), (0, 5120, 3072, ()), (1, 0, 4096, ("c",))],
)
def test_a_range_names_the_tensors_that_have_bytes_in_it(shard, offset, size, names):
    assert INDEX.tensors_in(shard, offset, size) == names


def test_a_scalar_has_one_element_and_an_empty_tensor_none():
    assert (tensor_size("I64", ()), tensor_size("F8_E4M3", (3, 0))) == (8, 0)


ENCODED = replace(
    INDEX,
    version=2,
    codec="exp",
    chunk_bytes=8192,
    shards=(
        Shard("shard-00000.bin", 20480, (1, 2, 3), ("exp-f32", "raw", "raw"), (4096, 8192, 4096)),
        Shard("shard-00001.bin", 4096, (4,), ("raw",), (4096,)),
    ),
)


def test_an_encoded_index_comes_back_as_it_was_written():
    assert from_json(to_json(ENCODED), "x") == ENCODED


def test_file_chunks_say_where_they_are_stored_and_where_they_decode_to():
    assert ENCODED.file_chunks(0) == (
        FileChunk(0, 0, 4096, 1, "exp-f32", 0, 8192),
        FileChunk(0, 4096, 8192, 2, "raw", 8192, 8192),
        FileChunk(0, 12288, 4096, 3, "raw", 16384, 4096),
    )
    assert (ENCODED.size, ENCODED.file_size) == (24576, 20480)
    assert ENCODED.shard_base(1) == 20480


def test_file_chunks_of_a_raw_checkpoint_decode_to_themselves():
    assert INDEX.file_chunks(0) == (
        FileChunk(0, 0, 4096, 1, "raw", 0, 4096),
        FileChunk(0, 4096, 4096, 2**64 - 1, "raw", 4096, 4096),
    )
    assert not INDEX.is_encoded
    assert INDEX.file_size == INDEX.size


def test_an_index_of_version_1_is_written_as_ever():
    assert b"codecs" not in to_json(INDEX)
    assert b"stored" not in to_json(INDEX)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"codecs": ("zip", "raw", "raw")}, "unknown codec 'zip'"),
        ({"codecs": ("raw", "raw", "raw")}, "a raw chunk of 8192 bytes is stored in 4096"),
        ({"codecs": ("raw",)}, "1 codecs and 3 sizes for 3 chunks"),
        ({"stored": (4096, 8192)}, "3 codecs and 2 sizes for 3 chunks"),
        ({"stored": (4096, 12288, 4096)}, "8192 bytes is stored in 12288"),
        ({"stored": (4000, 8192, 4096)}, "8192 bytes is stored in 4000"),
        ({"stored": (0, 8192, 4096)}, "8192 bytes is stored in 0"),
        ({"stored": (4096, 8192, 0)}, "4096 bytes is stored in 0"),
    ],
)
def test_an_encoded_shard_that_contradicts_itself_is_refused(changes, problem):
    first, second = ENCODED.shards
    broken = replace(ENCODED, shards=(replace(first, **changes), second))
    with pytest.raises(CheckpointFormatError, match=f"shard-00000.bin: .*{problem}"):
        from_json(to_json(broken), "x")


def test_codec_and_version_must_fit():
    for broken in (
        replace(ENCODED, codec="raw"),
        replace(INDEX, codec="exp"),
        replace(ENCODED, version=1),
        replace(INDEX, version=2, codec="exp"),
        replace(ENCODED, chunk_bytes=1 << 31),
    ):
        with pytest.raises(CheckpointFormatError):
            from_json(to_json(broken), "x")
