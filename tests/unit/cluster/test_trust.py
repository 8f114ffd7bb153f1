"""What nodes know each other by, renewed while they run."""

import ssl
from datetime import UTC, datetime

import pytest

from sllm_node.cluster import folder
from sllm_node.cluster.certificates import _PURPOSES
from sllm_node.cluster.named_files import load_cluster
from sllm_node.cluster.trust import KeyTrust, open_trust
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

A = NodeId("a")
OWN = frozenset({"trust.certificate_file", "trust.private_key_file"})


@pytest.fixture
def place(tmp_path):
    """Return the folder of a cluster of one node, under TLS."""
    folder.init(tmp_path, "tls", datetime.now(UTC))
    folder.join(tmp_path, A, "localhost:8100", datetime.now(UTC))
    return tmp_path


def opened(place):
    file = place / folder.FILE
    cluster = load_cluster(file)
    return open_trust(cluster, file, A, cluster.address(A), lambda: 1)


def shown(trust):
    """Return the serial numbers of the certificates that both sides of a new handshake show."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.client_tls.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = trust.server_tls.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return [side.getpeercert()["serialNumber"] for side in (client, server)]


def test_a_renewed_certificate_is_shown_from_the_next_connection_on(place):
    trust = opened(place)
    before = shown(trust)
    folder.renew(place, A, datetime.now(UTC))
    assert shown(trust) == before
    assert trust.renew(OWN) == OWN
    assert shown(trust) == shown(opened(place)) != before


def test_a_certificate_whose_key_has_not_come_yet_changes_nothing(place):
    trust = opened(place)
    before, key = shown(trust), (place / "nodes" / "a.key").read_bytes()
    folder.renew(place, A, datetime.now(UTC))
    (place / "nodes" / "a.key").write_bytes(key)
    with pytest.raises(ConfigError, match="trust: "):
        trust.renew(OWN)
    assert shown(trust) == before


def test_a_certificate_that_peers_would_not_believe_is_not_taken(place, tmp_path_factory):
    trust = opened(place)
    before, mine = shown(trust), place / "nodes"
    folder.join(place, NodeId("b"), "localhost:8101", datetime.now(UTC))
    strange = tmp_path_factory.mktemp("strange")
    folder.init(strange, "tls", datetime.now(UTC))
    folder.join(strange, A, "localhost:8100", datetime.now(UTC))
    for found, problem in (
        (place / "nodes" / "b", "is the certificate of 'b'"),
        (strange / "nodes" / "a", "verify failed"),
    ):
        for kind in ("crt", "key"):
            (mine / f"a.{kind}").write_bytes(found.with_suffix(f".{kind}").read_bytes())
        with pytest.raises(ConfigError, match=problem):
            trust.renew(OWN)
        assert shown(trust) == before


def test_a_certificate_for_another_address_is_not_taken_before_the_restart_that_takes_both(place):
    trust = opened(place)
    before, file = shown(trust), place / folder.FILE
    file.write_text(file.read_text().replace("localhost", "10.1.1.1"))
    folder.renew(place, A, datetime.now(UTC))
    with pytest.raises(ConfigError, match=r"not for .localhost.,.* a restart takes both"):
        trust.renew(OWN)
    assert shown(trust) == before
    assert opened(place).renew(OWN) == OWN


@pytest.mark.parametrize("wanted", list(_PURPOSES))
def test_a_certificate_for_one_direction_only_is_not_taken(place, monkeypatch, wanted):
    trust = opened(place)
    before = shown(trust)
    monkeypatch.setattr("sllm_node.cluster.certificates._PURPOSES", {wanted: ""})
    folder.renew(place, A, datetime.now(UTC))
    with pytest.raises(ConfigError, match="unsuitable certificate purpose"):
        trust.renew(OWN)
    assert shown(trust) == before


def test_a_certificate_of_another_authority_is_not_taken_if_that_has_come_too(
    place, tmp_path_factory
):
    trust, strange = opened(place), tmp_path_factory.mktemp("strange")
    before = shown(trust)
    folder.init(strange, "tls", datetime.now(UTC))
    for path in folder.join(strange, A, "localhost:8100", datetime.now(UTC)):
        (place / path.relative_to(strange)).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="verify failed"):
        trust.renew(OWN | {"trust.ca_file"})
    assert shown(trust) == before


def test_an_authority_or_a_shared_key_is_not_changed_under_a_running_node(place):
    assert opened(place).renew({"trust.ca_file"}) == frozenset()
    key = KeyTrust(bytes(32), A, [A], 64, lambda: 1)
    assert key.renew({"trust.key_file"}) == frozenset()
