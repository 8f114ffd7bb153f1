"""Puts together what queries gave over parts of their context, by our kernel.

Each query has looked at what is near, and at any number of segments farther away; every look gives a
result and the logarithm of the sum that it was divided by. One launch does what takes torch five, and a
layer has not much else to launch. `decode_reference.joined` says the same in plain torch.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from sllm_node.device.step_parameters import JOIN, Variant
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

Look = tuple[torch.Tensor, torch.Tensor]
"""Results (queries, heads, size), and logarithms of sums (heads, queries) in fp32."""
JoinLayer = Callable[[Look, Look, torch.Tensor], None]
"""Of one layer: joins what is near and what is far to an output; all are alike in all layers."""
_NAME: Final = "join_segments"
_THREADS: Final = 256
_ELEMENTS: Final = 8 * _THREADS
_TOKENS_MAX: Final = 65535
"""Of a grid's second dimension."""


def prepared(
    kernels: Kernels, near: Look, far: Look, places: torch.Tensor, output: torch.Tensor
) -> JoinLayer:
    """Return what joins looks like these, on this stream.

    `places`: (3, tokens) int32; of each token its first row in `far`, how many there are, how far apart.

    Raises:
        KernelError: the tensors don't fit.
    """
    tokens, heads, size = near[0].shape
    need(_NAME, size % 8 == 0, f"heads of {size} elements, which is no multiple of 8")
    check_integers(_NAME, "places", places, output, (3, tokens))
    need(_NAME, places.is_contiguous(), "places that are not contiguous")
    need(_NAME, tokens <= _TOKENS_MAX, f"{tokens} tokens, more than {_TOKENS_MAX}")
    _check(near, far, output)
    record = np.zeros(1, JOIN)
    record["places"], record["tokens"] = places.data_ptr(), tokens
    record["heads"], record["size"] = heads, size
    record["near_stride"], record["output_stride"] = near[0].stride(0), output.stride(0)
    record["near_logs_stride"], record["far_logs_stride"] = near[1].stride(0), far[1].stride(0)
    grid = (-(-heads * size // _ELEMENTS), tokens, 1)
    launch = kernels.prepared(
        Variant(_NAME, (kind_of(output),)), grid, _THREADS, record, stream_of(output)
    )
    labels = ("near_part", "near_logs", "far_parts", "far_logs", "output")
    addresses = [record[label] for label in labels]
    wanted = [form_of(tensor) for tensor in (*near, *far, output)]

    def join_layer(near: Look, far: Look, output: torch.Tensor) -> None:
        given = (*near, *far, output)
        for tensor, form, address in zip(given, wanted, addresses, strict=True):
            need(_NAME, form_of(tensor) == form, "tensors unlike those of the first layer")
            address[0] = tensor.data_ptr()
        launch()

    return join_layer


def _check(near: Look, far: Look, output: torch.Tensor) -> None:
    tokens, heads, size = near[0].shape
    rows = len(far[0])
    for label, tensor, count in (
        ("near", near[0], tokens), ("far", far[0], rows), ("output", output, tokens),
    ):  # fmt: skip
        check_heads(_NAME, label, tensor, output, (count, heads, size))
        aligned_address(_NAME, label, tensor)
    need(_NAME, far[0].is_contiguous(), "far parts that are not contiguous")
    for label, logs, count in (("near", near[1], tokens), ("far", far[1], rows)):
        fits = logs.dtype == torch.float32 and tuple(logs.shape) == (heads, count)
        found = f"logarithms of {label} sums of {tuple(logs.shape)} in {logs.dtype}"
        need(_NAME, fits and logs.stride(1) == 1 and logs.device == output.device, found)
