"""What an engine is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from sllm_node.core.types import ModelId
from sllm_node.device.base import DeviceBuffer
from sllm_node.engine.arriving import Arriving
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.decode_batch import DecodeBatch
from sllm_node.engine.interleave import Seat
from sllm_node.engine.kv import KvCache
from sllm_node.engine.offloading import Offloading
from sllm_node.engine.skeleton import Model
from sllm_node.engine.text import TextCodec


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of; it owns all of it and gives it up in `close`."""

    name: ModelId
    model: Model
    cache: KvCache
    buffers: tuple[DeviceBuffer, ...]
    blocks: Blocks
    decode: DecodeBatch | None
    """Fast steps for sessions that decode; None: the module's forward pass does them."""
    context_tokens: int
    window: int | None
    """How far back any layer looks, in tokens; None: to the beginning."""
    codec: TextCodec
    check: Callable[[], None]
    """Makes sure that the devices still work."""
    let_go: Callable[[bool], None]
    """Gives KV memory back, on the step thread; the argument: whether the rest may serve again."""
    keep: Callable[[], None]
    """Called when the module is free for the next replica."""
    seat: Seat
    """Its place among the engines of the device."""
    arriving: Arriving | None = None
    """What steps wait through while the weights are on their way; None: they are all there."""
    offloading: Offloading | None = None
    """Where blocks of preempted sessions go; None: they are computed again."""
