import pytest
from msgspec.structs import replace

from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.stored import problem_of, read_decoded
from sllm_node.core.errors import ChecksumError, CodecError, StorageReadError
from tests.unit.checkpoint.raw import WEIGHTS, write_raw


@pytest.fixture
def checkpoint(tmp_path):
    return write_raw(tmp_path, "m", WEIGHTS, chunk_bytes=16384, shard_bytes=65536, codec="exp")


def first_encoded(checkpoint):
    return next(chunk for chunk in checkpoint.index.file_chunks(0) if chunk.codec != "raw")


def overwrite(checkpoint, chunk, data):
    with (checkpoint.path / "shard-00000.bin").open("r+b") as file:
        file.seek(chunk.offset)
        file.write(data)


def test_damaged_bytes_are_a_checksum_error_naming_tensors(checkpoint):
    chunk = first_encoded(checkpoint)
    overwrite(checkpoint, chunk, b"damage")
    with pytest.raises(ChecksumError, match="weight"):
        read_decoded(checkpoint, chunk)


def test_bytes_that_fit_their_digest_and_no_codec_are_a_codec_error(checkpoint):
    chunk = first_encoded(checkpoint)
    overwrite(checkpoint, chunk, bytes(chunk.size))
    chunk = replace(chunk, digest=chunk_digest(bytes(chunk.size)))
    with pytest.raises(CodecError, match="no such chunk"):
        read_decoded(checkpoint, chunk)
    problem = problem_of(checkpoint.path / "shard-00000.bin", chunk)
    assert problem == "the header is of no such chunk"


def test_a_shard_that_is_gone_is_a_read_error(checkpoint):
    (checkpoint.path / "shard-00000.bin").unlink()
    with pytest.raises(StorageReadError, match="No such file"):
        read_decoded(checkpoint, first_encoded(checkpoint))
