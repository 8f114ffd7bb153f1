import gc
import json
import pickle
import threading
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.core.errors import (
    ArgumentError,
    CheckpointFormatError,
    ConversionError,
    DeviceMapError,
    DeviceMemoryError,
    NotServableError,
)
from sllm_node.device.cpu import CpuDevice
from sllm_node.library import dicts, models
from sllm_node.library.loader import Loader
from tests.models import make_model, make_source, make_tokenizer
from tests.unit.library.replacing import Replacing

IDS = torch.arange(5, 25)[None]
POOL = "32MiB"
SPLIT = {
    "model.embed_tokens": "cpu:0", "model.layers.0": "cpu:0", "model.rotary_emb": "cpu:0",
    "model.layers.1": "cpu:1", "model.norm": "cpu:1", "lm_head": "cpu:1",
}  # fmt: skip


def load(loader, folder, **options):
    return models.load(loader, folder, **{"pool_bytes": POOL, "device_map": "cpu", **options})


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def said(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=319).tolist()


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "qwen3", "gpt2", "gemma2", "mixtral", "opt"]
)
def test_a_model_says_what_it_said_before(loader, tmp_path, family):
    model = make_model(family)
    found = load(loader, models.save(model, tmp_path / "m"))
    assert type(found) is type(model)
    assert torch.equal(logits(found), logits(model))
    assert said(found) == said(model)
    assert found.config._attn_implementation == model.config._attn_implementation
    assert found.config.pad_token_id == model.config.pad_token_id
    assert not found.training


@pytest.mark.parametrize("family", ["falcon", "gpt_neo", "bloom"])
def test_a_model_that_no_node_serves_can_be_used_all_the_same(loader, tmp_path, family):
    model = make_model(family)
    assert torch.equal(logits(load(loader, models.save(model, tmp_path / "m"))), logits(model))


def test_a_folder_of_safetensors_is_taken_with_its_texts(loader, tmp_path):
    source = make_source(tmp_path / "source", "qwen3", "bfloat16")
    folder = models.save(source, tmp_path / "m")
    found = load(loader, folder)
    wanted = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(logits(found), logits(wanted))
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids


def test_a_folder_without_a_tokenizer_is_taken_too(loader, tmp_path):
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    assert load(loader, models.save(str(source), tmp_path / "m"))


