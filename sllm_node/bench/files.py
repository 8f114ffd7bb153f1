"""The files of a comparison: one model as safetensors for the peers and in our format for us.

Several copies are real copies: hard links would share their page cache.
"""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sllm_node.bench.shapes import Shape
from sllm_node.bench.synthesis import check_room, synthesise
from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.convert.convert import ConvertOptions, convert
from sllm_node.core.errors import BenchError
from sllm_node.core.types import ModelId

_DROP: Final = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model in both formats."""

    folder: Path
    """Config and safetensors, as on the hub."""
    checkpoint: Checkpoint
    """Ours, raw."""
    encoded: Checkpoint | None = None
    """Ours, with the codec that a conversion takes by itself."""

    @property
    def model(self) -> ModelId:
        """Its name in our store."""
        return self.checkpoint.model

    @property
    def size(self) -> int:
        """Bytes of all tensors, as the safetensors files have them."""
        return sum(entry.size for entry in self.checkpoint.index.tensors)

    def safetensors(self) -> list[str]:
        """Return the paths of the safetensors files, in order."""
        return [str(path) for path in sorted(self.folder.glob("*.safetensors"))]

    def all(self) -> list[Path]:
        """Return every file whose bytes are weights."""
        ours = [one for one in (self.checkpoint, self.encoded) if one is not None]
        shards = [one.path / shard.name for one in ours for shard in one.index.shards]
        return [*map(Path, self.safetensors()), *shards]


def prepare_shape(
    shape: Shape, store: Path, copies: int, *, seed: int, device: str
) -> list[ModelFiles]:
    """Write `copies` copies of `shape` below `store`; what is there already stays.

    Raises:
        StoreFullError: they do not fit on the disk.
        StorageWriteError: the disk failed.
    """
    first = store / "safetensors" / f"{shape.name}-0"
    synthesise(shape, first, seed=seed, device=device)
    return _copies(first, shape.name, store, copies)


def prepare_source(source: Path, store: Path, copies: int) -> list[ModelFiles]:
    """Convert the Hugging Face folder `source` into `store`; further copies lie below `store`.

    Raises:
        BenchError: it holds no safetensors.
        ConversionError: it can't be converted.
        StoreFullError: it does not fit on the disk.
    """
    if not any(source.glob("*.safetensors")):
        raise BenchError(f"{source} holds no *.safetensors; name a Hugging Face folder")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", source.resolve().name).strip("-._") or "source"
    return _copies(source, name, store, copies)


def _copies(first: Path, name: str, store: Path, copies: int) -> list[ModelFiles]:
    made = [_with_checkpoint(first, f"{name}-0", store)]
    for number in range(1, copies):
        folder = store / "safetensors" / f"{name}-{number}"
        if not folder.is_dir():
            check_room(store, 3 * made[0].size)
            hidden = folder.parent / f".tmp-{folder.name}"
            shutil.rmtree(hidden, ignore_errors=True)
            shutil.copytree(first, hidden)
            hidden.rename(folder)
        made.append(_with_checkpoint(folder, folder.name, store))
    os.sync()  # bytes that are not on the disk yet can't be dropped from the page cache
    return made


def _with_checkpoint(folder: Path, name: str, store: Path) -> ModelFiles:
    root = store / "sllm"
    root.mkdir(parents=True, exist_ok=True)
    encoded = f"{name}-codec"
    for checkpoint, codec in ((name, RAW), (encoded, EXPONENT)):
        if not (root / checkpoint).is_dir():
            convert(str(folder), checkpoint, root, ConvertOptions(codec=codec))
    catalog = Catalog(root)
    return ModelFiles(folder, catalog.get(ModelId(name)), catalog.get(ModelId(encoded)))


def read_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` from byte `offset` of an open file.

    Raises:
        BenchError: the file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise BenchError(f"a file of weights ends at byte {offset + done}; write it anew")
        done += count


class PageCache:
    """The system's page cache; `drop` empties it as far as this user may."""

    def __init__(self, switch: Path = _DROP) -> None:
        self._switch = switch
        self.way = "not dropped"
        """How it was dropped last, for the report."""

    def drop(self, files: Iterable[Path]) -> None:
        """Drop the whole cache, or what it has of `files` where only root may do more."""
        try:
            self._switch.write_text("3", encoding="ascii")
            self.way = "whole page cache dropped (drop_caches)"
        except OSError:
            for path in files:
                _advise(path)
            self.way = "files dropped from the page cache one by one (posix_fadvise)"


def _advise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
