"""Plan a conversion: every module tensor, in forward order, with its dtype and where it comes from."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import torch

from sllm_node.checkpoint.index import FLOAT_DTYPES
from sllm_node.checkpoint.layout import TensorSpec
from sllm_node.convert.mapping import (
    Group,
    GroupRunner,
    group_sources,
    kept_in_fp32,
    module_groups,
)
from sllm_node.convert.safetensors import SLICE_BYTES, few
from sllm_node.convert.sources import Source
from sllm_node.convert.tensors import (
    COMPUTE_DTYPES,
    STORED_DTYPES,
    SourceTensor,
    as_bytes,
    cast_slice,
)
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES

_DEFAULT_DTYPE: Final = "BF16"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A module tensor to be written."""

    spec: TensorSpec
    group: Group


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion writes."""

    tensors: tuple[PlannedTensor, ...]
    aliases: tuple[tuple[str, str], ...]
    compute_dtype: str
    """What the forward pass runs in; goes into the config."""

    @property
    def dtype(self) -> str:
        """The float dtype that holds most bytes."""
        return _most_common((t.spec for t in self.tensors), FLOAT_DTYPES) or self.compute_dtype


def plan_tensors(
    model: Any, order: tuple[str, ...], source: Source, dtype: str | None, origin: str
) -> Plan:
    """Return what to write for `model`, whose tensors the forward pass needs in `order`.

    `dtype` is what float tensors are cast to; None keeps what the source has most of.

    Raises:
        ConversionError: tensors are missing, superfluous or of the wrong shape.
    """
    groups = (
        module_groups(model, source.tensors)
        if source.in_module_layout
        else group_sources(model, source.tensors, origin)
    )
    if source.is_exact and (unused := sorted(source.tensors.keys() - model.state_dict().keys())):
        raise ConversionError(origin, f"has tensors that its class has no place for: {few(unused)}")
    aliases = _aliases(model, order)
    for alias, name in aliases.items():
        _tie(groups, alias, name, origin)
    if missing := [name for name in order if name not in groups]:
        raise ConversionError(origin, f"lacks tensors of the model: {few(missing)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {n: TensorSpec(n, _joint_dtype(groups[n], origin), shapes[n]) for n in order}
    compute = _compute_dtype(found.values(), dtype)
    fp32 = kept_in_fp32(model, TORCH_DTYPES[compute])
    choose = _DtypeChoice(dtype, compute, fp32, is_exact=source.is_exact)
    planned = tuple(
        PlannedTensor(replace(spec, dtype=choose(spec)), groups[spec.name])
        for spec in found.values()
    )
    for tensor in planned:
        _check_shape(tensor, origin)
    return Plan(planned, tuple(aliases.items()), compute)


def check_computable(plan: Plan, model: Any, origin: str) -> None:
    """Refuse parameters of `model` that its forward pass would fail with, as they are planned.

    Raises:
        ConversionError: naming them, and what to do.
    """
    tensors = model.state_dict(keep_vars=True)
    found: dict[str, list[str]] = {}
    for spec in (tensor.spec for tensor in plan.tensors):
        if spec.dtype not in COMPUTE_DTYPES and isinstance(tensors[spec.name], torch.nn.Parameter):
            found.setdefault(spec.dtype, []).append(spec.name)
    for dtype, names in found.items():
        is_float = dtype in FLOAT_DTYPES
        do = "give --dtype bfloat16" if is_float else "convert the original, unquantised model"
        problem = f"has weights in {dtype}, in which no node computes: {few(names)}; {do}"
        raise ConversionError(origin, problem)


@dataclass(frozen=True, slots=True)
class _DtypeChoice:
    """Which dtype a tensor is stored with."""

    requested: str | None
    compute: str
    fp32: re.Pattern[str] | None
    """Tensors that a model in half precision keeps in fp32."""
    is_exact: bool
    """Whether dtypes stay as they are if none is requested."""

    def __call__(self, spec: TensorSpec) -> str:
        if self.is_exact and self.requested is None:
            return spec.dtype
        is_cast = spec.dtype in (COMPUTE_DTYPES if self.requested is None else FLOAT_DTYPES)
        if not is_cast:
            return spec.dtype
        if self.fp32 is not None and self.fp32.search(spec.name):
            return "F32"
        return self.requested or self.compute


def _compute_dtype(tensors: Iterable[TensorSpec], requested: str | None) -> str:
    if requested in COMPUTE_DTYPES:
        return requested
    return _most_common(tensors, COMPUTE_DTYPES) or _DEFAULT_DTYPE


def _aliases(model: Any, order: tuple[str, ...]) -> dict[str, str]:
    """Return tied name → stored name; tied tensors are the same object."""
    tensors = model.state_dict(keep_vars=True)
    stored = {id(tensors[name]): name for name in order}
    return {
        name: stored[id(tensor)] for name, tensor in tensors.items() if stored[id(tensor)] != name
    }


def tensor_bytes(tensor: PlannedTensor, runner: GroupRunner) -> Iterator[memoryview]:
    """Yield the bytes to be written of `tensor`, in slices.

    Raises:
        ConversionError: the conversion fails, or does not give what was planned.
    """
    spec = tensor.spec
    parts = tensor.group.parts()
    if parts is None:
        yield from _converted_bytes(tensor, runner)
        return
    for source in chain.from_iterable(parts):
        for piece in source.slices():
            yield cast_slice(piece, source.dtype, spec.dtype, spec.name)


def _converted_bytes(tensor: PlannedTensor, runner: GroupRunner) -> Iterator[memoryview]:
    spec = tensor.spec
    found = runner.output(tensor.group, spec.name)
    if tuple(found.shape) != spec.shape:
        raise ConversionError(
            spec.name, f"came out with shape {tuple(found.shape)}, the model wants {spec.shape}"
        )
    view = as_bytes(found)
    for start in range(0, len(view), SLICE_BYTES):
        piece = view[start : start + SLICE_BYTES]
        yield cast_slice(piece, STORED_DTYPES[found.dtype], spec.dtype, spec.name)


def _tie(groups: dict[str, Group], alias: str, name: str, origin: str) -> None:
    """Let `name` be made of what the source has for either of the two tied names."""
    other = groups.pop(alias, None)
    if other is None:
        return
    if name not in groups:
        groups[name] = other
    elif not _are_equal(groups[name].members, other.members):
        raise ConversionError(
            origin,
            f"{alias} and {name} differ, though the config ties them; "
            "if they are meant to differ, set tie_word_embeddings to false in config.json",
        )


def _are_equal(one: list[SourceTensor], other: list[SourceTensor]) -> bool:
    if [(t.dtype, t.shape) for t in one] != [(t.dtype, t.shape) for t in other]:
        return False
    return all(
        before == after
        for left, right in zip(one, other, strict=True)
        for before, after in zip(left.slices(), right.slices(), strict=True)
    )


def _joint_dtype(group: Group, origin: str) -> str:
    """Return the dtype of what comes out of `group`, as torch joins those that go in."""
    found = sorted({tensor.dtype for tensor in group.members})
    if len(found) > 1 and not COMPUTE_DTYPES.issuperset(found):
        raise ConversionError(origin, f"{group.name} would be made of {' and '.join(found)}")
    joint = TORCH_DTYPES[found[0]]
    for other in found[1:]:
        joint = torch.promote_types(joint, TORCH_DTYPES[other])
    return STORED_DTYPES[joint]


def _check_shape(tensor: PlannedTensor, origin: str) -> None:
    """Refuse shapes that can't be right; what a conversion makes is checked when it comes out."""
    group, shape = tensor.group, tensor.spec.shape
    count = group.stack_size()
    if count is not None and count != shape[0]:
        raise ConversionError(
            origin, f"{tensor.spec.name} has {count} parts, the model wants {shape[0]}"
        )
    wanted = shape if count is None else shape[1:]
    for part in group.parts() or ():
        if _joint_shape(part) != wanted:
            found = " and ".join(f"{source.name} has shape {source.shape}" for source in part)
            raise ConversionError(origin, f"{found}, the model wants {wanted}")


def _joint_shape(part: list[SourceTensor]) -> tuple[int, ...] | None:
    """Return the shape of `part` joined along the first dimension; None if it can't be."""
    if len(part) == 1:
        return part[0].shape
    rows, rest = zip(*((source.shape[:1], source.shape[1:]) for source in part), strict=True)
    return (sum(chain.from_iterable(rows)), *rest[0]) if len(set(rest)) == 1 else None


def _most_common(tensors: Iterable[TensorSpec], among: frozenset[str]) -> str | None:
    """Return the dtype out of `among` that holds most bytes."""
    sizes: Counter[str] = Counter()
    for spec in tensors:
        if spec.dtype in among:
            sizes[spec.dtype] += spec.size
    return next((dtype for dtype, _ in sizes.most_common(1)), None)
