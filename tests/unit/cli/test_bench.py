"""`sllm-node bench load` as a comparison; as a plain reading it is tested with the checkpoints."""

import json
import sys

import pytest
from typer.testing import CliRunner

from sllm_node.cli.main import app, main


def test_a_comparison_prints_json_and_keeps_its_files_out_of_the_catalogue(tmp_path):
    options = ["--shape", "tiny", "--scenario", "cached", "--rounds", 1, "--no-probe", "--json"]
    options += ["--contestants", "sllm_node,safetensors", "--store", tmp_path / "store"]
    done = CliRunner().invoke(app, ["bench", "load", *map(str, options)], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["scenarios"]["cached"]["contestants"]]
    assert found["figures"]["cached_speedup_over_safetensors"] > 0
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".bench"]


def test_a_comparison_prints_a_table_and_writes_a_folder(tmp_path):
    options = ["--shape", "tiny", "--scenario", "cached", "--rounds", 1, "--no-probe"]
    options += [
        "--contestants",
        "sllm_node",
        "--store",
        tmp_path / "store",
        "--out",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(app, ["bench", "load", *map(str, options)], catch_exceptions=False)
    assert "39 tensors equal" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of NAME"),
        (("name", "--shape", "tiny"), "give one of NAME"),
        (("--shape", "tiny", "--scenario", "warm"), "no scenario 'warm'"),
        (("--shape", "9b"), "no shape '9b'"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    command = ["sllm-node", "bench", "load", *arguments, "--store", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert said in capsys.readouterr().err


def test_a_store_that_is_not_there_is_told_as_such(tmp_path, monkeypatch, capsys):
    command = ["sllm-node", "bench", "load", "a", "--store", f"{tmp_path}/nope"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    assert f"the store folder {tmp_path}/nope: is not there" in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_one_sentence(tmp_path, monkeypatch, capsys):
    options = ["--shape", "tiny", "--scenario", "cached", "--rounds", "1", "--no-probe", "--json"]
    options += ["--contestants", "sllm_node", "--store", f"{tmp_path}/\udcff"]
    monkeypatch.setattr(sys, "argv", ["sllm-node", "bench", "load", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "sllm-node: '\\udcff' of an argument is no text in UTF-8\n" in capsys.readouterr().err
