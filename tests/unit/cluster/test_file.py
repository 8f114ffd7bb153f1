import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.file import parse_cluster, reload
from sllm_node.cluster.records import Desired
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import ModelId, NodeId

A = NodeId("a")
NODES = """
[[nodes]]
id = "a"
address = "10.0.0.1:8100"
[[nodes]]
id = "b"
address = "node-b.example:8100"
"""
KEY = '[trust]\nkey_file = "cluster.key"\n'
TLS = """[trust]
mode = "tls"
ca_file = "ca.crt"
certificate_file = "nodes/{id}.crt"
private_key_file = "nodes/{id}.key"
"""


def problems(text, me=None):
    with pytest.raises(ConfigError) as caught:
        parse_cluster(text, "cluster.toml", me)
    return caught.value.problems


def test_a_file_with_nodes_and_trust_is_enough():
    cluster = parse_cluster(NODES + KEY, me=A)
    assert cluster.peers(A) == {"b": "node-b.example:8100"}
    assert cluster.address(A) == "10.0.0.1:8100"
    assert cluster.limits.document_bytes == 64 << 10
    assert (cluster.limits.peer_bandwidth, cluster.limits.files_at_once) == (10**9, 4)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[[nodes]]\nid = 'c'\naddress = 'c:1'\nport = 3\n", "nodes[2].port: unknown key"),
        ("[[nodes]]\nid = 'c'\n", "nodes[2].address: is missing"),
        ("[[nodes]]\nid = '../c'\naddress = 'c:1'\n", "nodes[2].id = '../c'"),
        ("[[nodes]]\nid = 'a'\naddress = 'c:1'\n", "nodes[2].id = 'a': nodes[0] has it"),
        ("[[nodes]]\nid = 'c'\naddress = '10.0.0.1:8100'\n", "nodes[2].address"),
        ("[[nodes]]\nid = 'c'\naddress = 'NODE-B.example:8100'\n", "nodes[1] has it"),
        ("[[nodes]]\nid = 'c'\naddress = '0.0.0.0:1'\n", "can't call that"),
        ("[[nodes]]\nid = 'c'\naddress = '[::]:1'\n", "can't call that"),
        ("[[nodes]]\nid = 'c'\naddress = '[1:2]:1'\n", "no IPv6 address"),
        ("[[nodes]]\nid = 'c'\naddress = 'c:0'\n", "from 1 to 65535"),
        ("[[nodes]]\nid = 'c'\naddress = 'c'\n", "must be host:port"),
        ("[timing]\nsuspect = 3\n", "timing.suspect: unknown key; did you mean 'suspect_s'?"),
        ("[timing]\nsuspect_s = 1.5\n", "twice timing.heartbeat_s"),
        ("[timing]\ndead_s = 3.5\n", "timing.dead_s = 3.5"),
        ("[timing]\npublish_gap_s = 2\n", "timing.publish_gap_s = 2.0"),
        ("[timing]\ndead_s = inf\n", "timing.dead_s = inf"),
        ("[trust]\nmode = 'kerberos'\n", "trust.mode = 'kerberos': must be 'key' or 'tls'"),
        ("[[nodes]]\nid = 'g 1'\naddress = 'x:1'\n", "id = 'g 1': must be letters, digits"),
        ("[timing]\ndead_s = nan\n", "timing.dead_s = nan"),
        ("[limits]\nmax_nodes = 1\n", "2 are above limits.max_nodes"),
        ("[limits]\ndocument_bytes = '1GiB'\n", "limits.document_bytes"),
        ("[limits]\npeer_bandwidth = '1GB/h'\n", "limits.peer_bandwidth = '1GB/h'"),
        ("[limits]\nfiles_at_once = 0\n", "limits.files_at_once = 0"),
        ("[limits]\ndocument_bytes = '1 lot'\n", "limits.document_bytes = '1 lot'"),
        ("[cluster]\n", "cluster: unknown key"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, place):
    found = problems(NODES + text + ("" if "[trust]" in text else KEY))
    assert any(place in problem for problem in found), found


def test_all_problems_are_told_at_once():
    text = "[[nodes]]\nid = 'a'\naddress = 'x'\nx = 1\n[trust]\nmode = 'tls'\nkey_file = 'k'\n"
    found = "\n".join(problems(text))
    for place in ("nodes[0].x", "nodes[0].address", "trust.ca_file", "trust.key_file"):
        assert place in found


def test_a_file_without_nodes_is_refused():
    assert any("none is named" in p for p in problems(KEY))
    assert any("list of tables" in p for p in problems("nodes = 3\n" + KEY))


