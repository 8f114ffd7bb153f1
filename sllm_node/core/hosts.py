"""Which hosts are this machine, and which addresses peers can call."""

import re
from ipaddress import ip_address
from typing import Final

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen_problem(address: str) -> str | None:
    """Return why a node can't listen for peers at `address`, if so."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return 'must be host:port, as in "10.0.0.1:8100" or "[fd00::1]:8100"'
    if not 1 <= int(match[2]) <= 65535:
        return "the port must be from 1 to 65535"
    try:
        ip_address(match[1].strip("[]"))
    except ValueError:
        return "is no IPv6 address" if match[1].startswith("[") else None
    return None


def address_problem(address: str) -> str | None:
    """Return why peers can't call a node at `address`, if so."""
    if (problem := listen_problem(address)) is not None:
        return problem
    try:
        host = ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None
    return "peers can't call that; name the node's own address" if host.is_unspecified else None
