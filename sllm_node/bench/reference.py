"""What the tensors must be: an independent copy of the bytes, and the comparison with it.

It is read from the safetensors files by nobody who is compared: headers parsed here, bytes by pread.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from sllm_node.bench.devices import as_bytes, free_memory
from sllm_node.bench.files import ModelFiles, read_at

_THREADS: Final = 8
_ROOM: Final = 2.15
"""A copy on the device, a load beside it and what a peer stages must fit, in sizes of the model."""

Bytes = Callable[[], torch.Tensor]
"""Gives (size,) uint8."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a load compares with the reference."""

    same: int
    different: tuple[str, ...]
    missing: tuple[str, ...]


class Reference:
    """The bytes of every tensor of a model: held, or read anew for each comparison."""

    def __init__(self, tensors: Mapping[str, Bytes]) -> None:
        self._tensors = tensors

    def compare(self, loaded: Mapping[str, torch.Tensor]) -> Comparison:
        """Compare byte for byte, on the device that `loaded` is on."""
        same, different, missing = 0, [], []
        for name, expected in self._tensors.items():
            found = loaded.get(name)
            if found is None:
                missing.append(name)
                continue
            raw = as_bytes(found)
            if torch.equal(raw, expected().to(raw.device)):
                same += 1
            else:
                different.append(name)
        return Comparison(same, tuple(different), tuple(missing))


def read_reference(
    files: ModelFiles, device: str, free: Callable[[str], int] = free_memory
) -> Reference:
    """Read the safetensors of `files` onto `device`; without room there, when they are compared."""
    spans = [span for path in files.safetensors() for span in _spans(Path(path))]
    if free(device) < _ROOM * files.size:
        return Reference({span.name: partial(_read, span) for span in spans})
    with ThreadPoolExecutor(_THREADS, "bench-reference") as threads:
        found = threads.map(_read, spans)
        return Reference(
            {
                span.name: partial(_held, raw.to(device))
                for span, raw in zip(spans, found, strict=True)
            }
        )


def _held(raw: torch.Tensor) -> torch.Tensor:
    return raw


@dataclass(frozen=True, slots=True)
class _Span:
    path: Path
    name: str
    offset: int
    size: int


def _spans(path: Path) -> list[_Span]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        fields = json.loads(file.read(length))
    fields.pop("__metadata__", None)
    found = ((name, *entry["data_offsets"]) for name, entry in fields.items())
    return [_Span(path, name, 8 + length + start, end - start) for name, start, end in found]


def _read(span: _Span) -> torch.Tensor:
    raw = torch.empty(span.size, dtype=torch.uint8)
    descriptor = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_at(descriptor, raw.numpy().data, span.offset)
    finally:
        os.close(descriptor)
    return raw
