"""Reads tensors of safetensors files by byte range: no mapping, so memory holds one slice at a time."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from sllm_node.checkpoint.index import DTYPE_BYTES, tensor_size
from sllm_node.core.errors import ConversionError
from sllm_node.core.units import MIB

WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
SLICE_BYTES: Final = 16 * MIB
_HEADER_BYTES_MAX: Final = 256 * MIB


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in an open safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    path: Path
    descriptor: int
    offset: int

    def slices(self) -> Iterator[memoryview]:
        """Yield the bytes in order, in whole elements; a slice is good until the next one."""
        buffer = memoryview(bytearray(min(self.size, SLICE_BYTES)))
        for start in range(0, self.size, SLICE_BYTES):
            view = buffer[: min(SLICE_BYTES, self.size - start)]
            self._read(view, self.offset + start)
            yield view

    def read_into(self, view: memoryview) -> None:
        """Fill `view`, as long as the tensor, with its bytes."""
        for start in range(0, self.size, SLICE_BYTES):
            self._read(view[start : start + SLICE_BYTES], self.offset + start)

    def _read(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise ConversionError(
                    str(self.path), f"reading tensor {self.name}: {error.strerror}"
                ) from error
            if count == 0:
                raise ConversionError(str(self.path), f"ends inside tensor {self.name}")
            view = view[count:]
            offset += count


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _WeightsIndex(msgspec.Struct):
    weight_map: dict[str, str]


def open_weights(folder: Path, files: ExitStack) -> Mapping[str, FileTensor]:
    """Open the safetensors of a Hugging Face folder, sharded or not; `files` closes them.

    A single file goes before an index, as it does in transformers: saving a model that was sharded
    in one file leaves the index behind, and perhaps the shards.

    Raises:
        ConversionError: there are none, or they are damaged or incomplete.
    """
    index_path = folder / WEIGHTS_INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index_path.is_file():
        return _open_file(_single_file(folder), files)
    places = _read_index(index_path)
    tensors: dict[str, FileTensor] = {}
    for name in sorted(set(places.values())):
        tensors |= _open_file(folder / name, files)
    if absent := sorted(places.keys() - tensors.keys()):
        raise ConversionError(str(index_path), f"names tensors that no file has: {few(absent)}")
    return {name: tensors[name] for name in places}


def few(names: list[str]) -> str:
    """Return the first of many names."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest


def _single_file(folder: Path) -> Path:
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and not found[0].name.startswith("adapter"):
        return found[0]
    names = few([path.name for path in found]) or "none"
    raise ConversionError(
        str(folder), f"has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}; safetensors: {names}"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = msgspec.json.decode(path.read_bytes(), type=_WeightsIndex).weight_map
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConversionError(str(path), f"is no index of shards: {error}") from error
    for name in places.values():
        if Path(name).name != name or name in ("", ".."):
            raise ConversionError(str(path), f"names a file outside the folder: {name!r}")
    return places


def _open_file(path: Path, files: ExitStack) -> dict[str, FileTensor]:
    descriptor = _open_regular(path, files)
    file_size = os.fstat(descriptor).st_size
    header_size = int.from_bytes(_read_start(path, descriptor, 0, 8), "little")
    if not 2 <= header_size <= min(_HEADER_BYTES_MAX, file_size - 8):
        raise ConversionError(str(path), "is no safetensors file, or is truncated")
    entries = _parse_header(path, _read_start(path, descriptor, 8, header_size))
    start = 8 + header_size
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in DTYPE_BYTES:
            raise ConversionError(str(path), f"tensor {name} has unknown dtype {entry.dtype}")
        size = tensor_size(entry.dtype, entry.shape)
        if min(entry.shape, default=0) < 0 or begin < 0 or end - begin != size:
            raise ConversionError(str(path), f"tensor {name}: its shape contradicts its bytes")
        if start + end > file_size:
            raise ConversionError(str(path), f"is truncated: tensor {name} ends beyond it")
        tensors[name] = FileTensor(
            name, entry.dtype, entry.shape, size, path, descriptor, start + begin
        )
    return tensors


def _open_regular(path: Path, files: ExitStack) -> int:
    """Return a descriptor of the file at `path`; `files` closes it."""
    try:
        # Whoever opens a pipe waits for one who writes, but for this flag.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise ConversionError(str(path), f"can't be opened: {problem}") from error
    files.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ConversionError(str(path), "is no file")
    return descriptor


def _read_start(path: Path, descriptor: int, offset: int, size: int) -> bytes:
    try:
        return os.pread(descriptor, size, offset)
    except OSError as error:
        raise ConversionError(str(path), f"can't be read: {error.strerror}") from error


def _parse_header(path: Path, data: bytes) -> dict[str, _Entry]:
    try:
        header = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        return {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConversionError(str(path), f"has a damaged header: {error}") from error
