"""Writes a shape to disk as a Hugging Face folder of safetensors, as fast as the disk takes it.

The data of a file is cut into pieces; each piece has its own generator, seeded by (seed, file,
piece), so threads make and write pieces in any order and the bytes are the same. A GPU makes other
numbers than the CPU: bytes follow from the seed and the kind of device together.
"""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from sllm_node.bench.devices import as_bytes, is_cuda
from sllm_node.bench.shapes import ELEMENT_BYTES, Shape, ShapedTensor
from sllm_node.core.errors import StorageWriteError, StoreFullError
from sllm_node.core.units import align_up

FILE_BYTES: Final = 4_500_000_000
"""A file at most, but for a tensor that is larger."""
SPREAD: Final = 0.02
_PIECE_ELEMENTS: Final = 1 << 25
_THREADS_MAX: Final = 16
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Part:
    """One safetensors file."""

    number: int
    path: Path
    header: bytes
    elements: int


def synthesise(
    shape: Shape, folder: Path, *, seed: int = 0, device: str = "cpu", file_bytes: int = FILE_BYTES
) -> Path:
    """Write `shape` to `folder`, unless it is there, and return `folder`.

    Raises:
        StoreFullError: it does not fit on the disk.
        StorageWriteError: the disk failed.
    """
    if folder.is_dir():
        return folder
    hidden = folder.parent / f".tmp-{folder.name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(folder.parent, shape.size)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        _write_parts(shape, hidden, seed, device, file_bytes)
        shape.config.save_pretrained(hidden)
        _write_tokenizer(hidden)
        hidden.rename(folder)
    except OSError as error:
        raise StorageWriteError(str(folder), error.strerror or str(error)) from error
    return folder


def check_room(folder: Path, needed: int) -> None:
    """Make sure that `needed` bytes fit on the disk of `folder`.

    Raises:
        StoreFullError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreFullError(str(folder), needed, free)


def _write_parts(shape: Shape, folder: Path, seed: int, device: str, file_bytes: int) -> None:
    groups = _grouped(shape.tensors, file_bytes)
    weight_map: dict[str, str] = {}
    parts: list[_Part] = []
    for number, tensors in enumerate(groups):
        name = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
        elements = sum(tensor.elements for tensor in tensors)
        parts.append(_Part(number, folder / name, _header(tensors), elements))
    for part in parts:
        _write_part(part, seed, device)
    index = {"metadata": {"total_size": shape.size}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _grouped(tensors: tuple[ShapedTensor, ...], file_bytes: int) -> list[list[ShapedTensor]]:
    groups: list[list[ShapedTensor]] = [[]]
    room = file_bytes
    for tensor in tensors:
        if tensor.size > room and groups[-1]:
            groups.append([])
            room = file_bytes
        groups[-1].append(tensor)
        room -= tensor.size
    return groups


def _header(tensors: list[ShapedTensor]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.dimensions),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(align_up(len(text), 8))
    return struct.pack("<Q", len(text)) + text


def _write_part(part: _Part, seed: int, device: str) -> None:
    descriptor = os.open(part.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_at(descriptor, memoryview(part.header), 0)
        write = partial(_write_piece, descriptor, part, seed, device)
        with ThreadPoolExecutor(min(_THREADS_MAX, os.cpu_count() or 1), "bench-write") as threads:
            list(threads.map(write, range(-(-part.elements // _PIECE_ELEMENTS))))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_piece(descriptor: int, part: _Part, seed: int, device: str, piece: int) -> None:
    start = piece * _PIECE_ELEMENTS
    count = min(_PIECE_ELEMENTS, part.elements - start)
    numbers = _gaussian((seed, part.number, piece), count, device)
    data = as_bytes(numbers).numpy().data
    _write_at(descriptor, data, len(part.header) + start * ELEMENT_BYTES)


def _gaussian(seeds: tuple[int, ...], count: int, device: str) -> torch.Tensor:
    """Return `count` bfloat16 in host memory."""
    sequence = np.random.SeedSequence(seeds)
    if not is_cuda(device):
        numbers = np.random.default_rng(sequence).standard_normal(count, np.float32)
        numbers *= np.float32(SPREAD)
        return torch.from_numpy(numbers).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1)[0]))
    made = torch.randn(count, generator=generator, device=device, dtype=torch.bfloat16)
    return made.mul_(SPREAD).cpu()


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _write_tokenizer(folder: Path) -> None:
    """Write the smallest tokenizer that loads: our format wants one, and no text is made of it."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
