"""From a hub checkpoint's names to the module's: which source tensors make which module tensors.

transformers 5 renames, fuses and splits tensors while it loads a model. Its own rules are asked
here, and its own conversions are run, but for the tensors of one group at a time, so that memory
holds a group and never a model. Experts that are stacked are not even that: a stack's bytes are those
of the experts one after another, so they are copied as they are read.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sllm_node.convert.safetensors import few
from sllm_node.convert.tensors import SourceTensor, load
from sllm_node.core.errors import ConversionError

_LEFTOVER: Final = re.compile(r"\.(attn|attention)\.masked_bias$")
"""A constant that GPT-2 and its kin once stored; transformers ignores it with a warning."""


@dataclass(slots=True)
class Group:
    """Source tensors that one conversion turns into one or more module tensors."""

    name: str
    """The module tensor that transformers names it by."""
    converter: Any | None
    """None: the only source is the module tensor under another name."""
    sources: dict[str, list[SourceTensor]] = field(default_factory=dict)
    """By the converter's source pattern, in the order of loading."""

    @property
    def members(self) -> list[SourceTensor]:
        """All sources."""
        return [source for sources in self.sources.values() for source in sources]

    def outputs(self) -> list[str]:
        """Return the names of the module tensors that come out."""
        if self.converter is None:
            return [self.name]
        first = self.converter.target_patterns[0]
        return [self.name.replace(first, other) for other in self.converter.target_patterns]

    def stack_size(self) -> int | None:
        """Return how many parts are stacked, if that is all that the conversion does."""
        if self.converter is None:
            return None
        first, *rest = self.converter.operations
        lengths = {len(sources) for sources in self.sources.values()}
        is_stack = (
            type(first) is MergeModulelist
            and first.dim == 0
            and len(self.converter.target_patterns) == 1
            and len(rest) == (len(self.converter.source_patterns) > 1)
            and all(type(operation) is Concatenate and operation.dim == 1 for operation in rest)
        )
        complete = len(self.sources) == len(self.converter.source_patterns) and len(lengths) == 1
        return lengths.pop() if is_stack and complete else None

    def parts(self) -> list[list[SourceTensor]] | None:
        """Return the sources whose bytes one after another come out, part by part, if that is so.

        A part has more than one where they are joined first, as gate and up projection of an expert.
        """
        if self.converter is None:
            return [self.members]
        count = self.stack_size()
        if count is None:
            return None
        patterns = self.converter.source_patterns
        return [[self.sources[pattern][part] for pattern in patterns] for part in range(count)]


def group_sources(model: Any, tensors: Mapping[str, SourceTensor], source: str) -> dict[str, Group]:
    """Return the group that each module tensor comes from, by the rules of transformers.

    Raises:
        ConversionError: tensors that the model has no use for, or two for one place.
    """
    wanted = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted:
            unexpected.add(name)
            continue
        if pattern is None and name in groups:
            raise ConversionError(source, f"{key} and another tensor are both {name}")
        rule = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(name, Group(name, rule))
        group.sources.setdefault(pattern or key, []).append(tensors[key])
    if unused := _not_ignorable(model, unexpected):
        raise ConversionError(source, f"has tensors the model has no place for: {few(unused)}")
    return {output: group for group in groups.values() for output in group.outputs()}


def module_groups(model: Any, tensors: Mapping[str, SourceTensor]) -> dict[str, Group]:
    """Return the groups of tensors that have the module's names and shapes already."""
    wanted = model.state_dict()
    return {
        name: Group(name, None, {name: [tensor]})
        for name, tensor in tensors.items()
        if name in wanted
    }


def _not_ignorable(model: Any, unexpected: set[str]) -> list[str]:
    """Return what of `unexpected` transformers does not declare to be leftovers."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)  # noqa: SLF001 - the rules have no other door
    return sorted(name for name in info.unexpected_keys if not _LEFTOVER.search(name))


def kept_in_fp32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what matches the tensors that transformers keeps in fp32 when a model has `dtype`."""
    patterns = model._get_dtype_plan(dtype)  # noqa: SLF001 - the rules have no other door
    if not patterns:
        return None
    return re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in patterns))


class GroupRunner:
    """Runs the conversions of groups, and keeps the outputs of one until all are fetched."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._outputs: dict[str, torch.Tensor] = {}

    def output(self, group: Group, name: str) -> torch.Tensor:
        """Return module tensor `name`, which comes out of `group`."""
        if name not in self._outputs:
            self._outputs.clear()
            self._outputs = self._convert(group, name)
        return self._outputs.pop(name)

    def _convert(self, group: Group, wanted: str) -> dict[str, torch.Tensor]:
        converter = deepcopy(group.converter)
        assert converter is not None
        for pattern, found in group.sources.items():
            for tensor in found:
                converter.add_tensor(group.name, tensor.name, pattern, lambda t=tensor: load(t))
        try:
            outputs = converter.convert(group.name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConversionError(
                group.name, f"can't be made of {_names(group)}: {error}"
            ) from error
        if wanted not in outputs:
            raise ConversionError(wanted, f"does not come out of {_names(group)}")
        return {
            name: (tensor[0] if isinstance(tensor, list) else tensor).detach()
            for name, tensor in outputs.items()
        }


def _names(group: Group) -> str:
    return few([tensor.name for tensor in group.members])
