"""Where a checkpoint may be cut when one device does not hold it: between two layers.

Tensors lie in the order in which the forward pass needs them, so a range of bytes is a run of
layers; what comes before the first layer goes with it, what comes after the last one with that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sllm_node.checkpoint.index import TensorIndex

_LAYER: Final = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cut:
    """A run of layers."""

    start: int
    end: int
    """Bytes [start, end) of the checkpoint."""
    layers: int


def layer_of(name: str) -> int | None:
    """Return the layer that tensor or module `name` belongs to, if it is inside of one."""
    found = _LAYER.search(f"{name}.")
    return int(found[1]) if found else None


def layer_starts(index: TensorIndex) -> tuple[int, ...]:
    """Return where each layer begins, in bytes of the checkpoint; the first one begins at 0.

    Empty if tensors of different layers are mixed, so that no cut is possible.
    """
    starts: list[int] = []
    last = -1
    for entry in index.tensors:
        found = layer_of(entry.name)
        layer = last if found is None else found
        if layer < last:
            return ()
        if layer > last:
            starts.append(index.shard_base(entry.shard) + entry.offset)
            last = layer
    return (0, *starts[1:]) if starts and len(starts) == last + 1 else ()


def split(index: TensorIndex, kv_bytes: int, rooms: Sequence[int]) -> tuple[Cut, ...] | None:
    """Cut the checkpoint into one part for each of `rooms` bytes; None if it can't be.

    `kv_bytes` of KV memory are shared by the layers evenly. Each part takes about the same share of
    its room.
    """
    starts = (*layer_starts(index), index.size)
    count = len(starts) - 1
    if count < len(rooms):
        return None
    wanted, given = index.size + kv_bytes, sum(rooms)
    cuts: list[Cut] = []
    first, promised = 0, 0.0
    for number, room in enumerate(rooms):
        promised += wanted * room / given
        left = len(rooms) - number - 1
        last = first + 1
        while last < count - left and starts[last + 1] + kv_bytes * (last + 1) / count <= promised:
            last += 1
        last = count if not left else last
        cut = Cut(starts[first], starts[last], last - first)
        if cut.end - cut.start + kv_bytes * cut.layers / count > room:
            return None
        cuts.append(cut)
        first = last
    return tuple(cuts)
