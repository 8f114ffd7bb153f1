"""The cluster file on a disk, and the files that it names."""

import pytest

from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.named_files import load_cluster, trust_path
from sllm_node.core.errors import ConfigError
from tests.unit.cluster.test_file import DIRECTORY, KEY, NODES, TLS, A


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    file, key = tmp_path / "cluster.toml", tmp_path / "cluster.key"
    file.write_text(NODES + KEY)
    with pytest.raises(ConfigError, match=r"trust.key_file.*No such file"):
        load_cluster(file, A)
    key.write_text("secret")
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        load_cluster(file, A)
    key.chmod(0o600)
    assert load_cluster(file, A).trust.key_file == "cluster.key"


def test_paths_are_beside_the_file_and_may_name_the_node(tmp_path):
    cluster = parse_cluster(NODES + TLS, me=A)
    path = trust_path(cluster, tmp_path / "cluster.toml", A, "certificate_file")
    assert path == tmp_path / "nodes" / "a.crt"


@pytest.mark.parametrize("content", [b"\xff", b"= 1"])
def test_a_file_that_is_no_toml_is_told(tmp_path, content):
    file = tmp_path / "cluster.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=str(file)):
        load_cluster(file)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_cluster(tmp_path / "cluster.toml")


def test_files_of_the_directory_are_looked_at_and_its_secrets_guarded(tmp_path):
    (tmp_path / "cluster.key").write_text("00" * 32)
    (tmp_path / "cluster.key").chmod(0o600)
    (tmp_path / "password").write_text("secret")
    (tmp_path / "password").chmod(0o644)
    file = tmp_path / "cluster.toml"
    file.write_text(KEY + DIRECTORY + 'user = "u"\npassword_file = "password"\n')
    with pytest.raises(ConfigError, match=r"directory.password_file.*others can read"):
        load_cluster(file, A)
    (tmp_path / "password").chmod(0o600)
    load_cluster(file, A)
