import errno
import json

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from sllm_node.convert.texts import context_tokens, copy_texts, set_dtype, write_texts
from sllm_node.core.errors import ConversionError, UnsupportedArchitectureError
from tests.models import CHAT_TEMPLATE, make_source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    return path


def edit(path, **changes):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, **changes}))


def test_the_tokenizer_and_its_template_are_those_of_the_source(source, folder):
    copy_texts(source, folder, "origin")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Ünïcode, 日本 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token_id == 317


def test_the_generation_config_is_kept_to_the_letter(source, folder):
    (source / "generation_config.json").write_text('{"eos_token_id": [317, 3], "top_k": 7}')
    copy_texts(source, folder, "origin")
    kept = json.loads((folder / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [317, 3], "top_k": 7}


def test_a_missing_generation_config_is_made_from_the_config(source, folder):
    (source / "generation_config.json").unlink()
    copy_texts(source, folder, "origin")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 317


def test_a_missing_tokenizer_json_is_made_from_older_files(source, folder):
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 316}))
    merges = [" ".join(pair) for pair in model["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    copy_texts(source, folder, "origin")
    assert (folder / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("as before")) == "as before"


def test_code_and_old_names_do_not_get_into_the_config(source, folder):
    edit(source / "config.json", auto_map={"AutoConfig": "x.Y"}, torch_dtype="float32", extra=1)
    copy_texts(source, folder, "origin")
    set_dtype(folder, "BF16")
    kept = json.loads((folder / "config.json").read_text())
    assert not kept.keys() & {"auto_map", "torch_dtype"}
    assert (kept["dtype"], kept["extra"]) == ("bfloat16", 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "config.json can't be read"),
        ("[]", "config.json holds no JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "vocab_size": "many"}', "config.json can't be used"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', r"quantised \(awq\)"),
        ('{"model_type": "llama", "quantization_config": 4}', "by an unnamed method"),
    ],
)  # fmt: skip
def test_a_config_that_can_not_be_used_is_refused(source, folder, text, problem):
    (source / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=f"origin: .*{problem}"):
        copy_texts(source, folder, "origin")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"architectures": ["MyForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}}, "MyForCausalLM"),
        ({"architectures": None}, "my_own"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_refused_by_name(source, folder, fields, name):
    edit(source / "config.json", model_type="my_own", **fields)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        copy_texts(source, folder, "origin")
    assert (caught.value.architecture, caught.value.source) == (name, "origin")


def test_a_source_without_tokenizer_is_refused(source, folder):
    for path in [*source.glob("tokenizer*"), source / "chat_template.jinja"]:
        path.unlink()
    with pytest.raises(ConversionError, match=r"no tokenizer.json, and none can be made"):
        copy_texts(source, folder, "origin")


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"model": 4}', '{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_a_damaged_tokenizer_is_refused(source, folder, text):
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(ConversionError, match="tokenizer can't be loaded"):
        copy_texts(source, folder, "origin")


@pytest.mark.parametrize("field", ["max_position_embeddings", "n_positions", "seq_length"])
def test_the_context_is_found_under_each_of_its_names(field):
    assert context_tokens(PretrainedConfig(**{field: 77})) == 77


@pytest.mark.parametrize("none", [None, -1, 0, True, "512"])
def test_a_model_without_a_limit_gets_a_modest_one(none):
    assert context_tokens(PretrainedConfig()) == 2048
    assert context_tokens(PretrainedConfig(max_position_embeddings=none)) == 2048
    assert context_tokens(PretrainedConfig(max_position_embeddings=none, n_positions=77)) == 77


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_that_the_disk_is_full_is_no_problem_of_the_model(source, folder, name):
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_texts(config, None, tokenizer, folder, "origin")
    assert caught.value.errno == errno.ENOSPC
