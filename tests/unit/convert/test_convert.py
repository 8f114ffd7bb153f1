import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sllm_node.checkpoint.catalog import Catalog, open_checkpoint
from sllm_node.checkpoint.output import DiskFiles
from sllm_node.checkpoint.split import layer_starts
from sllm_node.checkpoint.verify import verify
from sllm_node.convert.convert import ConvertOptions, Surroundings, convert
from sllm_node.convert.tensors import as_bytes
from sllm_node.core.clock import ManualClock
from sllm_node.core.errors import (
    ConversionError,
    StorageWriteError,
    StoreFullError,
    UnsupportedArchitectureError,
)
from tests.models import make_checkpoint, make_source
from tests.unit.checkpoint.raw import FullDisk, ShortWrites

ROOT = Path(__file__).parents[3]
SMALL = ConvertOptions(chunk_bytes=4096, shard_bytes=64 * 1024)


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def names_in(store):
    return sorted(path.name for path in store.iterdir()) if store.is_dir() else []


def test_a_checkpoint_is_whole_and_in_the_order_of_the_forward_pass(source, store):
    checkpoint = convert(str(source), "m", store, SMALL)
    names = [entry.name for entry in checkpoint.index.tensors]
    assert verify(checkpoint) == []
    assert len(checkpoint.index.shards) > 1
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    first, second = (i for i, name in enumerate(names) if "down_proj" in name)
    assert all("layers.0" in name for name in names[1 : first + 1])
    assert all("layers.1" in name for name in names[first + 1 : second + 1])


def test_the_index_says_what_was_converted(source, store):
    checkpoint = convert(
        str(source), "m", store, SMALL, surroundings=Surroundings(clock=ManualClock(1234.5))
    )
    index = checkpoint.index
    assert (index.model, index.architecture, index.dtype) == ("m", "LlamaForCausalLM", "F32")
    assert (index.context_tokens, index.created, index.chunk_bytes) == (512, 1234, 4096)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_cast_model_is_what_from_pretrained_loads_in_that_dtype(source, store, dtype, stored):
    checkpoint = convert(str(source), "m", store, ConvertOptions(dtype, codec="raw"))
    assert {entry.dtype for entry in checkpoint.index.tensors} == {stored}
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config["dtype"] == dtype
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).state_dict()
    shard = (checkpoint.path / "shard-00000.bin").read_bytes()
    for entry in checkpoint.index.tensors:
        assert shard[entry.offset : entry.offset + entry.size] == bytes(
            as_bytes(wanted[entry.name])
        )


def test_a_config_that_names_another_dtype_is_put_right(source, store):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    checkpoint = convert(str(source), "m", store)
    assert {entry.dtype for entry in checkpoint.index.tensors} == {"F32"}
    assert json.loads((checkpoint.path / "config.json").read_text())["dtype"] == "float32"


def test_progress_reaches_the_end_and_names_each_tensor(source, store):
    seen = []
    checkpoint = convert(str(source), "m", store, SMALL, progress=seen.append)
    total = sum(entry.size for entry in checkpoint.index.tensors)
    assert (seen[-1].bytes_done, {p.bytes_total for p in seen}) == (total, {total})
    assert [p.tensor for p in seen] == [entry.name for entry in checkpoint.index.tensors]


def test_a_system_that_takes_few_bytes_a_call_gives_the_same_checkpoint(source, store):
    short = Surroundings(files=ShortWrites(1000))
    one = convert(str(source), "one", store, SMALL, surroundings=short)
    other = convert(str(source), "other", store, SMALL)
    assert one.index.shards == other.index.shards


@pytest.mark.parametrize("name", ["../m", ".m", "", "a/b", "x" * 97])
def test_a_name_that_is_no_plain_folder_name_is_refused(source, store, name):
    with pytest.raises(ConversionError, match="is not allowed"):
        convert(str(source), name, store)
    assert names_in(store) == []


