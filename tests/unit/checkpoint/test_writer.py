import pytest

from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.output import DiskFiles
from sllm_node.checkpoint.writer import ShardWriter
from tests.unit.checkpoint.raw import SPECS, ShortWrites, content, write_raw


def shard_bytes(checkpoint):
    return [(checkpoint.path / shard.name).read_bytes() for shard in checkpoint.index.shards]


def test_every_tensor_lies_where_the_index_says(tmp_path):
    checkpoint = write_raw(tmp_path)
    shards = shard_bytes(checkpoint)
    for spec, entry in zip(SPECS, checkpoint.index.tensors, strict=True):
        assert shards[entry.shard][entry.offset : entry.offset + entry.size] == content(spec)


def test_what_is_no_tensor_is_zero(tmp_path):
    checkpoint = write_raw(tmp_path)
    shards = [bytearray(data) for data in shard_bytes(checkpoint)]
    for entry in checkpoint.index.tensors:
        shards[entry.shard][entry.offset : entry.offset + entry.size] = bytes(entry.size)
    assert not any(any(data) for data in shards)


def test_there_is_a_digest_for_each_chunk_also_the_shorter_last_one(tmp_path):
    checkpoint = write_raw(tmp_path, chunk_bytes=8192, shard_bytes=12288)
    for shard, data in zip(checkpoint.index.shards, shard_bytes(checkpoint), strict=True):
        chunks = [data[at : at + 8192] for at in range(0, len(data), 8192)]
        assert shard.digests == tuple(chunk_digest(chunk) for chunk in chunks)
    assert checkpoint.index.shards[1].size == 12288


@pytest.mark.parametrize("limit", [1, 7, 4096, 1 << 20])
def test_a_system_that_takes_few_bytes_a_call_loses_none(tmp_path, limit):
    short = write_raw(tmp_path / "short", files=ShortWrites(limit))
    whole = write_raw(tmp_path / "whole")
    assert shard_bytes(short) == shard_bytes(whole)
    assert short.index == whole.index


def test_a_tensor_that_is_not_whole_is_never_followed_by_another(tmp_path):
    specs = [TensorSpec("a", "U8", (10,)), TensorSpec("b", "U8", (10,))]
    layout = plan_layout(specs, 4096)
    with ShardWriter(tmp_path, layout, 4096, DiskFiles()) as writer:
        writer.begin(layout.tensors[0])
        writer.write(memoryview(bytes(9)))
        with pytest.raises(AssertionError, match="not whole"):
            writer.begin(layout.tensors[1])
        with pytest.raises(AssertionError, match="more bytes"):
            writer.write(memoryview(bytes(2)))


def test_a_layout_without_tensors_is_one_page_of_zeros(tmp_path):
    checkpoint = write_raw(tmp_path, specs=[TensorSpec("a", "U8", (0,))])
    assert shard_bytes(checkpoint) == [bytes(4096)]
