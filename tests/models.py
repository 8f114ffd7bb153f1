"""Seeded models small enough for tests, and checkpoints made of them.

A source is what a hub folder looks like: config, safetensors in hub layout, generation config, a
byte-level tokenizer with a chat template. Every parameter is random, biases and norms too, so that
a mistake in the layout always shows in the logits.
"""

import tempfile
from pathlib import Path
from typing import Any

from sllm_node.checkpoint.catalog import Checkpoint

VOCABULARY = 320
SPECIAL_TOKENS = ("<|bos|>", "<|im_end|>", "<|im_start|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGED = (
    "hethineranreonatenndstoresisitoungtoedofalarleasmerotivecoridellsehara"
    "hilitaneomusmaiclaetnoiouncechbesoelpehourutlyosadca"
)
_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_HEADS: dict[str, Any] = {**_LLAMA, "head_dim": 16}
_WINDOW: dict[str, Any] = {**_HEADS, "sliding_window": 8}
_GPT2: dict[str, Any] = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 512,
}  # fmt: skip
_NEOX: dict[str, Any] = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_OPT: dict[str, Any] = {
    "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "word_embed_proj_dim": 64,
}  # fmt: skip
_GPT_NEO: dict[str, Any] = {
    "hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
    "window_size": 8, "num_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
_SHARED: dict[str, Any] = {  # the first layer dense, then 8 experts in 2 groups, and one for all
    **_HEADS, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **{name: value for name, value in _SHARED.items() if name != "head_dim"},
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama_tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _HEADS),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 8}),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _WINDOW),
    "gemma3": ("gemma3_text", _WINDOW),
    "opt": ("opt", _OPT),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neo": ("gpt_neo", _GPT_NEO),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "granite": ("granite", _LLAMA),
    "cohere": ("cohere", _LLAMA),
    "smollm3": ("smollm3", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
    "falcon": ("falcon", {**_NEOX, "alibi": False}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**_HEADS, **_EXPERTS}),
    "olmoe": ("olmoe", {**_LLAMA, **_EXPERTS}),
    "flex_olmo": ("flex_olmo", {**_LLAMA, **_EXPERTS}),
    "granitemoe": ("granitemoe", {**_LLAMA, "num_local_experts": 4}),
    "granitemoeshared": (
        "granitemoeshared",
        {**_LLAMA, "num_local_experts": 4, "shared_intermediate_size": 48},
    ),
    "phimoe": ("phimoe", {**_LLAMA, "num_local_experts": 4}),
    "minimax_m2": ("minimax_m2", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_LLAMA, **_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "dots1": ("dots1", _SHARED),
    "glm4_moe": ("glm4_moe", _SHARED),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "gpt_oss": ("gpt_oss", {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Test name -> (transformers' model type, config fields)."""


def make_source(
    directory: Path,
    family: str = "llama",
    dtype: str = "float32",
    seed: int = 0,
    *,
    shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Write a model of `family` as a Hugging Face folder and return the folder.

    `overrides` replace fields of the config.
    """
    model = make_model(family, seed, **overrides).to(_torch_dtype(dtype))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer(directory)
    return directory


def make_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a transformers model of `family` with random parameters, in eval mode, fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = FAMILIES[family]
    ids = {"bos_token_id": 316, "eos_token_id": 317, "pad_token_id": 319}
    config = AutoConfig.for_model(model_type, **{**ids, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_tokenizer(directory: Path) -> Path:
    """Write a byte-level BPE tokenizer of exactly `VOCABULARY` tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(zip(_MERGED[::2], _MERGED[1::2], strict=True))
    words = [*letters, *("".join(pair) for pair in merges)]
    words += [f"Ġ{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    merges += [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = words[: VOCABULARY - len(SPECIAL_TOKENS)]
    known = set(words)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[pair for pair in merges if "".join(pair) in known],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return directory


def make_checkpoint(
    store: Path,
    name: str,
    family: str = "llama",
    dtype: str = "float32",
    seed: int = 0,
    *,
    chunk_bytes: int = 16 * 1024,
    shard_bytes: int = 128 * 1024,
    codec: str = "exp",
    **overrides: Any,
) -> Checkpoint:
    """Write a seeded model of `family` to `store` in our format."""
    from sllm_node.convert.convert import ConvertOptions, convert

    options = ConvertOptions(
        chunk_bytes=chunk_bytes, shard_bytes=shard_bytes, force=True, codec=codec
    )
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder) / name, family, dtype, seed, **overrides)
        return convert(str(source), name, store, options)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
