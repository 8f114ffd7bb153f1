import ssl
from datetime import UTC, datetime, timedelta

import pytest

from sllm_node.cluster.certificates import (
    _PURPOSES,
    NODE_DAYS,
    Holder,
    Issued,
    check_authority,
    check_node,
    issue,
    make_authority,
)
from sllm_node.core.types import NodeId

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A = Holder(NodeId("a"), "10.0.0.1")
B = Holder(NodeId("b"), "b.example")


@pytest.fixture(scope="module")
def authority():
    return make_authority("test", NOW)


@pytest.mark.parametrize("holder", [A, B])
def test_what_was_issued_is_in_order(authority, holder):
    found = check_node(authority.certificate, issue(authority, holder, NOW), holder, NOW)
    assert (found.problems, found.remarks) == ((), ())


def told(authority, issued, holder, now=NOW):
    return "\n".join(check_node(authority.certificate, issued, holder, now).problems)


def test_another_nodes_certificate_is_told(authority):
    problems = told(authority, issue(authority, A, NOW), B)
    assert "not the certificate of node 'b'" in problems
    assert "'b.example'" in problems


def test_a_certificate_of_another_authority_is_told(authority):
    other = make_authority("test", NOW)
    assert "not issued by trust.ca_file" in told(authority, issue(other, A, NOW), A)


def test_another_key_is_told(authority):
    issued, other = issue(authority, A, NOW), issue(authority, A, NOW)
    mixed = Issued(issued.certificate, other.key)
    assert "not the key of this certificate" in told(authority, mixed, A)
    assert "no private key" in told(authority, Issued(issued.certificate, b"x"), A)


def test_what_it_may_not_be_used_for_is_told(authority, monkeypatch):
    for purpose, words in _PURPOSES.items():
        others = {one: "" for one in _PURPOSES if one != purpose}
        with monkeypatch.context() as patched:
            patched.setattr("sllm_node.cluster.certificates._PURPOSES", others)
            issued = issue(authority, A, NOW)
        found = check_node(authority.certificate, issued, A, NOW)
        assert found.problems == (f"its extended key usage does not let the node {words}",)
        assert found.well == ()


def test_dates_are_told(authority):
    issued = issue(authority, A, NOW)
    assert "not valid before" in told(authority, issued, A, NOW - timedelta(days=1))
    assert "ended on" in told(authority, issued, A, NOW + timedelta(days=NODE_DAYS + 1))
    soon = check_node(authority.certificate, issued, A, NOW + timedelta(days=NODE_DAYS - 3))
    assert soon.problems == ()
    assert "in 3 days" in soon.remarks[0]


def test_a_certificate_does_not_outlive_its_authority():
    short = make_authority("test", NOW, days=10)
    assert "in 10 days" in check_node(short.certificate, issue(short, A, NOW), A, NOW).remarks[0]


def test_files_that_are_no_certificates_are_told(authority):
    issued = issue(authority, A, NOW)
    assert check_authority(authority.certificate, NOW).problems == ()
    assert check_authority(b"x", NOW).problems == ("is no certificate in PEM",)
    assert check_authority(issued.certificate, NOW).problems == (
        "is the certificate of no authority",
    )
    assert "no certificate" in told(authority, Issued(b"x", issued.key), A)


def test_an_authority_of_another_kind_is_refused(authority):
    with pytest.raises(ValueError, match="PEM"):
        issue(Issued(b"x", authority.key), A, NOW)


def context(purpose, authority, issued, tmp_path):
    made = ssl.SSLContext(purpose)
    made.load_verify_locations(cadata=authority.certificate.decode())
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    file = tmp_path / "both.pem"
    file.write_bytes(issued.certificate + issued.key)
    made.load_cert_chain(file)
    return made


def shake_hands(client_context, server_context, host):
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(pipes[0], pipes[1], server_hostname=host)
    server = server_context.wrap_bio(pipes[1], pipes[0], server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return server.getpeercert()


def test_two_nodes_know_each_other_over_tls(tmp_path):
    now = datetime.now(UTC)  # TLS looks at the wall clock itself
    authority = make_authority("test", now)
    client = context(ssl.PROTOCOL_TLS_CLIENT, authority, issue(authority, B, now), tmp_path)
    server = context(ssl.PROTOCOL_TLS_SERVER, authority, issue(authority, A, now), tmp_path)
    assert ("URI", "urn:sllm-node:b") in shake_hands(client, server, "10.0.0.1")["subjectAltName"]
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(client, server, "10.0.0.2")


def test_a_node_of_another_cluster_is_refused_over_tls(tmp_path):
    now = datetime.now(UTC)
    ours, theirs = make_authority("test", now), make_authority("test", now)
    client = context(ssl.PROTOCOL_TLS_CLIENT, ours, issue(theirs, B, now), tmp_path)
    server = context(ssl.PROTOCOL_TLS_SERVER, ours, issue(ours, A, now), tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server, "10.0.0.1")
