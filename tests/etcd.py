"""A real etcd server for tests: one process on loopback, started, killed, stopped and started again."""

import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

FETCHED = Path(__file__).parent.parent / ".etcd" / "usr" / "bin" / "etcd"
BINARY = shutil.which("etcd") or (str(FETCHED) if FETCHED.exists() else None)
needs_etcd = pytest.mark.skipif(BINARY is None, reason="no etcd server here: run scripts/etcd")
START_S = 60.0


class Etcd:
    """One member; `arguments` go to the server as they are."""

    def __init__(self, folder, *arguments, scheme="http", name="one"):
        self.folder = Path(folder)
        self.name = name
        self.client_url = f"{scheme}://127.0.0.1:{free_port()}"
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self.members = f"{name}={self.peer_url}"
        self.arguments = arguments
        self.process: Any = None

    def begin(self):
        """Start the process without waiting for it: a member waits for the others."""
        command = [
            BINARY, "--name", self.name, "--data-dir", str(self.folder), "--logger", "zap",
            "--log-outputs", "stderr",
            "--listen-client-urls", self.client_url, "--advertise-client-urls", self.client_url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", self.members, *self.arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._serves = threading.Event()
        self._log = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def wait(self):
        assert self._serves.wait(START_S), "etcd does not start:\n" + "".join(self._log[-20:])
        assert self.process.poll() is None, "etcd has ended:\n" + "".join(self._log[-20:])

    def start(self):
        self.begin()
        self.wait()
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def forget(self):
        """Remove all it has stored; it has been killed."""
        shutil.rmtree(self.folder)

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _read_log(self):
        for line in self.process.stderr:
            self._log.append(line)
            if "ready to serve client requests" in line or "client traffic" in line:
                self._serves.set()
        self._serves.set()


def make_members(folder, count):
    """Return the members of one cluster, not started."""
    members = [Etcd(Path(folder) / str(i), name=f"m{i}") for i in range(count)]
    everybody = ",".join(f"{member.name}={member.peer_url}" for member in members)
    for member in members:
        member.members = everybody
    return members
