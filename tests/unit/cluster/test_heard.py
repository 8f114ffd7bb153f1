"""What peers said last."""

from sllm_node.cluster.document import encode_state
from sllm_node.cluster.heard import Heard
from sllm_node.core.types import NodeId
from tests.unit.cluster.clusters import one_node

A, B = NodeId("a"), NodeId("b")


def said(name):
    return encode_state(one_node(name=name), 1 << 16)


def test_what_a_peer_said_stays_while_it_cant_be_asked():
    heard = Heard()
    heard.take(A, said("a"), 3.0)
    assert heard.absent({A}, 4.0) == []
    assert [state.node for state in heard.absent((), 4.0)] == ["a"]


def test_a_state_in_anothers_name_is_nobodys():
    heard = Heard()
    heard.take(A, said("b"), 3.0)
    assert heard.last(A) is heard.last(B) is None


def test_a_peer_that_left_is_known_until_it_had_time_to_come_back():
    heard = Heard()
    heard.take(A, said("a"), 3.0)
    heard.leaves(A, 10.0)
    assert not heard.has(A)
    assert [state.node for state in heard.absent((), 9.0)] == ["a"]
    assert heard.absent((), 10.0) == []


def test_a_peer_that_came_back_has_not_left():
    heard = Heard()
    heard.take(A, said("a"), 3.0)
    heard.leaves(A, 10.0)
    heard.take(A, said("a"), 5.0)
    assert heard.absent({A}, 6.0) == []
    heard.forget(A)
    assert heard.absent((), 6.0) == []
