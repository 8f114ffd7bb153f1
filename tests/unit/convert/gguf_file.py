"""A tiny model as a GGUF file, as llama.cpp would write it."""

import json

import gguf

from tests.models import CHAT_TEMPLATE, make_model, make_tokenizer


def write_gguf(folder, edit=None, left_out=(), **overrides):
    """Write a llama with tokenizer and template; return the file and the model.

    `edit` adds to the writer; tensors with a name in `left_out` in theirs are not written.
    """
    model = make_model("llama", **overrides)
    config = model.config
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder / "tokenizer")
    _add_tensors(writer, model, left_out)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def _add_tokenizer(writer, folder):
    stored = json.loads((make_tokenizer(folder) / "tokenizer.json").read_text())
    vocabulary = dict(stored["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in stored["added_tokens"]}
    special = {token["id"] for token in stored["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if vocabulary[token] in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|bos|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensors(writer, model, left_out):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if any(part in name for part in left_out):
            continue
        data = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
