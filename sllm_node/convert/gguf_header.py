"""What a GGUF file says of its model, and what of that transformers would drop without a word.

transformers takes the keys of a header and the tensors that it knows and leaves the rest. What it
leaves may change every token, so the header is held against the config and the module that came out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sllm_node.convert.safetensors import few
from sllm_node.convert.texts import context_tokens
from sllm_node.core.errors import ConversionError

_ROPE_FREQS: Final = "rope_freqs.weight"
"""What the frequency of each pair of a head is divided by."""
_LLAMA3: Final = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
"""What Llama 3.1 to 3.3 scale their rotary embedding with; the file has only what follows from it."""

_GEMMA2_27B: Final = ("gemma2", 46)
"""The one of its family that scales queries by the width of a head as it would be without `head_dim`."""


_GPT2_SPLITS: Final = frozenset({
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4", "granite-docling",
})  # fmt: skip
"""Names of GPT-2's way to split text. `default` is none: it is what writers say of one unknown to them."""
_DIGITS_APART: Final = frozenset({"smollm", "starcoder"})
"""Names of the way that takes digits one by one, and splits the rest as GPT-2 does."""
_PROBE: Final = "f(self) x.size  'S 12345\n\n 1a"
"""Every other way splits it otherwise."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The part of a file's header that decides how its tensors are used."""

    architecture: str
    fields: Mapping[str, Any]
    """Keys of the model, without the architecture that they begin with."""
    parts: int
    elements: Mapping[str, int]
    """Numbers in each tensor."""
    rope_factors: tuple[float, ...] = ()
    """`rope_freqs.weight`, if the file has it."""
    tokenizer: str | None = None
    """The kind; `gpt2` is byte-level BPE."""
    splitting: str | None = None
    """How text is split before that; None, too, where the file does not say."""


