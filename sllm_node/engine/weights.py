"""Puts a checkpoint's bytes into a module: every parameter a view of device memory, none copied."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.errors import CheckpointFormatError
from sllm_node.core.types import Part
from sllm_node.device.base import DeviceBuffer

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class WeightPart(Protocol):
    """Bytes of a checkpoint and the device memory that they lie in."""

    @property
    def part(self) -> Part: ...

    @property
    def buffer(self) -> DeviceBuffer: ...


def torch_name(device: str) -> str:
    """Return what torch calls a device of the config: it knows one CPU only."""
    return "cpu" if device.startswith("cpu") else device


def bind(model: Any, index: TensorIndex, parts: Sequence[WeightPart]) -> None:
    """Make every parameter and persistent buffer of `model` a view of the memory of `parts`.

    Buffers that are not stored (rotary frequencies, embedding scales) are computed anew. Changes
    torch's random state: never beside a step.

    Raises:
        CheckpointFormatError: the index and the module do not have the same tensors.
    """
    bind_views(model, index, tensor_views(index, parts), torch_name(parts[0].part.device))


def bind_views(
    model: Any, index: TensorIndex, stored: Mapping[str, torch.Tensor], device: str
) -> None:
    """Make every parameter and persistent buffer of `model` one of `stored`, as `bind` does.

    Buffers of modules without parameters are computed on `device`.

    Raises:
        CheckpointFormatError: the index and the module do not have the same tensors.
    """
    views = dict(stored)
    for alias, name in index.aliases:
        views[alias] = views[name]
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, view in views.items():
        _set(model, name, view, parameters, index)
    _compute_rest(model, torch.device(device))
    left = [name for name, t in _all_tensors(model) if t.is_meta]
    if left:
        raise CheckpointFormatError(index.model, f"has no bytes for {', '.join(left[:5])}")


def tensor_views(index: TensorIndex, parts: Sequence[WeightPart]) -> dict[str, torch.Tensor]:
    """Return every stored tensor as a view of the memory of `parts`; tied names are not repeated.

    Raises:
        CheckpointFormatError: a tensor lies on no device as a whole.
    """
    return views_of(
        index,
        [
            (p.part.start, torch.as_tensor(p.buffer.array, device=torch_name(p.part.device)))
            for p in parts
        ],
    )


def views_of(
    index: TensorIndex, flats: Sequence[tuple[int, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return every stored tensor as a view of one of `flats`.

    Each is (size,) uint8, with the byte of the checkpoint that it begins with.

    Raises:
        CheckpointFormatError: a tensor lies in none as a whole.
    """
    return views_by(index, lambda start, end: _bytes_of(start, end, flats, index))


def views_by(
    index: TensorIndex, bytes_of: Callable[[int, int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return every stored tensor as a view of `bytes_of(start, end)`, uint8 of the checkpoint."""
    bases = [index.shard_base(number) for number in range(len(index.shards))]
    views: dict[str, torch.Tensor] = {}
    for entry in index.tensors:
        start = bases[entry.shard] + entry.offset
        raw = bytes_of(start, start + entry.size)
        views[entry.name] = raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
    return views


def unbind(model: Any) -> None:
    """Drop every view that `bind` made, so that the buffer can be closed at once."""
    for module in model.modules():
        for name in module._parameters:  # noqa: SLF001 - torch has no public way to drop a parameter
            module._parameters[name] = None  # noqa: SLF001
        for name in module._buffers:  # noqa: SLF001
            module._buffers[name] = None  # noqa: SLF001


def _bytes_of(
    start: int, end: int, flats: Sequence[tuple[int, torch.Tensor]], index: TensorIndex
) -> torch.Tensor:
    for first, flat in flats:
        if first <= start and end <= first + len(flat):
            return flat[start - first : end - first]
    raise CheckpointFormatError(index.model, f"bytes {start} to {end} lie on no device")


def _set(
    model: Any,
    name: str,
    view: torch.Tensor,
    parameters: dict[int, torch.nn.Parameter],
    index: TensorIndex,
) -> None:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
    except AttributeError as error:
        raise CheckpointFormatError(index.model, f"{name} is no tensor of the module") from error
    if old.shape != view.shape:
        problem = f"{name} has shape {tuple(view.shape)}, the module wants {tuple(old.shape)}"
        raise CheckpointFormatError(index.model, problem)
    if leaf in owner._parameters:  # noqa: SLF001 - as above
        made = parameters.setdefault(id(view), torch.nn.Parameter(view, requires_grad=False))
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
        owner._parameters[leaf] = made  # noqa: SLF001
    else:
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
        owner._buffers[leaf] = view  # noqa: SLF001


def _compute_rest(model: Any, device: torch.device) -> None:
    """Allocate and compute the buffers that no checkpoint stores.

    transformers computes them where it initialises weights; what is marked as initialised (all that
    `_set` has bound) it leaves alone.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if _is_meta(module, name)]  # noqa: SLF001
        own = next((p.device for p in module.parameters()), device)
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=own)  # noqa: SLF001
        if names:
            with torch.no_grad():
                model._init_weights(module)  # noqa: SLF001 - where transformers computes them


def _is_meta(module: Any, name: str) -> bool:
    buffer = module._buffers.get(name)  # noqa: SLF001
    return buffer is not None and buffer.is_meta


def _all_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
