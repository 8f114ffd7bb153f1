"""Loads a GGUF file through transformers, which dequantises it; this takes memory for the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sllm_node.convert.gguf_header import (
    check_all_used,
    check_config,
    check_whole,
    read_header,
    rope_scaling,
    set_splitting,
)
from sllm_node.convert.safetensors import few
from sllm_node.convert.tensors import MemoryTensor
from sllm_node.convert.texts import GENERATION_FILE, check_tokenizer, library_errors_named
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES

DEFAULT_DTYPE: Final = "BF16"
_MAGIC: Final = b"GGUF"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A dequantised model in memory."""

    path: Path
    origin: str
    model: Any
    tokenizer: Any
    tensors: Mapping[str, MemoryTensor]
    in_module_layout: bool = True
    is_exact: bool = False

    def write_texts(self, folder: Path) -> None:
        """Write config, generation config and tokenizer as the file describes them."""
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        with library_errors_named(self.origin, "its config or tokenizer can't be used"):
            tokenizer = self.tokenizer
            generation = self.model.generation_config
            for kind in ("bos", "eos"):
                _agree_on(kind, config, generation, tokenizer)
            config.save_pretrained(folder)
            generation.save_pretrained(folder, GENERATION_FILE)
            tokenizer.save_pretrained(folder)
        check_tokenizer(folder, self.origin)


def load_gguf(path: Path, origin: str, dtype: str | None) -> GgufModel:
    """Load and dequantise the GGUF file at `path` to `dtype`, bfloat16 if it is None.

    Raises:
        ConversionError: it is no GGUF file, not one that transformers can read, not all of a
            model, or has something in it that transformers would leave out.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ConversionError(origin, "is no GGUF file")
    try:
        import gguf  # noqa: F401 - to tell what is missing before anything is read
    except ImportError as error:
        raise ConversionError(origin, f"install sllm-node[gguf] to read it ({error})") from error
    with library_errors_named(origin, "transformers can't read it"):
        header = read_header(path)
        check_whole(header, origin)
        config = _load_config(path)
        check_config(header, config, origin)
        scaling = rope_scaling(header, config, origin)
        tokenizer = _load_tokenizer(path)
        set_splitting(header, tokenizer, origin)
        model, info = _load_model(path, config, dtype or DEFAULT_DTYPE)
        _check_all_filled(info, origin)
        check_all_used(header, model, origin)
    if scaling:
        model.config.rope_parameters = {**model.config.rope_parameters, **scaling}
    tensors = {name: MemoryTensor(name, tensor) for name, tensor in model.state_dict().items()}
    return GgufModel(path, origin, model, tokenizer, tensors)


def _check_all_filled(info: Mapping[str, Any], origin: str) -> None:
    """Refuse a file that left tensors of the model, by `info` of its loading, with random numbers.

    Raises:
        ConversionError: naming them.
    """
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(origin, f"lacks tensors of the model: {few(missing)}")


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _load_model(path: Path, config: Any, dtype: str) -> tuple[Any, Mapping[str, Any]]:
    import transformers

    # Releases without GgufConfig dequantise always.
    how = getattr(transformers, "GgufConfig", None)
    options = {} if how is None else {"quantization_config": how(dequantize=True)}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        config=config,
        dtype=TORCH_DTYPES[dtype],
        output_loading_info=True,
        **options,
    )
    return model, info


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def _agree_on(kind: str, config: Any, generation: Any, tokenizer: Any) -> None:
    """Let all three name one token as `bos` or `eos`: the file's, which the config has.

    Some releases of transformers give the tokenizer the token of its class instead.
    """
    field = f"{kind}_token_id"
    token = getattr(config, field, None)
    if token is None:
        token = getattr(tokenizer, field)
    elif token != getattr(tokenizer, field):
        setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))
    setattr(config, field, token)
    setattr(generation, field, token)
