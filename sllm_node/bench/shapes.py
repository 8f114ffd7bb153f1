"""Checkpoints of named shapes: the tensors of well-known models, filled with random numbers.

What loading costs depends on names, shapes and bytes and not on what the numbers mean, so nothing
has to be downloaded. Tensors are those of the module: the experts of a layer are two. The values are Gaussian with the spread of trained weights, because a codec
would notice a difference.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from sllm_node.core.errors import BenchError

ELEMENT_BYTES: Final = 2
"""All tensors are bfloat16."""

_SHAPES: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "8b": (
        "Llama-3.1-8B",
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072, "tie_word_embeddings": False,
        },
    ),
    "32b": (
        "Qwen3-32B",
        "qwen3",
        {
            "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        },
    ),
    "30b-a3b": (
        "Qwen3-30B-A3B",
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        },
    ),
    "opt-6.7b": (
        "OPT-6.7B",
        "opt",
        {
            "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
            "word_embed_proj_dim": 4096,
        },
    ),
    "tiny": (
        "tiny Llama",
        "llama",
        {
            "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192,
            "max_position_embeddings": 512, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
SHAPE_NAMES: Final = tuple(_SHAPES)


@dataclass(frozen=True, slots=True)
class ShapedTensor:
    """A tensor of a shape."""

    name: str
    dimensions: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers."""
        return prod(self.dimensions)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class Shape:
    """The tensors of a model, in the order of its modules, and its config."""

    name: str
    title: str
    config: Any
    """transformers'."""
    tensors: tuple[ShapedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


def find_shape(name: str) -> Shape:
    """Return the shape called `name`.

    Raises:
        BenchError: there is none of that name.
    """
    if name not in _SHAPES:
        raise BenchError(f"there is no shape {name!r}; there are {', '.join(SHAPE_NAMES)}")
    title, model_type, fields = _SHAPES[name]
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    found: dict[int, ShapedTensor] = {}
    for tensor_name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ShapedTensor(tensor_name, tuple(tensor.shape)))
    return Shape(name, title, config, tuple(found.values()))
