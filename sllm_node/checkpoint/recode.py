"""Writes a checkpoint anew with another codec, in place of itself; what it decodes to stays.

The new one is made in a temporary folder beside the old one and takes its name in one step, so
whoever stops it, at whatever moment, leaves the old one whole; it is simply started again.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.catalog import (
    Checkpoint,
    ShardIdentity,
    identity_of,
    open_checkpoint,
)
from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.checkpoint.layout import Layout
from sllm_node.checkpoint.output import (
    DiskFiles,
    OutputFiles,
    SpaceNeeded,
    linked,
    publish,
    write_errors_named,
)
from sllm_node.checkpoint.sinks import THREADS, chunk_bytes_or_default
from sllm_node.checkpoint.stored import is_replaced, read_decoded
from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.checkpoint.writer import ShardWriter, with_shards, write_index
from sllm_node.codec.exponent import DECODED_BYTES_MAX
from sllm_node.codec.names import AUTO, CHOICES, RAW
from sllm_node.core.errors import ChecksumError, CodecError, ConversionError, StorageReadError
from sllm_node.core.units import MIB, PAGE

_DISK: Final = DiskFiles()
_WINDOW_BYTES: Final = 64 * MIB
"""Of decoded chunks that are read ahead."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def check_codec(codec: str, chunk_bytes: int) -> None:
    """Refuse what no checkpoint can be written with.

    Raises:
        ConversionError: there is no such codec, or the chunks have a size that it can't take.
    """
    if codec not in CHOICES:
        raise ConversionError(f"codec {codec!r}", f"is none of {', '.join(CHOICES)}, nor {AUTO}")
    if chunk_bytes < PAGE or chunk_bytes % PAGE:
        raise ConversionError(f"chunk size {chunk_bytes}", f"is not a multiple of {PAGE} bytes")
    if codec != RAW and chunk_bytes > DECODED_BYTES_MAX:
        raise ConversionError(
            f"chunk size {chunk_bytes}", f"is more than {DECODED_BYTES_MAX} bytes"
        )


def recode(
    checkpoint: Checkpoint,
    codec: str,
    chunk_bytes: int | None = None,
    *,
    progress: Progress | None = None,
    files: OutputFiles = _DISK,
) -> Checkpoint:
    """Let `checkpoint` have its bytes by `codec`, one of `CHOICES`; return it as it is then.

    Raises:
        ConversionError: there is no such codec, the chunk size can't be, its folder has folders, or
            somebody replaced the checkpoint meanwhile, or edited its texts in the last moment:
            theirs stays.
        ChecksumError: the checkpoint is damaged; so are CodecError, StorageReadError.
        StoreFullError: both don't fit on the disk for a while.
        StorageWriteError: the disk failed.
    """
    size = chunk_bytes_or_default(chunk_bytes, codec)
    check_codec(codec, size)
    place, index, space = linked(checkpoint.path), checkpoint.index, SpaceNeeded()
    store = place.parent
    layout = Layout(index.tensors, tuple(shard.size for shard in index.shards))
    with (
        write_errors_named(store, space, files),
        temporary_folder(store, checkpoint.path.name) as folder,
    ):
        _check_only_files(checkpoint)
        space.require(layout.size, store, files, codec)
        with (
            _replacement_told(checkpoint),
            ShardWriter(folder, layout, size, files, codec) as writer,
        ):
            for number in range(len(index.shards)):
                writer.write_shard(_decoded(checkpoint, number, progress))
            shards = writer.finish()
        write_index(folder, with_shards(replace(index, chunk_bytes=size), shards), files)
        copied = _copy_texts(checkpoint, folder)  # now, so that edits made meanwhile are among them
        _check_same(checkpoint)
        _check_only_files(checkpoint)
        _check_texts(checkpoint, copied)
        publish(folder, place, files, replace=True)
    return open_checkpoint(checkpoint.path)


def _check_same(checkpoint: Checkpoint) -> None:
    """Refuse to put what was read in place of another checkpoint, or of one that was deleted."""
    if open_checkpoint(checkpoint.path) != checkpoint:
        raise _was_replaced(checkpoint)


@contextmanager
def _replacement_told(checkpoint: Checkpoint) -> Iterator[None]:
    """Tell that another checkpoint took its place, and not that this one is damaged."""
    try:
        yield
    except (ChecksumError, CodecError, StorageReadError) as error:
        if is_replaced(checkpoint):
            raise _was_replaced(checkpoint) from error
        raise


def _was_replaced(checkpoint: Checkpoint) -> ConversionError:
    problem = "was replaced while it was read, and is as it was put there; recode it again"
    return ConversionError(f"checkpoint {checkpoint.model!r}", problem)


def _check_only_files(checkpoint: Checkpoint) -> None:
    """Refuse a folder with folders in it: they are not ours to copy, and would go with the old one."""
    names = sorted(path.name for path in checkpoint.path.iterdir() if path.is_dir())
    if names:
        problem = f"has folders that would be deleted: {', '.join(names[:8])}; move them elsewhere"
        raise ConversionError(f"checkpoint {checkpoint.model!r}", problem)


def _texts(checkpoint: Checkpoint) -> dict[str, ShardIdentity]:
    """Return the files that are neither index nor shards, with what tells an edited one."""
    written = {INDEX_FILE, *(shard.name for shard in checkpoint.index.shards)}
    paths = (path for path in sorted(checkpoint.path.iterdir()) if path.name not in written)
    return {path.name: identity_of(path.stat()) for path in paths if path.is_file()}


def _copy_texts(checkpoint: Checkpoint, folder: Path) -> dict[str, ShardIdentity]:
    """Copy them and return what was copied, as it was before."""
    found = _texts(checkpoint)
    for name in found:
        shutil.copyfile(checkpoint.path / name, folder / name)
    return found


def _check_texts(checkpoint: Checkpoint, copied: dict[str, ShardIdentity]) -> None:
    """Refuse to let texts go that are others than those that were copied."""
    found = _texts(checkpoint)
    changed = {name for name, _ in found.items() ^ copied.items()}
    if changed:
        problem = (
            f"was edited while it was copied ({', '.join(sorted(changed)[:8])}); recode it again"
        )
        raise ConversionError(f"checkpoint {checkpoint.model!r}", problem)


def _decoded(
    checkpoint: Checkpoint, number: int, progress: Progress | None
) -> Iterator[memoryview]:
    """Yield the decoded chunks of a shard in order, several being read at once."""
    index = checkpoint.index
    chunks = iter(index.file_chunks(number))
    ahead = max(1, min(2 * THREADS, _WINDOW_BYTES // index.chunk_bytes))
    done = index.shard_base(number)
    with ThreadPoolExecutor(THREADS, "decode") as threads:
        while window := list(islice(chunks, ahead)):
            for data in threads.map(lambda chunk: read_decoded(checkpoint, chunk), window):
                yield data
                done += len(data)
                if progress is not None:
                    progress(done, index.size)