def test_a_node_that_is_not_in_the_file_is_told_which_are():
    assert problems(NODES + KEY, NodeId("z")) == (
        "nodes: 'z' (node.id of this node's config) is missing; known: a, b",
    )


@given(st.text(max_size=200))
def test_any_text_is_a_cluster_or_a_config_error(text):
    try:
        parse_cluster(text)
    except ConfigError:
        return


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "x"]), inner)
    ),
    max_leaves=5,
)


def written(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, (int, float)) else '"x"'


@given(st.sampled_from(["nodes", "trust", "timing", "limits", "trust.mode"]), values)
def test_any_value_anywhere_is_a_config_error(key, value):
    with pytest.raises(ConfigError):
        parse_cluster(f"{key} = {written(value)}\n")


def test_a_reload_tells_what_changed():
    old = parse_cluster(NODES + KEY, me=A)
    text = NODES.replace("node-b.example", "10.0.0.9") + KEY + "[timing]\ndead_s = 20\n"
    text += "[[nodes]]\nid = 'c'\naddress = 'c:1'\n"
    change = reload(old, text, "cluster.toml", A)
    assert (change.added, change.removed, change.moved) == (("c",), (), ("b",))
    assert change.needs_restart == ("timing.dead_s",)
    back = reload(change.cluster, NODES.replace("10.0.0.1", "10.0.0.2") + KEY, "", A)
    assert back.removed == ("c",)
    assert back.needs_restart == ("nodes.address of this node", "timing.dead_s")


def test_a_wrong_file_is_refused_at_reload():
    old = parse_cluster(NODES + KEY, me=A)
    with pytest.raises(ConfigError, match="is missing"):
        reload(old, NODES.replace('"a"', '"z"') + KEY, "cluster.toml", A)


# --- scaled models and the directory ---------------------------------------------------------------

DIRECTORY = '[directory]\nendpoints = ["http://10.0.0.9:2379"]\n'


def test_models_say_between_how_many_replicas_they_have():
    text = NODES + KEY + "[models.m]\nmin_replicas = 1\nmax_replicas = 3\n[models.n]\n"
    assert parse_cluster(text).desired() == (
        Desired(ModelId("m"), 1, 3, 300.0),
        Desired(ModelId("n"), 0, 1, 300.0),
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[models.m]\nmin_replicas = 2\n", "models.m: from 2 to 1 replicas"),
        (
            "[models.m]\nmin_replica = 2\n",
            "models.m.min_replica: unknown key; did you mean 'min_replicas'?",
        ),
        ("[models.m]\nkeep_alive_s = -1\n", "models.m.keep_alive_s = -1"),
        ("models = 3\n", "models must be a table of tables"),
        ("[directory]\nlease_s = 3\n", "directory.endpoints: is missing"),
        ('[directory]\nendpoints = ["etcd:2379"]\n', "directory.endpoints = ['etcd:2379']"),
        (DIRECTORY + 'prefix = "sllm"\n', "directory.prefix = 'sllm'"),
        (DIRECTORY + 'user = "u"\n', "directory.password_file: is missing"),
        (DIRECTORY + 'password_file = "p"\n', "directory.user: is missing"),
        (DIRECTORY + 'ca_file = "ca"\n', "directory.ca_file: has no use"),
    ],
)
def test_a_wrong_table_of_models_or_the_directory_is_named(text, place):
    found = problems((text + NODES + KEY) if text.startswith("models =") else NODES + KEY + text)
    assert any(problem.startswith(place) for problem in found), found


def test_a_file_with_a_directory_needs_to_name_no_node():
    cluster = parse_cluster(KEY + DIRECTORY, me=A)
    assert (cluster.has_directory, cluster.peers(A), cluster.address(A)) == (True, {}, "")


def test_a_changed_directory_needs_a_restart_and_changed_models_do_not():
    old = parse_cluster(NODES + KEY)
    new = reload(old, NODES + KEY + DIRECTORY + "[models.m]\n", "cluster.toml", A)
    assert new.needs_restart == ("directory.endpoints",)


def test_an_operator_says_whether_sessions_move_for_placements_sake_without_a_restart():
    old = parse_cluster(NODES + KEY)
    assert old.placement.moves
    new = reload(old, NODES + KEY + "[placement]\nmoves = false\ngain_s = 1.5\n", "it", A)
    assert (new.cluster.placement.moves, new.cluster.placement.gain_s) == (False, 1.5)
    assert new.needs_restart == ()
    with pytest.raises(ConfigError, match=r"placement\.vacate_s"):
        parse_cluster(NODES + KEY + "[placement]\nvacate_s = 0\n")