def test_a_name_that_is_taken_is_refused_with_what_to_do(source, store):
    before = convert(str(source), "m", store)
    with pytest.raises(ConversionError, match=r"sllm-node rm m.*--force"):
        convert(str(source), "m", store)
    assert Catalog(store).get(before.model) == before


def test_a_folder_that_is_no_checkpoint_is_never_replaced(source, store):
    (store / "data").mkdir(parents=True)
    (store / "data" / "photos").write_text("all of them")
    for force in (False, True):
        with pytest.raises(ConversionError, match=r"no checkpoint.*left alone.*another name"):
            convert(str(source), "data", store, ConvertOptions(force=force))
    assert (store / "data" / "photos").read_text() == "all of them"
    assert names_in(store) == ["data"]


def test_an_empty_folder_may_be_the_checkpoints(source, store):
    (store / "m").mkdir(parents=True)
    assert verify(convert(str(source), "m", store, SMALL)) == []


@pytest.mark.parametrize("inside", ["", "original"])
def test_the_source_is_never_replaced_by_what_is_made_of_it(store, tmp_path, inside):
    convert(str(make_source(tmp_path / "first")), "m", store, SMALL)
    source = make_source(store / "m" / inside)
    (tmp_path / "link").symlink_to(source)
    for given in (source, tmp_path / "link"):
        with pytest.raises(ConversionError, match=r"would delete the source.*another name"):
            convert(str(given), "m", store, ConvertOptions(force=True))
    assert (source / "model.safetensors").is_file()


def test_a_checkpoint_may_lie_in_the_folder_of_its_source_and_be_replaced_there(source):
    convert(str(source), "fast", source, SMALL)
    after = convert(str(source), "fast", source, ConvertOptions(chunk_bytes=8192, force=True))
    assert verify(after) == []
    assert (source / "model.safetensors").is_file()


def test_what_a_link_leads_to_is_replaced_where_it_lies(source, store, tmp_path):
    convert(str(source), "large", tmp_path / "disk", SMALL)
    store.mkdir()
    (store / "m").symlink_to(tmp_path / "disk" / "large")
    after = convert(str(source), "m", store, ConvertOptions("bfloat16", force=True))
    assert (after.model, after.index.model, after.index.dtype) == ("m", "m", "BF16")
    assert (store / "m").is_symlink()
    assert (names_in(store), names_in(tmp_path / "disk")) == (["m"], ["large"])


def test_a_folder_that_took_the_name_meanwhile_is_not_replaced(source, store):
    def take(progress):
        (store / "m").mkdir(exist_ok=True)
        (store / "m" / "photos").write_text("all of them")

    with pytest.raises(StorageWriteError, match="no checkpoint"):
        convert(str(source), "m", store, ConvertOptions(force=True), progress=take)
    assert (store / "m" / "photos").is_file()
    assert names_in(store) == ["m"]


