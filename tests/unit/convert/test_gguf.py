import json

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

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


def test_a_gguf_file_that_transformers_can_not_read_is_refused(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConversionError, match="transformers can't read it"):
        convert(str(path), "m", tmp_path / "store")
