import json
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sllm_node.convert.convert import ConvertOptions, convert
from sllm_node.convert.gguf import _agree_on
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES
from tests.models import CHAT_TEMPLATE
from tests.unit.convert.gguf_file import write_gguf


def stored_tensors(checkpoint):
    """Return the tensors of a checkpoint by name."""
    found = {}
    for entry in checkpoint.index.tensors:
        shard = (checkpoint.path / checkpoint.index.shards[entry.shard].name).read_bytes()
        data = bytearray(shard[entry.offset : entry.offset + entry.size])
        found[entry.name] = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).reshape(
            entry.shape
        )
    return found


@pytest.mark.parametrize("by_folder", [False, True])
@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_gguf_file_gives_the_weights_that_went_into_it(tmp_path, by_folder, dtype, stored):
    path, model = write_gguf(tmp_path)
    source = str(tmp_path if by_folder else path)
    checkpoint = convert(source, "m", tmp_path / "store", ConvertOptions(dtype, codec="raw"))
    found = stored_tensors(checkpoint)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.to(stored)), name


def test_tied_weights_of_a_gguf_file_are_stored_once(tmp_path):
    path, model = write_gguf(tmp_path, tie_word_embeddings=True)
    index = convert(str(path), "m", tmp_path / "store").index
    assert index.aliases == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert len(index.tensors) == len(model.state_dict()) - 1


def test_config_tokenizer_and_template_come_out_of_a_gguf_file(tmp_path):
    path, _ = write_gguf(tmp_path)
    checkpoint = convert(str(path), "m", tmp_path / "store")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    text = "A text, ünd mehr."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (316, 317)
    assert GenerationConfig.from_pretrained(checkpoint.path).eos_token_id == 317
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert "quantization_config" not in config
    assert checkpoint.index.context_tokens == 512


def split_as(name):
    """Return an edit that lets a file name a way to split text; None: it names none."""

    def edit(writer):
        fields = writer.kv_data[0]
        del fields["tokenizer.ggml.pre"]
        if name is not None:
            writer.add_tokenizer_pre(name)

    return edit


@pytest.mark.parametrize(
    ("name", "said"),
    [("stablelm2", "'stablelm2'"), ("default", "'default'"), (None, "nothing")],
)  # fmt: skip
def test_a_splitting_that_transformers_does_not_know_is_refused_by_name(tmp_path, name, said):
    path, _ = write_gguf(tmp_path, split_as(name))
    problem = refused(path, tmp_path / "store")
    assert problem.startswith(f"says {said} of how its tokenizer splits text (tokenizer.ggml.pre)")
    assert "convert the original model in safetensors" in problem


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["f", "(", "self", ")", "Ġ12"]),
        ("qwen2", ["f", "(self", ")", "Ġ", "1", "2"]),
        ("smollm", ["f", "(", "self", ")", "Ġ", "1", "2"]),
    ],
)
def test_a_splitting_that_is_known_is_that_of_the_checkpoint(tmp_path, name, pieces):
    path, _ = write_gguf(tmp_path, split_as(name))
    checkpoint = convert(str(path), "m", tmp_path / "store")
    split = AutoTokenizer.from_pretrained(checkpoint.path).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("f(self) 12")] == pieces


