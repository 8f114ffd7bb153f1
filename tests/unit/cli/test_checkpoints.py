"""Commands on a store folder, as an operator runs them."""

import json
import sys

import pytest
from typer.testing import CliRunner

from sllm_node.checkpoint.cards import Cards, pack_bits
from sllm_node.cli.main import app, main
from sllm_node.core.errors import ConversionError
from sllm_node.core.types import ModelId
from sllm_node.device.optional import gpu_count
from tests.models import make_checkpoint, make_source


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    make_checkpoint(folder, "tiny")
    return folder


def damaged(tmp_path, damage):
    make_checkpoint(tmp_path, "bad")
    damage(tmp_path / "bad" / "shard-00000.bin")
    return tmp_path


def flip(path):
    data = bytearray(path.read_bytes())
    data[40_000] ^= 4
    path.write_bytes(data)


def test_a_folder_is_converted_listed_inspected_verified_and_removed(tmp_path):
    source, folder = make_source(tmp_path / "source", dtype="bfloat16"), tmp_path / "store"
    made = run("convert", source, "--name", "m", "--store", folder, "--chunk-size", "64KiB")
    assert made.exit_code == 0
    assert made.stdout.startswith("m: ")
    listed = run("ls", "--store", folder).stdout
    assert "BF16" in listed
    assert " thousand " in listed  # of parameters, which were 0 M
    assert "LlamaForCausalLM" in run("inspect", "m", "--store", folder).stdout
    assert "verified, no damage" in run("verify", "m", "--store", folder).stdout
    assert run("rm", "m", "--store", folder).stdout == f"m: removed from {folder}\n"
    assert json.loads(run("ls", "--store", folder, "--json").stdout)["checkpoints"] == []


def test_a_name_with_colons_is_shown_letter_by_letter(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, "q:smile:b")
    monkeypatch.setenv("FORCE_COLOR", "1")  # else no bar is shown
    assert "q:smile:b" in run("ls", "--store", tmp_path).stdout
    assert "verifying q:smile:b" in run("verify", "q:smile:b", "--store", tmp_path).stderr


def test_of_a_link_the_link_is_removed_and_what_stays_is_named(tmp_path):
    make_checkpoint(tmp_path / "disk", "large")
    folder = tmp_path / "store"
    folder.mkdir()
    for flags in ([], ["--json"]):
        (folder / "m").symlink_to(tmp_path / "disk" / "large")
        said = run("rm", "m", "--store", folder, *flags).stdout
        place = str(tmp_path / "disk" / "large")
        assert json.loads(said)["stays"] == place if flags else f"its bytes stay in {place}" in said
    assert list(folder.iterdir()) == []
    assert "verified, no damage" in run("verify", "large", "--store", tmp_path / "disk").stdout


def test_the_folder_may_be_that_of_a_nodes_config(tmp_path):
    store, config = tmp_path / "store", tmp_path / "node.toml"
    make_checkpoint(store, "tiny")
    config.write_text(f'[store]\npath = "{store}"\n')
    name = json.loads(run("ls", "--config", config, "--json").stdout)["checkpoints"][0]["name"]
    assert run("inspect", name, "--config", config).exit_code == 0
    assert run("verify", name, "--config", config).exit_code == 0
    assert run("rm", name, "--config", config).stdout == f"{name}: removed from {store}\n"


def test_conversion_casts_replaces_and_answers_in_json(tmp_path):
    source, folder = make_source(tmp_path / "source"), tmp_path / "store"
    arguments = ("convert", source, "--name", "m", "--store", folder, "--json")
    assert json.loads(run(*arguments).stdout)["dtype"] == "F32"
    forced = run(*arguments, "--force", "--dtype", "float16")
    assert json.loads(forced.stdout)["dtype"] == "F16"


def test_a_checkpoint_is_encoded_verified_inspected_and_made_raw_again(tmp_path):
    source, folder = make_source(tmp_path / "source", dtype="bfloat16"), tmp_path / "store"
    at = ("--store", folder)
    made = run("convert", source, "--name", "m", *at, "--codec", "exp", "--chunk-size", "64KiB")
    assert "% of raw, codec exp" in made.stdout
    assert "verified, no damage" in run("verify", "m", *at).stdout
    described = json.loads(run("inspect", "m", *at, "--json").stdout)
    assert described["format_version"] == 2
    assert described["ratio_by_dtype"]["BF16"] < 0.8
    assert described["bytes_on_disk"] < described["bytes"]
    assert "now" in run("recode", "m", *at, "--codec", "raw").stdout
    recoded = json.loads(run("recode", "m", *at, "--codec", "raw", "--json").stdout)
    assert (recoded["format_version"], recoded["ratio"]) == (1, 1.0)


def test_what_nobody_says_is_raw_on_a_machine_without_a_gpu_to_decode(tmp_path):
    source, folder = make_source(tmp_path / "source", dtype="bfloat16"), tmp_path / "store"
    at = ("--store", folder)
    run("convert", source, "--name", "m", *at)
    codec = "exp" if gpu_count() else "raw"
    assert json.loads(run("inspect", "m", *at, "--json").stdout)["codec"] == codec


def test_an_unknown_codec_is_refused_with_those_there_are(tmp_path):
    source = make_source(tmp_path / "source", dtype="bfloat16")
    with pytest.raises(ConversionError, match="none of raw, exp"):
        run("convert", source, "--name", "m", "--store", tmp_path / "store", "--codec", "zip")


