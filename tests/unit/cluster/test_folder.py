from datetime import UTC, datetime, timedelta

import pytest

from sllm_node.cluster.folder import FILE, check, init, join, renew
from sllm_node.core.errors import ClusterFolderError, ConfigError
from sllm_node.core.types import NodeId

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A, B = NodeId("a"), NodeId("b")


def made(folder, trust="tls"):
    init(folder, trust, NOW)
    join(folder, A, "10.0.0.1:8100", NOW)
    join(folder, B, "b.example:8100", NOW)
    return folder / FILE


@pytest.mark.parametrize("trust", ["tls", "key"])
def test_a_new_cluster_is_in_order(tmp_path, trust):
    file = made(tmp_path, trust)
    assert check(file, None, NOW).problems == ()
    assert check(file, A, NOW).problems == ()


@pytest.mark.parametrize("trust", ["tls", "key"])
def test_secrets_are_their_owners_only(tmp_path, trust):
    made(tmp_path, trust)
    keys = sorted(path.name for path in tmp_path.rglob("*.key"))
    assert keys == (["a.key", "b.key", "ca.key"] if trust == "tls" else ["cluster.key"])
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.key")} == {0o600}


def test_join_names_what_the_node_needs_and_never_the_authoritys_key(tmp_path):
    init(tmp_path, "tls", NOW)
    needed = [path.name for path in join(tmp_path, A, "10.0.0.1:8100", NOW)]
    assert needed == [FILE, "ca.crt", "a.crt", "a.key"]


def test_a_node_needs_only_its_own_files(tmp_path):
    file = made(tmp_path)
    (tmp_path / "nodes" / "b.key").unlink()
    (tmp_path / "ca.key").unlink()
    assert check(file, A, NOW).problems == ()
    assert any("b.key" in problem for problem in check(file, None, NOW).problems)


def test_a_cluster_is_not_made_twice(tmp_path):
    made(tmp_path)
    with pytest.raises(ClusterFolderError, match="already"):
        init(tmp_path, "tls", NOW)
    (tmp_path / FILE).unlink()
    with pytest.raises(ClusterFolderError, match=r"ca.key: File exists"):
        init(tmp_path, "tls", NOW)


@pytest.mark.parametrize(
    ("node", "address"), [("a", "c:1"), ("c", "10.0.0.1:8100"), ('c"\nx', "c:1"), ("c", "c")]
)
def test_a_wrong_join_changes_nothing(tmp_path, node, address):
    file = made(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        join(tmp_path, NodeId(node), address, NOW)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert check(file, None, NOW).problems == ()


def test_join_without_init_or_authority_is_told(tmp_path):
    with pytest.raises(ClusterFolderError, match="'init' makes one"):
        join(tmp_path, A, "10.0.0.1:8100", NOW)
    init(tmp_path, "tls", NOW)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ClusterFolderError, match=r"ca.key: No such file"):
        join(tmp_path, A, "10.0.0.1:8100", NOW)
    (tmp_path / "ca.key").write_text("x")
    with pytest.raises(ClusterFolderError, match="can't issue"):
        join(tmp_path, A, "10.0.0.1:8100", NOW)


def test_an_ended_certificate_is_told_and_renewed(tmp_path):
    file = made(tmp_path)
    later = NOW + timedelta(days=1000)
    assert sum("ended on" in problem for problem in check(file, None, later).problems) == 2
    renew(tmp_path, A, later)
    assert check(file, A, later).problems == ()


def test_only_known_nodes_with_certificates_are_renewed(tmp_path):
    made(tmp_path / "tls")
    with pytest.raises(ConfigError, match="'join' adds it"):
        renew(tmp_path / "tls", NodeId("z"), NOW)
    made(tmp_path / "key", "key")
    with pytest.raises(ClusterFolderError, match="no certificates"):
        renew(tmp_path / "key", A, NOW)


def test_a_bad_shared_key_is_told(tmp_path):
    file = made(tmp_path, "key")
    (tmp_path / "cluster.key").write_text("secret")
    assert "hexadecimal" in check(file, None, NOW).problems[0]
    (tmp_path / "cluster.key").chmod(0o644)
    assert "chmod 600" in check(file, A, NOW).problems[0]
    (tmp_path / "cluster.key").unlink()
    assert "No such file" in check(file, A, NOW).problems[0]


@pytest.mark.parametrize("node", [A, None])
def test_the_shared_key_may_lie_in_a_file_of_each_node(tmp_path, node):
    file = made(tmp_path, "key")
    file.write_text(file.read_text().replace("cluster.key", "{id}.key"))
    (tmp_path / "cluster.key").rename(tmp_path / "a.key")
    found = check(file, node, NOW)
    assert found.problems == ()
    assert f"{tmp_path / 'a.key'}: a good key" in found.well


def test_a_readable_authority_key_is_told(tmp_path):
    file = made(tmp_path)
    (tmp_path / "ca.key").chmod(0o644)
    assert "ca.key" in check(file, None, NOW).problems[0]


def test_a_damaged_authority_and_an_unknown_node_are_told(tmp_path):
    file = made(tmp_path)
    with pytest.raises(ConfigError, match="known: a, b"):
        check(file, NodeId("z"), NOW)
    (tmp_path / "ca.crt").write_text("x")
    assert "ca.crt: is no certificate" in check(file, None, NOW).problems[0]
    (tmp_path / "ca.crt").unlink()
    assert "No such file" in check(file, None, NOW).problems[0]


def test_a_folder_that_can_t_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterFolderError):
        init(tmp_path / "file", "key", NOW)


def test_a_secret_that_others_can_read_is_told_once_whatever_else_is_in_it(tmp_path):
    init(tmp_path, "key", NOW)
    join(tmp_path, NodeId("a"), "10.0.0.1:8100", NOW)
    (tmp_path / "cluster.key").write_text("short")
    (tmp_path / "cluster.key").chmod(0o644)
    (problem,) = check(tmp_path / "cluster.toml", None, NOW).problems
    assert "others can read" in problem


def test_a_nodes_key_that_others_can_read_is_not_told_as_a_wrong_one_too(tmp_path):
    init(tmp_path, "tls", NOW)
    join(tmp_path, NodeId("a"), "10.0.0.1:8100", NOW)
    key = tmp_path / "nodes" / "a.key"
    key.write_text("")
    key.chmod(0o644)
    (problem,) = check(tmp_path / "cluster.toml", None, NOW).problems
    assert "others can read" in problem


def test_on_a_node_the_certificates_of_others_are_not_asked_for(tmp_path):
    init(tmp_path, "tls", NOW)
    for name, host in (("a", 1), ("b", 2)):
        join(tmp_path, NodeId(name), f"10.0.0.{host}:8100", NOW)
    for path in (tmp_path / "ca.key", *(tmp_path / "nodes").glob("b.*")):
        path.unlink()
    found = check(tmp_path / "cluster.toml", None, NOW)
    assert found.problems == ()
    assert "certificates of b are not here" in found.remarks[0]
