"""File chunks as they are stored: read, compared with their digest, decoded."""

import os
from collections.abc import Iterator
from pathlib import Path

from sllm_node.checkpoint.catalog import Checkpoint, open_for_verify
from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.index import FileChunk
from sllm_node.codec.chunks import decode_chunk
from sllm_node.core.errors import CheckpointFormatError, ChecksumError, CodecError, StorageReadError


def all_chunks(checkpoint: Checkpoint) -> Iterator[FileChunk]:
    """Yield the file chunks of all shards in order."""
    for number in range(len(checkpoint.index.shards)):
        yield from checkpoint.index.file_chunks(number)


def read_stored(path: Path, chunk: FileChunk) -> memoryview:
    """Return the bytes of `chunk` in the shard at `path`, fewer if the file ends before.

    Raises:
        OSError: the file system's own.
    """
    view = memoryview(bytearray(chunk.size))
    done = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while done < chunk.size:
            count = os.preadv(descriptor, [view[done:]], chunk.offset + done)
            if count == 0:
                break
            done += count
    finally:
        os.close(descriptor)
    return view[:done]


def problem_of(path: Path, chunk: FileChunk) -> str | None:
    """Return what is wrong with a chunk of the shard at `path`. Runs in any thread."""
    try:
        data = read_stored(path, chunk)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if len(data) < chunk.size:
        return f"the file ends {chunk.size - len(data)} bytes too early"
    if chunk_digest(data) != chunk.digest:
        return "the bytes are not those written"
    try:
        decode_chunk(chunk.codec, data, chunk.decoded_size)
    except CodecError as error:
        return error.problem
    return None


def is_replaced(checkpoint: Checkpoint) -> bool:
    """Tell whether another checkpoint, or none, has its place: then damage that was found is none.

    One with the same index has the same digests.
    """
    try:
        return open_for_verify(checkpoint.path).index != checkpoint.index
    except CheckpointFormatError:
        return True


def read_decoded(checkpoint: Checkpoint, chunk: FileChunk) -> memoryview:
    """Return what `chunk` decodes to. Runs in any thread.

    Raises:
        StorageReadError: the file system failed.
        ChecksumError: the bytes are not those written.
        CodecError: they are, and are nothing that the codec writes.
    """
    shard = checkpoint.index.shards[chunk.shard].name
    try:
        data = read_stored(checkpoint.path / shard, chunk)
    except OSError as error:
        problem = error.strerror or str(error)
        raise StorageReadError(checkpoint.model, shard, chunk.offset, problem) from error
    if len(data) < chunk.size or chunk_digest(data) != chunk.digest:
        tensors = checkpoint.index.tensors_in(chunk.shard, chunk.start, chunk.decoded_size)
        raise ChecksumError(checkpoint.model, shard, chunk.offset, chunk.size, tensors)
    return decode_chunk(chunk.codec, data, chunk.decoded_size).data
