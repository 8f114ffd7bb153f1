"""The cluster file on a disk, and the files that it names."""

import pytest

from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.named_files import (
    credential_lines,
    load_cluster,
    trust_path,
    used_trust_path,
)
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


@pytest.fixture
def credentials(tmp_path, monkeypatch):
    """Return the folder of what systemd hands over: by its modes a group may read all of it."""
    folder = tmp_path / "run" / "credentials"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def handed_over(path, content="secret", mode=0o440):
    path.write_text(content)
    path.chmod(mode)


def test_what_systemd_hands_over_goes_before_the_file_that_the_node_may_not_read(
    tmp_path, credentials
):
    file = tmp_path / "cluster.toml"
    file.write_text(NODES + KEY)
    handed_over(credentials / "trust.key_file")
    cluster = load_cluster(file, A)
    assert used_trust_path(cluster, file, A, "key_file") == credentials / "trust.key_file"
    handed_over(credentials / "trust.key_file", mode=0o444)
    with pytest.raises(ConfigError, match="mode 0444"):
        load_cluster(file, A)


def test_a_path_into_the_folder_of_credentials_may_be_named_too(tmp_path, credentials):
    file = tmp_path / "cluster.toml"
    file.write_text(NODES + f'[trust]\nkey_file = "{credentials}/mine"\n')
    handed_over(credentials / "mine")
    load_cluster(file, A)


def test_a_secret_of_the_directory_may_be_handed_over(tmp_path, credentials):
    file = tmp_path / "cluster.toml"
    file.write_text(KEY + DIRECTORY + 'user = "u"\npassword_file = "password"\n')
    handed_over(credentials / "trust.key_file")
    handed_over(credentials / "directory.password_file")
    load_cluster(file, A)


def test_elsewhere_a_group_that_can_read_a_secret_is_told_also_if_there_are_credentials(
    tmp_path, credentials
):
    file = tmp_path / "cluster.toml"
    file.write_text(NODES + KEY)
    handed_over(tmp_path / "cluster.key")
    with pytest.raises(ConfigError, match="mode 0440"):
        load_cluster(file, A)
    assert not list(credentials.iterdir())


def test_each_file_that_a_node_needs_has_a_line_of_a_unit(tmp_path):
    cluster = parse_cluster(NODES + TLS, me=A)
    lines = credential_lines(cluster, tmp_path / "prod" / "cluster.toml", A)
    place = "/etc/sllm-node/prod"
    assert lines == (
        f"LoadCredential=trust.ca_file:{place}/ca.crt",
        f"LoadCredential=trust.certificate_file:{place}/nodes/a.crt",
        f"LoadCredential=trust.private_key_file:{place}/nodes/a.key",
    )
