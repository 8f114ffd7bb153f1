"""Loads a GGUF file through transformers, which dequantises it; this takes memory for the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sllm_node.convert.tensors import TORCH_DTYPES, MemoryTensor
from sllm_node.convert.texts import GENERATION_FILE, check_tokenizer, library_errors_named
from sllm_node.core.errors import ConversionError

DEFAULT_DTYPE: Final = "BF16"
_MAGIC: Final = b"GGUF"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A dequantised model in memory."""

    path: Path
    origin: str
    model: Any
    tensors: Mapping[str, MemoryTensor]
    in_module_layout: bool = True

    def write_texts(self, folder: Path) -> None:
        """Write config, generation config and tokenizer as the file describes them."""
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        with library_errors_named(self.origin, "its config or tokenizer can't be used"):
            tokenizer = _load_tokenizer(self.path)
            config.save_pretrained(folder)
            generation = self.model.generation_config
            generation.eos_token_id = tokenizer.eos_token_id
            generation.bos_token_id = tokenizer.bos_token_id
            generation.save_pretrained(folder, GENERATION_FILE)
            tokenizer.save_pretrained(folder)
        check_tokenizer(folder, self.origin)


def load_gguf(path: Path, origin: str, dtype: str | None) -> GgufModel:
    """Load and dequantise the GGUF file at `path` to `dtype`, bfloat16 if it is None.

    Raises:
        ConversionError: it is no GGUF file, or not one that transformers can read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ConversionError(origin, "is no GGUF file")
    with library_errors_named(origin, "transformers can't read it"):
        model = _load_model(path, dtype or DEFAULT_DTYPE)
    tensors = {name: MemoryTensor(name, tensor) for name, tensor in model.state_dict().items()}
    return GgufModel(path, origin, model, tensors)


def _load_model(path: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=TORCH_DTYPES[dtype],
        quantization_config=GgufConfig(dequantize=True),
    )


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
