"""A cluster file that is read again."""

import pytest

from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.followed_file import FollowedFile
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

TEXT = """
[[nodes]]
id = "a"
address = "10.0.0.1:8100"
[trust]
key_file = "key"
"""
MORE = TEXT + '[[nodes]]\nid = "b"\naddress = "10.0.0.2:8100"\n'


def test_a_change_is_told_until_it_is_read(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    file = FollowedFile(path, NodeId("a"))
    assert not file.has_changed()
    path.write_text(MORE)
    assert file.has_changed()
    assert file.read(parse_cluster(TEXT)).added == (NodeId("b"),)
    assert not file.has_changed()


def test_a_file_that_is_gone_is_told_once(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    file = FollowedFile(path, NodeId("a"))
    path.unlink()
    assert file.has_changed()
    with pytest.raises(ConfigError, match="can't be read"):
        file.read(parse_cluster(TEXT))
    assert not file.has_changed()
