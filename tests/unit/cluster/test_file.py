import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.cluster.file import load_cluster, parse_cluster, reload, trust_path
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

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
        ("[timing]\ndead_s = nan\n", "timing.dead_s = nan"),
        ("[limits]\nmax_nodes = 1\n", "2 are above limits.max_nodes"),
        ("[limits]\ndocument_bytes = '1GiB'\n", "limits.document_bytes"),
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