def with_dtype(source, part, dtype):
    """Store the tensors of `source` with `part` in their names as `dtype`."""
    path = source / "model.safetensors"
    tensors = {n: t.to(dtype) if part in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_in_8_bits_are_refused_with_what_to_do_where_a_node_should_serve_them(
    source, store
):
    with_dtype(source, "up_proj", torch.float8_e4m3fn)
    problem = r"F8_E4M3, .*: model.layers.0.mlp.up_proj.weight, .*; give --dtype bfloat16"
    with pytest.raises(ConversionError, match=problem):
        convert(str(source), "m", store)
    assert convert(str(source), "m", store, ConvertOptions("bfloat16")).index.dtype == "BF16"
    kept = convert(str(source), "kept", store, ConvertOptions(servable=False))
    assert "F8_E4M3" in {entry.dtype for entry in kept.index.tensors}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_integer_weights_are_refused_as_quantised(source, store, dtype):
    with_dtype(source, "layers.1.mlp.up_proj", torch.int8)
    problem = r"I8, .*: model.layers.1.mlp.up_proj.weight; convert the original"
    with pytest.raises(ConversionError, match=problem):
        convert(str(source), "m", store, ConvertOptions(dtype))


def test_a_cast_to_8_bits_is_refused_before_the_source_is_opened(source, store):
    options = ConvertOptions("float8_e4m3fn")
    with pytest.raises(ConversionError, match=r"dtype 'float8_e4m3fn'.* bfloat16, float16"):
        convert("no/source", "m", store, options)
    kept = convert(str(source), "m", store, ConvertOptions("float8_e4m3fn", servable=False))
    assert kept.index.dtype == "F8_E4M3"


class Garbling(DiskFiles):
    """Damages the tensor index on its way to the disk."""

    def write(self, descriptor, data):
        garbled = bytes(data).replace(b'"shards"', b'"shreds"')
        return super().write(descriptor, memoryview(garbled))


def test_what_can_not_be_read_back_replaces_nothing(source, store):
    before = convert(str(source), "m", store)
    with pytest.raises(
        ConversionError, match=r"can't be read back .*`shreds`.*nothing was replaced"
    ):
        convert(
            str(source),
            "m",
            store,
            ConvertOptions("bfloat16", force=True),
            surroundings=Surroundings(files=Garbling()),
        )
    assert open_checkpoint(store / "m").index == before.index
    assert names_in(store) == ["m"]


def test_force_replaces_a_checkpoint(source, store):
    convert(str(source), "m", store)
    after = convert(str(source), "m", store, ConvertOptions("bfloat16", force=True))
    assert after.index.dtype == "BF16"
    assert names_in(store) == ["m"]


def test_texts_that_a_source_brings_are_not_in_the_way_of_the_next_conversion(source, store):
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (source / name).write_text("from the hub")
    for options in (ConvertOptions(), ConvertOptions(force=True), ConvertOptions(force=True)):
        convert(str(source), "m", store, options)
    assert names_in(store) == ["m"]


def test_force_deletes_nothing_that_is_no_part_of_a_checkpoint(source, store):
    convert(str(source), "m", store)
    (store / "m" / "logs").mkdir()
    with pytest.raises(ConversionError, match="would be deleted with it: logs; move that"):
        convert("no/source", "m", store, ConvertOptions(force=True))
    (store / "m" / "logs").rmdir()

    def log(progress):
        (store / "m" / "log.txt").write_text("mine")

    with pytest.raises(StorageWriteError, match=r"would be deleted with it: log\.txt"):
        convert(str(source), "m", store, ConvertOptions(force=True), progress=log)
    assert (store / "m" / "log.txt").read_text() == "mine"
    assert names_in(store) == ["m"]


def test_a_failed_replacement_leaves_the_old_checkpoint(source, store, tmp_path):
    before = convert(str(source), "m", store)
    (source / "tokenizer.json").write_text("")
    with pytest.raises(ConversionError):
        convert(str(source), "m", store, ConvertOptions(force=True))
    assert Catalog(store).get(before.model) == before
    assert names_in(store) == ["m"]


@pytest.mark.parametrize("field", ["chunk_bytes", "shard_bytes"])
@pytest.mark.parametrize("size", [0, 5000])
def test_sizes_that_are_no_pages_are_refused(source, store, field, size):
    with pytest.raises(ConversionError, match="is not a multiple of 4096"):
        convert(str(source), "m", store, ConvertOptions(**{field: size}))


def test_a_dtype_that_is_none_is_refused(source, store):
    with pytest.raises(ConversionError, match="dtype 'int4': is none of"):
        convert(str(source), "m", store, ConvertOptions("int4"))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bloom", "BloomForCausalLM"),
        ("falcon", "FalconForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
    ],
)
def test_a_model_that_can_not_be_served_is_refused_by_name(tmp_path, store, family, name):
    source = make_source(tmp_path, family)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        convert(str(source), "m", store)
    assert (caught.value.architecture, caught.value.source) == (name, str(source))
    assert names_in(store) == []


def test_an_encoder_decoder_is_refused_by_name(source, store):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitectureError, match="T5ForConditionalGeneration"):
        convert(str(source), "m", store)


def test_a_config_no_model_can_be_built_from_is_refused(source, store):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "none-such"}))
    with pytest.raises(ConversionError, match="no model can be built from its config"):
        convert(str(source), "m", store)