def test_everything_there_is_to_read_comes_as_json(store):
    listed = json.loads(run("ls", "--store", store, "--json").stdout)
    assert [c["name"] for c in listed["checkpoints"]] == ["tiny"]
    inspected = json.loads(run("inspect", "tiny", "--store", store, "--json").stdout)
    assert inspected["tensors_in_order"][0]["name"] == "model.embed_tokens.weight"
    verified = json.loads(run("verify", "tiny", "--store", store, "--json").stdout)
    assert verified["damaged"] == []


@pytest.mark.parametrize("as_json", [True, False])
def test_verify_names_shard_offset_and_tensors_of_damage(tmp_path, as_json):
    folder = damaged(tmp_path, flip)
    done = run("verify", "bad", "--store", folder, *(["--json"] if as_json else []))
    assert done.exit_code == 1
    assert "shard-00000.bin" in done.stdout
    assert "model." in done.stdout
    if as_json:
        found = json.loads(done.stdout)["damaged"][0]
        assert found["offset"] <= 40_000 < found["offset"] + found["size"]


def test_verify_says_no_undamaged_of_what_ls_calls_unusable(tmp_path):
    def lengthen(path):
        path.write_bytes(path.read_bytes() + bytes(4096))

    folder = damaged(tmp_path, lengthen)
    assert "not usable" in run("ls", "--store", folder).stderr
    done = run("verify", "bad", "--store", folder)
    assert done.exit_code == 1
    assert "4096 bytes too many; tensors: none" in done.stdout
    assert "no damage" not in done.stdout
    told = run("verify", "bad", "--store", folder, "--json")
    assert told.exit_code == 1
    assert "the index says" in json.loads(told.stdout)["problem"]


def test_verify_reports_a_shard_that_was_cut_short_chunk_by_chunk(tmp_path):
    folder = damaged(tmp_path, lambda path: path.write_bytes(path.read_bytes()[:20_000]))
    done = run("verify", "bad", "--store", folder)
    assert done.exit_code == 1
    assert "shard-00000.bin" in done.stdout
    assert "not usable" in run("ls", "--store", folder).stderr


def test_inspect_shows_sizes_for_people(store):
    shown = run("inspect", "tiny", "--store", store).stdout
    assert "KiB" in shown
    assert "parameters" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "nobody"), "no model named 'nobody'"),
        (("rm", "nobody"), "no model named 'nobody'"),
        (("verify", "nobody"), "no model named 'nobody'"),
    ],
)
def test_what_is_not_there_is_one_sentence(store, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["sllm-node", *arguments, "--store", str(store)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert said in capsys.readouterr().err


def test_a_store_that_is_not_there_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sllm-node", "ls", "--store", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "is not there" in capsys.readouterr().err


def test_a_size_that_is_none_is_refused_by_its_option(tmp_path):
    done = run("convert", tmp_path, "--name", "m", "--store", tmp_path, "--chunk-size", "big")
    assert (done.exit_code, "big" in done.stderr) == (2, True)


@pytest.mark.parametrize("as_json", [True, False])
def test_bench_load_shows_loader_and_plain_reader_and_their_ratio(store, tmp_path, as_json):
    config = tmp_path / "node.toml"
    config.write_text(f'[store]\npath = "{store}"\nchunk_bytes = "64KiB"\nreader_threads = 2\n')
    options = ("--config", config, "--rounds", 2, "--warm-loads", 3)
    shown = run("bench", "load", "tiny", *options, *(["--json"] if as_json else [])).stdout
    if as_json:
        found = json.loads(shown)
        assert len(found["loader_over_plain"]) == len(found["plain_reader_bytes_per_s"]) == 2
        assert len(found["first_copy_s"]) == 3
        assert found["loader_over_plain_median"] > 0
    else:
        assert "loader / plain reader:" in shown
        assert "plain direct reader" in shown


def test_what_a_remote_has_is_listed_and_what_came_of_it_removed(tmp_path):
    made = make_checkpoint(tmp_path, "here")
    cards = Cards(tmp_path)
    files = {name: (made.path / name).read_bytes() for name in ("tensor_index.json", "config.json")}
    cards.write(ModelId("far"), "r", files)
    assert run("ls", "--store", tmp_path).stdout.count("remote") == 1
    assert cards.get(ModelId("far")) is not None
    shards = cards.root / "far"
    (shards / "shard-00000.bin").write_bytes((made.path / "shard-00000.bin").read_bytes())
    chunks = sum(len(shard.digests) for shard in made.index.shards)
    (shards / "fetched.bits").write_bytes(pack_bits([True] * chunks))
    listed = json.loads(run("ls", "--store", tmp_path, "--json").stdout)["checkpoints"]
    assert [(c["name"], c["tier"]) for c in listed] == [("here", "nvme"), ("far", "remote")]
    assert [c["fetched"] for c in listed] == [made.index.size] * 2
    assert run("rm", "far", "--store", tmp_path).stdout == f"far: removed from {tmp_path}\n"
    assert not (shards / "shard-00000.bin").exists()
    listed = json.loads(run("ls", "--store", tmp_path, "--json").stdout)["checkpoints"]
    assert listed[1]["fetched"] == 0
