import pytest

from sllm_node.core.hosts import address_problem, is_loopback, listen_problem


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback_is_recognised(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("address", ["10.0.0.1:1", "[fd00::1]:8100", "box.example:65535"])
def test_an_address_has_a_host_and_a_port(address):
    assert address_problem(address) is listen_problem(address) is None


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("box", "must be host:port"),
        ("fd00::1:8100", "must be host:port"),
        ("box:0", "port must be from 1 to 65535"),
        ("box:65536", "port must be from 1 to 65535"),
        ("[box]:1", "must be host:port"),
        ("[1:2]:1", "is no IPv6 address"),
    ],
)
def test_what_is_no_address_is_told(address, problem):
    assert problem in str(listen_problem(address))
    assert problem in str(address_problem(address))


@pytest.mark.parametrize("address", ["0.0.0.0:8100", "[::]:8100"])
def test_nobody_can_be_called_at_all_interfaces(address):
    assert listen_problem(address) is None
    assert "can't call" in str(address_problem(address))
