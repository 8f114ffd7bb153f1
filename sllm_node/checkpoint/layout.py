"""Plan where tensors lie: in the order given, aligned, never across shards, shards of whole pages."""

from collections.abc import Iterable
from dataclasses import dataclass

from sllm_node.checkpoint.index import TENSOR_ALIGNMENT, TensorEntry, tensor_size
from sllm_node.core.units import PAGE, align_up


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that wants a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return tensor_size(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of all tensors and the sizes of the shards that hold them."""

    tensors: tuple[TensorEntry, ...]
    shard_sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(self.shard_sizes)


def plan_layout(tensors: Iterable[TensorSpec], shard_bytes: int) -> Layout:
    """Place `tensors` in their order into shards of at most `shard_bytes`.

    A tensor that is larger than a shard gets a shard of its own size.
    """
    assert shard_bytes >= PAGE
    entries: list[TensorEntry] = []
    ends = [0]
    for spec in tensors:
        offset = align_up(ends[-1], TENSOR_ALIGNMENT)
        if offset + spec.size > shard_bytes and ends[-1] > 0:
            ends.append(0)
            offset = 0
        ends[-1] = offset + spec.size
        entries.append(
            TensorEntry(spec.name, spec.dtype, spec.shape, len(ends) - 1, offset, spec.size)
        )
    return Layout(tuple(entries), tuple(max(PAGE, align_up(end, PAGE)) for end in ends))
