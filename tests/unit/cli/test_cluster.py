import json
import sys

import pytest
from typer.testing import CliRunner

from sllm_node.cli.main import app, main


def run(*arguments):
    return CliRunner().invoke(app, ["cluster", *map(str, arguments)])


def test_a_cluster_is_made_joined_and_checked(tmp_path):
    assert f"{tmp_path}/ca.crt" in run("init", tmp_path).stdout
    joined = run("join", tmp_path, "a", "10.0.0.1:8100")
    assert f"{tmp_path}/nodes/a.key" in joined.stdout
    assert "copy these to a" in joined.stderr
    file = tmp_path / "cluster.toml"
    assert run("check", file).stdout == f"{file}: no problems\n"
    assert run("join", tmp_path, "a", "--renew").exit_code == 0
    assert json.loads(run("check", file, "--node", "a", "--json").stdout)["problems"] == []


def test_a_cluster_with_a_shared_key(tmp_path):
    run("init", tmp_path, "--trust", "key")
    assert f"{tmp_path}/cluster.key" in run("join", tmp_path, "a", "10.0.0.1:8100").stdout
    assert run("check", tmp_path / "cluster.toml").exit_code == 0


@pytest.mark.parametrize("arguments", [(), ("c:1", "--renew")])
def test_join_needs_an_address_or_renew(tmp_path, arguments):
    run("init", tmp_path)
    assert run("join", tmp_path, "a", *arguments).exit_code == 1


def test_problems_end_with_status_1(tmp_path, monkeypatch, capsys):
    run("init", tmp_path)
    file = tmp_path / "cluster.toml"
    as_json = run("check", file, "--json")
    assert as_json.exit_code == 1
    assert "none is named" in json.loads(as_json.stdout)["problems"][0]
    monkeypatch.setattr(sys, "argv", ["sllm-node", "cluster", "check", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "1 problem\n" in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sllm_node.cluster.folder", raising=False)
    monkeypatch.setitem(sys.modules, "sllm_node.cluster.folder", None)
    ended = run("init", tmp_path)
    assert ended.exit_code == 1
    assert "sllm-node[cluster]" in ended.stderr
