"""Brings together what prompts' pieces look at, by our kernel: keys and values from their slots, and queries.

Torch would take three launches a layer and new memory for each; here it is one launch into memory that
serves all layers of a step.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from sllm_node.device.step_parameters import GATHER, Variant
from sllm_node.engine.kernel_tensors import (
    Kernels,
    aligned_address,
    check_heads,
    check_integers,
    form_of,
    kind_of,
    need,
    stream_of,
)

Gathered = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys, values and queries, (tokens, heads, size) each; the next layer's take their place."""
GatherLayer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Gathered]
"""Of one layer's queries, keys and values; all are alike in all layers."""
_NAME: Final = "gather_context"
_THREADS: Final = 256
_TILE: Final = 32 * _THREADS
_ELEMENTS_MAX: Final = 1 << 34
"""Of keys: their vectors of 8 elements are counted in 32 bits."""


def prepared(
    kernels: Kernels,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
) -> GatherLayer:
    """Return what gathers keys and values from `slots`, and the `rows` of queries, on this stream.

    Raises:
        KernelError: the tensors don't fit.
    """
    _check(query, keys, values)
    check_integers(_NAME, "slots", slots, query, (len(slots),))
    check_integers(_NAME, "rows", rows, query, (len(rows),))
    made = [keys.new_empty(len(slots), *keys.shape[1:]) for _ in range(2)]
    made.append(query.new_empty(len(rows), *query.shape[1:]))
    need(_NAME, max(one.numel() for one in made) < _ELEMENTS_MAX, "so many elements")
    record = np.zeros(1, GATHER)
    record["slots"], record["rows"] = slots.data_ptr(), rows.data_ptr()
    record["tokens"], record["query_rows"] = len(slots), len(rows)
    record["width"], record["query_width"] = keys[0].numel(), query[0].numel()
    record["query_stride"] = query.stride(0)
    for label, one in zip(("key", "value", "queries"), made, strict=True):
        record[label] = one.data_ptr()
    blocks = -(-made[0].numel() // _TILE) + -(-made[2].numel() // _TILE)
    variant = Variant(_NAME, (kind_of(query),))
    launch = kernels.prepared(variant, (blocks, 1, 1), _THREADS, record, stream_of(query))
    addresses = [record[label] for label in ("query", "keys", "values")]
    forms = [form_of(one) for one in (query, keys, values)]

    def gather_layer(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Gathered:
        given = (query, keys, values)
        for tensor, form, address in zip(given, forms, addresses, strict=True):
            need(_NAME, form_of(tensor) == form, "tensors unlike those of the first layer")
            address[0] = tensor.data_ptr()
        launch()
        return made[0], made[1], made[2]

    return gather_layer


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    for label, tensor, like in (
        ("query", query, query),
        ("keys", keys, keys),
        ("values", values, keys),
    ):
        check_heads(_NAME, label, tensor, query, tuple(like.shape))
        aligned_address(_NAME, label, tensor)
        need(_NAME, label == "query" or tensor.is_contiguous(), f"{label} that are not contiguous")
        elements = tensor[0].numel()
        need(_NAME, elements % 8 == 0, f"{label} of {elements} elements, which is no multiple of 8")
