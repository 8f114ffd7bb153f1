"""Where peers are, by the cluster file and the directory."""

from sllm_node.cluster.addresses import Addresses
from sllm_node.core.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
NAMED = {A: "file:1"}


def test_where_the_file_names_a_peer_the_file_counts():
    addresses = Addresses(NAMED)
    assert addresses.put(A, "listed:1")
    assert addresses.put(B, "listed:2")
    assert not addresses.put(B, "listed:2")
    addresses.follow(NAMED)
    assert addresses.known == {A: "file:1", B: "listed:2"}


def test_a_peer_that_is_not_listed_any_more_lingers_until_it_is_silent():
    addresses = Addresses({})
    addresses.put(B, "listed:2")
    assert not addresses.drop(B, may_linger=True)
    assert not addresses.drop_silent({C})
    assert addresses.drop_silent({B, C})
    addresses.follow({})
    assert addresses.known == {}


def test_a_peer_that_is_listed_again_does_not_linger():
    addresses = Addresses({})
    addresses.put(B, "listed:2")
    addresses.drop(B, may_linger=True)
    addresses.put(B, "listed:2")
    assert not addresses.drop_silent({B})


def test_who_has_left_is_forgotten_at_once_and_once():
    addresses = Addresses({})
    addresses.put(B, "listed:2")
    assert addresses.drop(B, may_linger=False)
    assert not addresses.drop(B, may_linger=False)
