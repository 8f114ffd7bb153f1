"""TCP ports of loopback for servers that a test starts later."""

import itertools
import os
import socket

_FIRST, _COUNT = 10_000, 20_000  # below those that the kernel gives to clients, in the meantime too
_offsets = itertools.count(os.getpid() * 4099 % _COUNT)


def free_port() -> int:
    """Return a port that nobody listens at, never the same one twice."""
    while True:
        port = _FIRST + next(_offsets) % _COUNT
        with socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
