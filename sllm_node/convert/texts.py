"""The files beside the weights: config, generation config, tokenizer, chat template."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeGuard

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

from sllm_node.checkpoint.output import FULL
from sllm_node.core.errors import ConversionError, SllmError, UnsupportedArchitectureError
from sllm_node.engine.skeleton import SUPPORTED
from sllm_node.engine.weights import TORCH_DTYPES

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
_TOKENIZER_FILES: Final = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_NOT_KEPT: Final = ("auto_map", "torch_dtype", "_name_or_path")
"""Code of the source's own, a name of old, and where it lay once."""
_CONTEXT_FIELDS: Final = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
_CONTEXT_DEFAULT: Final = 2048
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")


def copy_texts(source: Path, folder: Path, origin: str, *, needs_tokenizer: bool = True) -> None:
    """Bring config, generation config and tokenizer of a Hugging Face folder to `folder`.

    Without `needs_tokenizer`, a folder that has no file of one is taken as well.

    Raises:
        ConversionError: one is missing, damaged, or describes quantised weights.
        UnsupportedArchitectureError: transformers does not know the model.
    """
    fields = _read_object(source / CONFIG_FILE, origin)
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConversionError(
            origin,
            f"its weights are quantised ({method or 'by an unnamed method'}); "
            "convert the original, unquantised model",
        )
    _write_object(folder / CONFIG_FILE, {k: v for k, v in fields.items() if k not in _NOT_KEPT})
    config = _read_config(folder, fields, origin)
    if (source / GENERATION_FILE).is_file():
        _write_object(folder / GENERATION_FILE, _read_object(source / GENERATION_FILE, origin))
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if needs_tokenizer or not all(name.startswith("chat_template") for name in found):
        _copy_tokenizer(source, folder, origin)


def write_texts(config: Any, generation: Any, tokenizer: Any, folder: Path, origin: str) -> None:
    """Write the config of a model in memory to `folder`, and the others that are not None.

    Raises:
        ConversionError: transformers can't write one of them.
    """
    with library_errors_named(origin, "its config or tokenizer can't be written"):
        config.save_pretrained(folder)
        fields = _read_object(folder / CONFIG_FILE, origin)
        _write_object(folder / CONFIG_FILE, {k: v for k, v in fields.items() if k not in _NOT_KEPT})
        if generation is not None:
            generation.save_pretrained(folder, GENERATION_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def set_dtype(folder: Path, dtype: str) -> None:
    """Let the config in `folder` name the float dtype that the weights have."""
    fields = _read_object(folder / CONFIG_FILE, str(folder))
    _write_object(folder / CONFIG_FILE, {**fields, "dtype": torch_name(dtype)})


def torch_name(dtype: str) -> str:
    """Return torch's name of a stored dtype."""
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def context_tokens(config: Any) -> int:
    """Return how many tokens a sequence may have; -1 and 0 are no limit, as in XLNet's config."""
    found = (getattr(config, field, None) for field in _CONTEXT_FIELDS)
    return next((tokens for tokens in found if _is_count(tokens)), _CONTEXT_DEFAULT)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@contextmanager
def library_errors_named(origin: str, what: str) -> Iterator[None]:
    """Turn what transformers raises inside into a ConversionError that says `what` failed.

    Anything: its tokenizers raise plain `Exception`, its configs errors of other packages. That the
    disk is full is no problem of the model: it stays the system's error.
    """
    try:
        yield
    except SllmError:
        raise
    except Exception as error:
        if (number := _system_error(error)) in FULL:
            raise OSError(number, os.strerror(number)) from error
        raise ConversionError(origin, f"{what}: {error}") from error


def _system_error(error: Exception) -> int:
    """Return the number of the system's error that `error` is; 0: it is none.

    Tokenizers have it in their text.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else 0


def check_tokenizer(folder: Path, origin: str) -> None:
    """Load the tokenizer in `folder`, as a node will.

    Raises:
        ConversionError: it can't be loaded.
    """
    with library_errors_named(origin, "its tokenizer can't be loaded"):
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _read_config(folder: Path, fields: dict[str, Any], origin: str) -> Any:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ConversionError(origin, f"{CONFIG_FILE} names no model_type")
    if model_type not in CONFIG_MAPPING:
        names = fields.get("architectures") or [model_type]
        raise UnsupportedArchitectureError(origin, str(names[0]), SUPPORTED)
    with library_errors_named(origin, f"{CONFIG_FILE} can't be used"):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def _copy_tokenizer(source: Path, folder: Path, origin: str) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / TOKENIZER_FILE).is_file():
        with library_errors_named(origin, "it has no tokenizer.json, and none can be made"):
            AutoTokenizer.from_pretrained(str(source), trust_remote_code=False).save_pretrained(
                folder
            )
    check_tokenizer(folder, origin)


def _read_object(path: Path, origin: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(origin, f"{path.name} can't be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(origin, f"{path.name} holds no JSON object")
    return fields


def _write_object(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
