import json
import socket
import sys

import pytest
from typer.testing import CliRunner

from sllm_node.cli.main import app, main


def run(*arguments):
    return CliRunner().invoke(app, ["cluster", *map(str, arguments)])


@pytest.fixture
def addresses():
    """Return two addresses: somebody listens at the first, and at the second nobody does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            gone = closed.getsockname()[1]
        yield [f"127.0.0.1:{port}" for port in (listening.getsockname()[1], gone)]


def test_a_cluster_is_made_joined_and_checked(tmp_path, addresses):
    assert f"{tmp_path}/ca.crt" in run("init", tmp_path).stdout
    joined = run("join", tmp_path, "a", addresses[0])
    assert f"{tmp_path}/nodes/a.key" in joined.stdout
    assert "copy these to a" in joined.stderr
    place = f"/etc/sllm-node/{tmp_path.name}/nodes"
    assert f"  LoadCredential=trust.private_key_file:{place}/a.key\n" in joined.stderr
    file = tmp_path / "cluster.toml"
    assert run("check", file).stdout.endswith(f"{file}: no problems\n")
    assert run("join", tmp_path, "a", "--renew").exit_code == 0
    assert json.loads(run("check", file, "--node", "a", "--json").stdout)["problems"] == []


@pytest.mark.parametrize("trust", ["tls", "key"])
def test_a_check_before_nodes_run_says_what_is_well_and_who_is_not_there_yet(
    tmp_path, addresses, trust
):
    run("init", tmp_path, "--trust", trust)
    file = tmp_path / "cluster.toml"
    new = run("check", file)
    assert new.exit_code == 0
    assert f"note     {file}: no node has joined yet; 'sllm-node cluster join " in new.stdout
    assert ("ca.crt: a certificate until" if trust == "tls" else "a good key") in new.stdout
    for name, address in zip(("a", "b"), addresses, strict=True):
        run("join", tmp_path, name, address)
    done = run("check", file)
    assert done.exit_code == 0
    assert f"ok       {file}: 2 nodes: a, b\n" in done.stdout
    assert f"ok       a at {addresses[0]}: listens\n" in done.stdout
    assert f"not yet  b at {addresses[1]}: connection refused; 'sllm-node serve'" in done.stdout
    assert done.stdout.endswith("no problems, 1 of 2 nodes not running yet\n")
    told = json.loads(run("check", file, "--json").stdout)
    assert [node["silent"] for node in told["nodes"]] == [None, "connection refused"]


def test_a_cluster_with_a_shared_key(tmp_path):
    run("init", tmp_path, "--trust", "key")
    assert f"{tmp_path}/cluster.key" in run("join", tmp_path, "a", "127.0.0.1:1").stdout
    assert run("check", tmp_path / "cluster.toml").exit_code == 0


@pytest.mark.parametrize("arguments", [(), ("c:1", "--renew")])
def test_join_needs_an_address_or_renew(tmp_path, arguments):
    run("init", tmp_path)
    assert run("join", tmp_path, "a", *arguments).exit_code == 1


def test_problems_end_with_status_1(tmp_path, monkeypatch, capsys):
    run("init", tmp_path, "--trust", "key")
    file = tmp_path / "cluster.toml"
    (tmp_path / "cluster.key").chmod(0o644)
    as_json = run("check", file, "--json")
    assert as_json.exit_code == 1
    assert "others can read" in json.loads(as_json.stdout)["problems"][0]
    file.write_text("x = 1\n")
    assert "unknown key" in json.loads(run("check", file, "--json").stdout)["problems"][0]
    file.write_text('[trust]\nkey_file = "cluster.key"\n')
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
