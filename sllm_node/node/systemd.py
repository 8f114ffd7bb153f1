"""Tell systemd how the node is: READY, STATUS, STOPPING, WATCHDOG.

The protocol is one datagram of KEY=value lines to the socket named by NOTIFY_SOCKET (sd_notify(3)).
Without that variable every call does nothing, so the node runs the same under a shell.
"""

import os
import socket
from collections.abc import Mapping


class Notifier:
    """A sender to the service manager, made from the environment it gave us."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        usec = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() and mine else None
        """Seconds between two signs of life that the manager insists on; None: it does not."""

    def ready(self, status: str) -> None:
        """The node serves."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={status}")

    def watchdog(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def stopping(self, status: str, limit_s: float) -> None:
        """The node drains and needs `limit_s` seconds at most."""
        self._send(f"STOPPING=1\nSTATUS={status}\nEXTEND_TIMEOUT_USEC={int(limit_s * 1e6)}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as out:
            try:
                out.connect(address)
                out.send(message.encode())
            except OSError:
                return  # a manager that went away, or reads too slowly, must not hold up the service