def test_a_tokenizer_goes_with_a_model_in_memory(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    folder = models.save(make_model("llama"), tmp_path / "m", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids
    with pytest.raises(ArgumentError, match="tokenizer"):
        models.save("somewhere", tmp_path / "n", tokenizer=tokenizer)


def test_a_model_in_memory_is_stored_exactly(loader, tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    found = load(loader, models.save(model, tmp_path / "m"))
    before, after = model.state_dict(), found.state_dict()
    assert list(before) == list(after)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_source_is_never_replaced_by_what_is_made_of_it(tmp_path):
    dicts.save({"x": torch.zeros(2)}, tmp_path / "m")
    source = make_source(tmp_path / "m" / "original")
    with pytest.raises(ConversionError, match="would delete the source"):
        models.save(source, tmp_path / "m", overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_a_model_is_cast_when_it_is_saved_and_when_it_is_loaded(loader, tmp_path):
    model = make_model("llama")
    wanted = deepcopy(model).to(torch.bfloat16)
    folder = models.save(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load(loader, folder)
    late = load(loader, models.save(model, tmp_path / "full"), dtype="bfloat16")
    for found in (half, late):
        assert found.dtype == torch.bfloat16
        assert found.config.dtype == torch.bfloat16
        assert torch.equal(found.lm_head.weight, wanted.lm_head.weight)
        assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(half), logits(late))


def test_the_stored_memory_goes_back_when_a_load_converts(loader, tmp_path):
    folder = models.save(make_model("llama_tied"), tmp_path / "m")
    found = load(loader, folder, dtype="bfloat16")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert loader.memory_used("cpu") == 0


def test_parameters_are_ordinary(loader, store, tmp_path):
    model = load(loader, store / "llama_tied", pool_bytes="1MiB")
    weight = model.lm_head.weight
    assert type(weight) is torch.nn.Parameter
    assert weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(IDS, labels=IDS).loss.item()
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = model(IDS, labels=IDS).loss.item()
    assert after < before
    again = load(loader, store / "llama_tied", pool_bytes="1MiB")
    assert again(IDS, labels=IDS).loss.item() == before  # training touched nobody else's memory
    copied, pickled = deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied), logits(model))
    assert torch.equal(logits(pickled), logits(model))
    model.save_pretrained(tmp_path / "hub")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hub")), logits(model)
    )
    save_file({"w": weight.detach()}, tmp_path / "w.safetensors")
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    del weight, again, copied, pickled, optimizer
    gc.collect()
    assert loader.memory_used("cpu") == 0  # .to() let go of the memory of the load


def test_a_parameter_that_outlives_its_model_keeps_the_memory(loader, store):
    model = load(loader, store / "llama", pool_bytes="1MiB")
    weight = model.lm_head.weight
    wanted = weight.detach().clone()
    del model
    gc.collect()
    size = open_checkpoint(store / "llama").index.size
    assert loader.memory_used("cpu") == size
    assert torch.equal(weight, wanted)
    del weight
    assert loader.memory_used("cpu") == 0


def test_two_models_are_loaded_from_two_threads_and_talk(loader, store):
    found = {}

    def work(family):
        for _ in range(2):
            found[family] = said(load(loader, store / family, pool_bytes="1MiB"))

    threads = [threading.Thread(target=work, args=(family,)) for family in ("llama", "gpt2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {family: said(make_model(family)) for family in ("llama", "gpt2")}


def test_a_load_leaves_the_random_numbers_of_the_program_alone(loader, store):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    load(loader, store / "gemma2", pool_bytes="1MiB")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2"])
def test_auto_splits_over_devices_that_hold_it_only_together(store, family):
    size = open_checkpoint(store / family).index.size
    machine = Loader(lambda name: CpuDevice(size * 4 // 5, name), lambda: ("cpu:0", "cpu:1"))
    model = load(machine, store / family, device_map="auto", pool_bytes="1MiB")
    assert machine.memory_used("cpu:0") > 0
    assert machine.memory_used("cpu:1") > 0
    assert said(model) == said(make_model(family))
    del model
    gc.collect()
    assert [machine.memory_used(name) for name in ("cpu:0", "cpu:1")] == [0, 0]
    machine.close()


def test_a_dict_says_which_layers_go_where(loader, store):
    model = load(loader, store / "llama", device_map=SPLIT, pool_bytes="1MiB")
    assert loader.memory_used("cpu:0") > 0
    assert loader.memory_used("cpu:1") > 0
    assert said(model) == said(make_model("llama"))
    assert set(model.hf_device_map.values()) == {"cpu"}  # torch knows one CPU


@pytest.mark.parametrize(
    ("device_map", "entry"),
    [({**SPLIT, "lm_head": "cpu:0"}, "lm_head"), ({**SPLIT, "typo": 0}, "typo"), ({"model": "cpu"}, "lm_head.weight")],
)  # fmt: skip
def test_a_map_that_cant_be_is_refused_before_anything_is_loaded(loader, store, device_map, entry):
    with pytest.raises(DeviceMapError) as caught:
        load(loader, store / "llama", device_map=device_map, pool_bytes="1MiB")
    assert caught.value.entry == entry


def test_no_room_is_told(store):
    small = Loader(lambda name: CpuDevice(1 << 16, name), lambda: ())
    with pytest.raises(DeviceMemoryError, match="device cpu"):
        load(small, store / "llama", pool_bytes="1MiB")
    small.close()


def test_a_plain_dict_is_no_model(loader, tmp_path):
    folder = dicts.save({"x": torch.ones(1)}, tmp_path / "d")
    with pytest.raises(NotServableError, match="load_dict"):
        load(loader, folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nothing"}'])
def test_a_damaged_config_is_an_error_and_leaves_nothing(loader, tmp_path, text):
    folder = models.save(make_model("llama"), tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointFormatError, match="no model can be built"):
        load(loader, folder)


def test_weights_never_come_with_the_config_of_another_model(loader, tmp_path):
    one, other = make_model("llama", seed=1), make_model("llama", seed=2)
    other.config.rms_norm_eps = 0.25
    models.save(one, tmp_path / "m")
    beside = Replacing(
        loader, lambda time: models.save(other, tmp_path / "m", overwrite=True), 1, after=True
    )
    found = load(beside, tmp_path / "m")
    assert found.config.rms_norm_eps == 0.25
    assert torch.equal(found.lm_head.weight, other.lm_head.weight)


def test_a_model_that_is_replaced_by_a_dict_meanwhile_is_no_model(loader, tmp_path):
    models.save(make_model("llama"), tmp_path / "m")
    beside = Replacing(
        loader, lambda time: dicts.save({}, tmp_path / "m", overwrite=True), 1, after=True
    )
    with pytest.raises(NotServableError, match="load_dict"):
        load(beside, tmp_path / "m")


def test_negated_parameters_are_stored_as_the_numbers_that_they_show(loader, tmp_path):
    model, wanted = make_model("llama"), make_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch._neg_view(-model.lm_head.weight.detach()))
    assert model.lm_head.weight.is_neg()
    found = load(loader, models.save(model, tmp_path / "m"))
    assert torch.equal(found.lm_head.weight, wanted.lm_head.weight)


def test_a_config_of_another_model_is_an_error(loader, tmp_path):
    folder = models.save(make_model("llama"), tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "hidden_size": 32}))
    with pytest.raises(CheckpointFormatError, match="shape"):
        load(loader, folder)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nothing", 3])
def test_a_dtype_that_no_model_computes_in_is_refused(loader, store, dtype):
    with pytest.raises(ArgumentError, match="dtype"):
        load(loader, store / "llama", dtype=dtype)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="Linear"):
        models.save(torch.nn.Linear(2, 2), tmp_path / "m")
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(ConversionError, match="save_dict"):
        models.save(LlamaForSequenceClassification(config), tmp_path / "m")


def test_a_model_with_tensors_of_its_own_is_refused_by_their_names(tmp_path):
    model = make_model("llama")
    model.register_buffer("mine", torch.ones(3))
    with pytest.raises(ConversionError, match="mine"):
        models.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_another_attention_can_be_asked_for(loader, store):
    found = load(loader, store / "llama", attn_implementation="eager", pool_bytes="1MiB")
    assert found.config._attn_implementation == "eager"


def test_progress_is_shown_on_stderr(loader, tmp_path, capsys):
    folder = models.save(make_model("llama"), tmp_path / "m", progress=True)
    load(loader, folder, progress=True)
    said_so = capsys.readouterr()
    assert said_so.out == ""
    assert "saving m" in said_so.err
    assert "loading m" in said_so.err
