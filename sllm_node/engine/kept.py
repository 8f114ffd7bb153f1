"""What of a replica outlives it: its module, and where its KV memory was.

A model that was served and evicted comes back to the same addresses. What points there (parameters,
views, captured steps) is kept, so that its return costs its bytes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.checkpoint.split import layer_starts
from sllm_node.device.base import DeviceBuffer
from sllm_node.engine.decode_batch import DecodeBatch
from sllm_node.engine.kv import KvCache, KvMemory, bytes_per_token
from sllm_node.engine.skeleton import LayerShape, Model, build_skeleton, layer_shapes
from sllm_node.engine.spread import spread
from sllm_node.engine.weights import WeightPart, bind, unbind


@dataclass(frozen=True, slots=True)
class KvPlace:
    """Where a replica's KV memory is, or was: addresses, views of them, steps that were captured."""

    memory: tuple[KvMemory, ...]
    cache: KvCache
    decode: DecodeBatch | None

    def unmap(self) -> None:
        """Give the memory back, and keep the rest for the model's return."""
        for one in self.memory:
            one.buffer.unmap(set(one.buffer.mapped))

    def close(self) -> None:
        """Give everything up."""
        if self.decode is not None:
            self.decode.close()
        self.cache.close()
        for one in self.memory:
            one.buffer.close()


@dataclass(slots=True)
class Skeleton:
    """A module, and what its layers keep of a token.

    Without weights at first. `bound_to` are the buffers that its parameters are views of: they keep
    their addresses for life, so a module that comes back to the same ones needs no binding.
    """

    model: Model
    shapes: tuple[LayerShape, ...]
    token_bytes: int
    bound_to: tuple[DeviceBuffer, ...] = ()
    kv: KvPlace | None = None
    """Of the last replica, without memory, while there is none."""

    def bind(self, index: TensorIndex, parts: Sequence[WeightPart]) -> None:
        """Make its parameters views of the buffers of `parts`; on a step thread, alone.

        Raises:
            CheckpointFormatError: index and module do not agree.
        """
        try:
            bind(self.model, index, parts)
        except BaseException:
            unbind(self.model)
            raise
        if len(parts) > 1:
            spread(self.model)
        self.bound_to = tuple(part.buffer for part in parts)

    def take_kv(self, sizes: Sequence[tuple[str, int]]) -> KvPlace | None:
        """Return the place of the last replica if it fits (device, bytes) of each part; forget it."""
        found, self.kv = self.kv, None
        if found is None:
            return None
        if [(one.device, one.buffer.size) for one in found.memory] == list(sizes):
            return found
        found.close()
        return None


def build(directory: Path) -> Skeleton:
    """Return the module of a checkpoint, without weights.

    Raises:
        UnsupportedArchitectureError: the step loop can't serve it.
    """
    model = build_skeleton(directory)
    shapes = layer_shapes(model)
    return Skeleton(model, shapes, bytes_per_token(shapes, model.dtype))


def layers_on(
    parts: Sequence[WeightPart], index: TensorIndex, shapes: Sequence[LayerShape]
) -> list[tuple[str, tuple[LayerShape, ...]]]:
    """Return the device of each part of a model and the shapes of the layers there."""
    if len(parts) == 1:
        return [(parts[0].part.device, tuple(shapes))]
    starts = layer_starts(index)
    found = []
    for one in parts:
        inside = [n for n, start in enumerate(starts) if one.part.start <= start < one.part.end]
        found.append((one.part.device, tuple(shapes[number] for number in inside)))
    return found