def test_a_conversion_that_fails_halfway_leaves_nothing(source, store):
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"][0, 0] = 1e10
    save_file(stored, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.weight: has numbers too large for F16"):
        convert(str(source), "m", store, ConvertOptions("float16"))
    assert names_in(store) == []


def test_a_disk_that_fills_up_says_how_much_is_needed_and_leaves_nothing(source, store):
    size = convert(str(source), "m", store, SMALL).index.size
    full = Surroundings(files=FullDisk(100_000, claimed=size))
    with pytest.raises(StoreFullError) as caught:
        convert(str(source), "other", store, SMALL, surroundings=full)
    assert caught.value.needed == size
    assert names_in(store) == ["m"]


def test_a_disk_known_to_be_too_small_is_refused_before_writing(source, store):
    small = Surroundings(files=FullDisk(0, claimed=100_000))
    with pytest.raises(StoreFullError) as caught:
        convert(str(source), "m", store, SMALL, surroundings=small)
    assert caught.value.free == 100_000
    assert names_in(store) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from sllm_node.convert.convert import ConvertOptions, Surroundings, convert
from tests.unit.checkpoint.raw import CountedFiles

def at(count):
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], "m", Path(sys.argv[2]), ConvertOptions(chunk_bytes=4096, shard_bytes=65536),
        surroundings=Surroundings(files=CountedFiles(at)))
"""


def test_a_conversion_that_is_killed_leaves_no_checkpoint_and_the_next_one_sweeps(source, store):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(store), "30"], check=False, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL
    assert [name[:-8] for name in names_in(store)] == [".sllm-tmp-m-"]
    catalog = Catalog(store)
    catalog.scan()
    assert (catalog.models(), catalog.problems) == ((), {})
    convert(str(source), "m", store, SMALL)
    assert names_in(store) == ["m"]


def test_a_folder_saved_again_in_one_file_is_what_from_pretrained_loads(store, tmp_path):
    source = make_source(tmp_path / "source", shard_size="100KB")
    shards = sorted(source.glob("model-*.safetensors"))
    again = make_source(tmp_path / "again", seed=7)
    (again / "model.safetensors").rename(source / "model.safetensors")
    for left in (True, False):  # the older shards, whose index stays
        for shard in [] if left else shards:
            shard.unlink()
        checkpoint = convert(str(source), "m", store, ConvertOptions(codec="raw", force=True))
        wanted = AutoModelForCausalLM.from_pretrained(source).state_dict()
        stored = (checkpoint.path / "shard-00000.bin").read_bytes()
        for entry in checkpoint.index.tensors:
            assert stored[entry.offset : entry.offset + entry.size] == bytes(
                as_bytes(wanted[entry.name])
            )


def test_the_models_of_tests_come_in_several_shards_and_chunks(store):
    index = make_checkpoint(store, "m", "qwen3").index
    assert len(index.shards) > 1
    assert max(len(shard.digests) for shard in index.shards) > 1
    assert names_in(store) == ["m"]


def test_what_no_node_serves_is_converted_if_that_is_no_matter(store, tmp_path):
    options = ConvertOptions(chunk_bytes=4096, shard_bytes=64 * 1024, servable=False)
    source = make_source(tmp_path / "falcon", "falcon")
    with pytest.raises(UnsupportedArchitectureError):
        convert(str(source), "m", store, SMALL)
    checkpoint = convert(str(source), "m", store, options)
    assert verify(checkpoint) == []
    assert checkpoint.index.architecture == "FalconForCausalLM"
    assert len(layer_starts(checkpoint.index)) == 2


def test_a_source_without_a_tokenizer_is_converted_if_that_is_no_matter(store, source):
    for path in source.glob("tokenizer*"):
        path.unlink()
    options = ConvertOptions(chunk_bytes=4096, shard_bytes=64 * 1024, servable=False)
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(str(source), "m", store, SMALL)
    assert verify(convert(str(source), "m", store, options)) == []