class Tokens:
    """What a config, a generation config or a tokenizer knows of special tokens."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id
        self.eos_token = ""

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


@pytest.mark.parametrize(
    ("in_config", "in_tokenizer", "wanted", "text"),
    [(3, 4, 3, "<3>"), (None, 4, 4, ""), (4, 4, 4, "")],
)
def test_the_end_token_is_the_files_everywhere(in_config, in_tokenizer, wanted, text):
    config, generation, tokenizer = Tokens(in_config), Tokens(9), Tokens(in_tokenizer)
    _agree_on("eos", config, generation, tokenizer)
    assert (config.eos_token_id, generation.eos_token_id) == (wanted, wanted)
    assert tokenizer.eos_token == text


def test_a_machine_without_the_packages_for_gguf_files_is_told_which_to_install(
    tmp_path, monkeypatch
):
    path, _ = write_gguf(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"install sllm-node\[gguf\]"):
        convert(str(path), "m", tmp_path / "store")


def test_a_gguf_file_that_transformers_can_not_read_is_refused(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConversionError, match="transformers can't read it"):
        convert(str(path), "m", tmp_path / "store")


def refused(path, store):
    with pytest.raises(ConversionError) as caught:
        convert(str(path), "m", store)
    assert not (store / "m").exists()
    return caught.value.problem


@pytest.mark.parametrize("lost", ["model.layers.1.", "layers.1.mlp.down_proj", "model.norm"])
def test_a_gguf_file_that_lacks_tensors_is_refused_and_they_are_named(tmp_path, lost):
    path, _ = write_gguf(tmp_path, left_out=[lost])
    problem = refused(path, tmp_path / "store")
    assert "lacks tensors of the model: " in problem
    assert lost in problem


def test_a_part_of_a_split_gguf_model_is_refused_with_how_to_join_them(tmp_path):
    path, _ = write_gguf(tmp_path, lambda writer: writer.add_uint16("split.count", 2))
    problem = refused(path, tmp_path / "store")
    assert "is one of 2 parts" in problem
    assert "llama-gguf-split --merge" in problem


def test_a_gguf_file_whose_tensors_have_other_shapes_than_its_header_says_is_refused(tmp_path):
    path, _ = write_gguf(tmp_path, lambda writer: writer.add_rope_dimension_count(8))
    assert "transformers can't read it" in refused(path, tmp_path / "store")


def add_experts(writer):
    for layer in range(2):
        for name, shape in (("gate", (4, 128, 64)), ("up", (4, 128, 64)), ("down", (4, 64, 128))):
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", np.ones(shape, np.float32))


def add_bias(writer):
    writer.add_tensor("blk.1.attn_q.bias", np.ones(64, np.float32))


def test_experts_of_a_class_that_has_none_are_refused(tmp_path):
    path, _ = write_gguf(tmp_path, add_experts, left_out=[".mlp."])
    assert "lacks tensors of the model: model.layers.0.mlp" in refused(path, tmp_path / "store")


@pytest.mark.parametrize(("edit", "name"), [(add_bias, "blk.1.attn_q.bias"), (add_experts, "exps")])
def test_tensors_of_a_gguf_file_that_went_nowhere_are_named(tmp_path, edit, name):
    path, _ = write_gguf(tmp_path, edit)
    problem = refused(path, tmp_path / "store")
    assert "has tensors that LlamaForCausalLM has no place for: " in problem
    assert name in problem
    assert "attn_norm" not in problem


def inverse_frequencies(model):
    return model.model.rotary_emb.inv_freq


def frequencies_served(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint.path)
    return inverse_frequencies(AutoModelForCausalLM.from_config(config))


def add_llama3_factors(writer, factor=8.0, original=8192):
    """Add what llama.cpp makes of the scaling of Llama 3.1, for heads of 16."""
    found = []
    for pair in range(8):
        turns = original * 10000.0 ** (-pair / 8) / (2 * np.pi)
        smooth = np.clip((turns - 1) / 3, 0, 1)
        found.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(found)) >= 3  # all of it: not scaled, in between, scaled
    writer.add_tensor("rope_freqs.weight", np.array(found, np.float32))


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_the_rotary_embedding_of_llama_3_1_comes_out_of_a_gguf_file(tmp_path):
    path, model = write_gguf(tmp_path, add_llama3_factors, rope_parameters=LLAMA3)
    checkpoint = convert(str(path), "m", tmp_path / "store")
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3
    assert torch.equal(frequencies_served(checkpoint), inverse_frequencies(model))


def add_linear_scaling(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def test_linear_scaling_comes_out_of_a_gguf_file(tmp_path):
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    path, model = write_gguf(tmp_path, add_linear_scaling, rope_parameters=scaled)
    checkpoint = convert(str(path), "m", tmp_path / "store")
    assert torch.equal(frequencies_served(checkpoint), inverse_frequencies(model))


def add_yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def add_other_factors(writer):
    add_llama3_factors(writer, original=2048)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (add_yarn, "llama.rope.scaling.type is yarn, which is not taken"),
        (lambda w: w.add_rope_scaling_attn_factors(1.2), "llama.rope.scaling.attn_factor is 1.2"),
        (lambda w: w.add_sliding_window(8), "llama.attention.sliding_window is 8"),
        (add_other_factors, "rope_freqs.weight that is not that of Llama 3.1"),
        (lambda w: (add_linear_scaling(w), add_llama3_factors(w)), "llama.rope.scaling.type is lin"),
    ],
)  # fmt: skip
def test_what_transformers_would_drop_from_a_gguf_file_is_refused(tmp_path, edit, problem):
    path, _ = write_gguf(tmp_path, edit)
    assert problem in refused(path, tmp_path / "store")


def keep_unscaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.add_uint16("split.count", 1)


def test_a_gguf_file_that_says_that_nothing_is_scaled_is_taken(tmp_path):
    path, model = write_gguf(tmp_path, keep_unscaled)
    checkpoint = convert(str(path), "m", tmp_path / "store")
    assert torch.equal(frequencies_served(checkpoint), inverse_frequencies(model))