def read_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at `path`; raises what the reader does if it is damaged."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    prefix = f"{reader.fields['general.architecture'].contents()}."
    own = {
        name.removeprefix(prefix): f for name, f in reader.fields.items() if name.startswith(prefix)
    }
    freqs = [tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FREQS]
    return GgufHeader(
        architecture=prefix[:-1],
        fields={name: field.contents() for name, field in own.items()},
        parts=_contents(reader, "split.count") or 1,
        elements={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
        rope_factors=tuple(freqs[0].tolist()) if freqs else (),
        tokenizer=_contents(reader, "tokenizer.ggml.model"),
        splitting=_contents(reader, "tokenizer.ggml.pre"),
    )


def _contents(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def check_whole(header: GgufHeader, origin: str) -> None:
    """Refuse one of several files of a model.

    Raises:
        ConversionError: with how to join them.
    """
    if header.parts > 1:
        raise ConversionError(
            origin,
            f"is one of {header.parts} parts of a GGUF model; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )


def check_all_used(header: GgufHeader, model: Any, origin: str) -> None:
    """Refuse a file some of whose tensors are nowhere in `model`, all of whose tensors it filled.

    Raises:
        ConversionError: naming them.
    """
    tensors = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    taken = {name: size for name, size in header.elements.items() if name != _ROPE_FREQS}
    if sum(taken.values()) != sum(tensors.values()):
        unused = _unknown(header.architecture, taken, model) or sorted(taken)
        raise ConversionError(
            origin, f"has tensors that {type(model).__name__} has no place for: {few(unused)}"
        )


def set_splitting(header: GgufHeader, tokenizer: Any, origin: str) -> None:
    """Let `tokenizer` split text as the file says, where transformers took GPT-2's way instead.

    Raises:
        ConversionError: that way is not known here either; it names what the file says.
    """
    from tokenizers import pre_tokenizers

    if header.tokenizer != "gpt2" or header.splitting in _GPT2_SPLITS:
        return
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = tokenizer.backend_tokenizer.pre_tokenizer
    if found is None or found.pre_tokenize_str(_PROBE) != gpt2.pre_tokenize_str(_PROBE):
        return
    if header.splitting not in _DIGITS_APART:
        says = "nothing" if header.splitting is None else repr(header.splitting)
        raise ConversionError(
            origin,
            f"says {says} of how its tokenizer splits text (tokenizer.ggml.pre), which this release of "
            "transformers takes for GPT-2's way, so tokens would be wrong; convert the original model "
            "in safetensors, or try a newer transformers",
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])


def check_config(header: GgufHeader, config: Any, origin: str) -> None:
    """Refuse a file whose model computes otherwise than `config`, which transformers made of it.

    Raises:
        ConversionError: naming the key of the header.
    """
    for key, value, found in _compared(header, config):
        if not math.isclose(value or 0, found or 0, rel_tol=1e-6):
            raise _not_taken(header, key, value, f"its config has {found}", origin)
    layers = header.fields.get("block_count")
    if (header.architecture, layers) == _GEMMA2_27B:
        wanted = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != wanted:
            instead = f"its query_pre_attn_scalar is {wanted}, which no key says"
            raise _not_taken(header, "block_count", layers, instead, origin)


def rope_scaling(header: GgufHeader, config: Any, origin: str) -> dict[str, Any]:
    """Return the fields of `rope_parameters` by which `config` scales as the file says; often none.

    Raises:
        ConversionError: no config is known that does exactly that.
    """
    kind, factor = _scaling(header, origin)
    if kind is None and _is_plain(header.rope_factors):
        return {}
    is_one = "rope_type" in (getattr(config, "rope_parameters", None) or {})
    if kind == "linear" and not header.rope_factors and is_one:
        return {"rope_type": "linear", "factor": factor}
    if kind is not None:
        instead = "only linear scaling of all layers is"
        raise _not_taken(header, "rope.scaling.type", kind, instead, origin)
    fields = {"rope_type": "llama3", "factor": max(header.rope_factors), **_LLAMA3}
    if not (is_one and _is_scaled_so(config, fields, header.rope_factors)):
        raise ConversionError(
            origin, f"scales its rotary embedding by a {_ROPE_FREQS} that is not that of Llama 3.1"
        )
    return fields


def _unknown(architecture: str, names: Mapping[str, int], model: Any) -> list[str]:
    """Return those of `names` that no tensor of `model` has in a GGUF file, as far as is known."""
    import gguf

    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return []
    places = gguf.get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    endings = (".weight", ".bias")
    used = {places.get_name(name, try_suffixes=endings) for name in model.state_dict()}
    return sorted(name for name in names if name not in used)


def _compared(header: GgufHeader, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield keys that the file has, with their values there and in `config`."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    found = {
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": _turned(config, rope),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    for key in found.keys() & header.fields.keys():
        value = header.fields[key]
        sees_all = key == "attention.sliding_window" and value >= context_tokens(config)
        yield key, 0 if sees_all else value, found[key]


def _turned(config: Any, rope: Mapping[str, Any]) -> int | None:
    """Return how many numbers of a head the rotary embedding turns."""
    head = getattr(config, "head_dim", None)
    if head is None and (heads := getattr(config, "num_attention_heads", None)):
        head = config.hidden_size // heads
    return head and int(head * rope.get("partial_rotary_factor", 1.0))


def _scaling(header: GgufHeader, origin: str) -> tuple[str | None, float]:
    """Return by which rule and factor the header scales positions; None: not at all."""
    fields = header.fields
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    kind = fields.get("rope.scaling.type", "linear")
    attention = fields.get("rope.scaling.attn_factor", 1.0)
    if attention != 1:
        raise _not_taken(header, "rope.scaling.attn_factor", attention, "only 1 is", origin)
    return (None if kind == "none" or (kind == "linear" and factor == 1) else kind), factor


def _is_plain(factors: tuple[float, ...]) -> bool:
    return all(factor == 1 for factor in factors)


def _is_scaled_so(config: Any, fields: dict[str, Any], factors: tuple[float, ...]) -> bool:
    """Tell whether `config` with `fields` divides its frequencies by `factors`."""
    from copy import deepcopy

    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = deepcopy(config)
    scaled.rope_parameters = {**config.rope_parameters, **fields}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    steps = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    plain = 1 / scaled.rope_parameters["rope_theta"] ** steps
    wanted = (plain / torch.tensor(factors, dtype=torch.float64)).float()
    return wanted.shape == frequencies.shape and torch.allclose(
        wanted, frequencies, rtol=1e-5, atol=0
    )


def _not_taken(
    header: GgufHeader, key: str, value: Any, instead: str, origin: str
) -> ConversionError:
    return ConversionError(
        origin,
        f"{header.architecture}.{key} is {value}, which is not taken from a GGUF file ({instead}); "
        "convert the original model in safetensors",
    )
