"""A transformers model in memory as a source: its tensors as they are, and the texts it would save."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_node.convert.tensors import MemoryTensor, check_tensor
from sllm_node.convert.texts import write_texts
from sllm_node.core.errors import ConversionError
from sllm_node.engine.skeleton import causal_class


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model in memory. Must not change while it is converted."""

    origin: str
    model: Any
    tensors: Mapping[str, MemoryTensor]
    tokenizer: Any = None
    in_module_layout: bool = True
    is_exact: bool = True

    def write_texts(self, folder: Path) -> None:
        """Write what the model's own save_pretrained would, and the tokenizer if there is one."""
        config = deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        generation = getattr(self.model, "generation_config", None)
        write_texts(config, generation, self.tokenizer, folder, self.origin)


def open_model(model: Any, tokenizer: Any = None) -> ModelSource:
    """Look at `model`, a transformers PreTrainedModel.

    Raises:
        ConversionError: it is no causal language model, is quantised, or lacks its numbers.
    """
    origin = type(model).__name__
    config = model.config
    wanted = causal_class(config)
    if wanted != origin:
        raise ConversionError(
            origin,
            f"is not the causal language model of its config ({wanted or 'there is none'}); "
            "sllm_node.torch.save_dict takes the state_dict() of any module",
        )
    if getattr(config, "quantization_config", None):
        raise ConversionError(origin, "its weights are quantised; save the original model")
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        check_tensor(name, tensor, origin)
    return ModelSource(
        origin, model, {name: MemoryTensor(name, t) for name, t in tensors.items()}, tokenizer
    )
