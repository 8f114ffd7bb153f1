"""A cluster file that is read again."""

import pytest

from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.followed_file import FollowedFile
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

A = NodeId("a")
TEXT = """
[[nodes]]
id = "a"
address = "10.0.0.1:8100"
[trust]
key_file = "key"
"""
MORE = TEXT + '[[nodes]]\nid = "b"\naddress = "10.0.0.2:8100"\n'


@pytest.fixture
def path(tmp_path):
    """Return a cluster file with its key."""
    (tmp_path / "key").write_text("old")
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    return path


def followed(path):
    return FollowedFile(path, A, parse_cluster(TEXT))


def nothing(changed):
    """Take no changed file."""
    return frozenset()


def replaced(path, text):
    """Put another file in the place of one, as who copies does; its number is another in any case."""
    (path.parent / "new").write_text(text)
    (path.parent / "new").replace(path)


def test_a_change_is_told_until_it_is_read(path):
    file = followed(path)
    assert not file.has_changed()
    path.write_text(MORE)
    assert file.has_changed()
    assert file.read(parse_cluster(TEXT), nothing).added == (NodeId("b"),)
    assert not file.has_changed()


def test_a_file_that_is_gone_is_told_once(path):
    file = followed(path)
    path.unlink()
    assert file.has_changed()
    with pytest.raises(ConfigError, match="can't be read"):
        file.read(parse_cluster(TEXT), nothing)
    assert not file.has_changed()


def test_another_key_needs_a_restart_until_it_is_the_old_one_again(path):
    file = followed(path)
    replaced(path.parent / "key", "new")
    assert file.has_changed()
    for _ in range(2):
        assert file.read(parse_cluster(TEXT), nothing).needs_restart == ("trust.key_file",)
        assert not file.has_changed()
    replaced(path.parent / "key", "old")
    assert file.read(parse_cluster(TEXT), nothing).needs_restart == ()


def test_what_is_taken_while_the_node_runs_needs_no_restart(path):
    file, asked = followed(path), []

    def take(changed):
        asked.append(changed)
        return changed

    replaced(path.parent / "key", "new")
    assert file.read(parse_cluster(TEXT), take).needs_restart == ()
    assert file.read(parse_cluster(TEXT), take).needs_restart == ()
    assert asked == [{"trust.key_file"}, frozenset()]


def test_what_is_refused_is_told_and_asked_for_again(path, caplog):
    file, asked = followed(path), []

    def refuse(changed):
        asked.append(changed)
        raise ConfigError("cluster.toml", ("trust: it is none",))

    replaced(path.parent / "key", "new")
    for _ in range(2):
        assert file.read(parse_cluster(TEXT), refuse).needs_restart == ()
    assert asked == [{"trust.key_file"}] * 2
    assert "trust: it is none" in str(caplog.records[0].error)


def test_a_key_that_is_being_replaced_is_not_told_as_changed(path):
    file = followed(path)
    (path.parent / "key").unlink()
    assert file.read(parse_cluster(TEXT), nothing).needs_restart == ()


def test_what_systemd_handed_over_is_not_taken_from_elsewhere(path, monkeypatch, tmp_path_factory):
    handed = tmp_path_factory.mktemp("credentials")
    (handed / "trust.key_file").write_text("old")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))
    file, asked = followed(path), []
    replaced(path.parent / "key", "new")

    def take(changed):
        asked.append(changed)
        return changed

    assert file.read(parse_cluster(TEXT), take).needs_restart == ("trust.key_file",)
    assert asked == [frozenset()]
