import pytest

from sllm_node.cluster.agreement import Agreement, digest_of
from sllm_node.cluster.file import parse_cluster
from sllm_node.core.types import NodeId

B = NodeId("b")
NODES = '[[nodes]]\nid = "a"\naddress = "h:1"\n[[nodes]]\nid = "b"\naddress = "h:2"\n'
TURNED = '[[nodes]]\nid = "b"\naddress = "h:2"\n[[nodes]]\nid = "a"\naddress = "h:1"\n'
KEY = '[trust]\nkey_file = "k"\n'


def digest(text):
    return digest_of(parse_cluster(text))


@pytest.mark.parametrize(
    "same",
    [
        "# a word\n" + NODES + KEY,
        TURNED + KEY,
        NODES + '[trust]\nkey_file = "elsewhere/k"\n',
        NODES + KEY + "[timing]\nheartbeat_s = 1.0\n",
        NODES + KEY + '[limits]\ndocument_bytes = "64KiB"\n',
    ],
)
def test_files_that_say_the_same_have_one_digest(same):
    assert digest(same) == digest(NODES + KEY)


@pytest.mark.parametrize(
    "other",
    [
        NODES.replace("h:2", "h:3") + KEY,
        NODES + KEY + "[timing]\ndead_s = 20.0\n",
        NODES + KEY + '[limits]\ndocument_bytes = "128KiB"\n',
        NODES + KEY + "[placement]\nmoves = false\n",
        NODES + KEY + "[models.m]\nmin_replicas = 1\n",
    ],
)
def test_files_that_say_something_else_have_another(other):
    assert digest(other) != digest(NODES + KEY)


def test_with_a_directory_files_may_name_other_nodes():
    directory = '[directory]\nendpoints = ["http://e:1"]\n'
    assert digest(NODES + KEY + directory) == digest(KEY + directory)


def test_a_difference_is_shown_at_once_and_logged_when_it_lasts_once(caplog):
    agreement = Agreement(10.0)
    for now in (0.0, 5.0, 10.0, 15.0):
        agreement.look("x", {B: "y"}, now)
        assert agreement.problem(B)
        assert len(caplog.records) == (now >= 10.0)
    agreement.look("y", {B: "y"}, 16.0)
    assert not agreement.problem(B)


def test_an_edit_that_reaches_all_nodes_one_after_another_is_not_logged(caplog):
    agreement = Agreement(10.0)
    agreement.look("x", {B: "y"}, 0.0)
    agreement.look("y", {B: "y"}, 1.0)
    agreement.look("y", {B: ""}, 20.0)  # another release
    assert not caplog.records
    assert not agreement.problem(B)
