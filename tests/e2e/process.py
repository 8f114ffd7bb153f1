"""A real node as a child process, ready when it says so, its log kept for the failure report."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.e2e.braked import BRAKE, HOLD, put_brakes_on
from tests.e2e.forked import ROOT, Change, Forked

START_LIMIT_S = 300.0
STOP_LIMIT_S = 120.0

CONFIG = """
[node]
id = "{id}"
drain_s = {drain_s}
[store]
path = {store!r}
pool_bytes = {pool_bytes}
chunk_bytes = {chunk_bytes}
[device]
names = ["{device}"]
memory_bytes = {memory_bytes}
[engine]
kv_cache_bytes = {kv_cache_bytes}
torch_threads = 1
[schedule]
max_wait_s = 0.2
[server]
port = 0
progress_interval_s = 0.05
[log]
level = "debug"
format = "json"
"""
DEFAULTS = {
    "id": "test", "drain_s": 20.0, "pool_bytes": 4 << 20, "memory_bytes": 64 << 20,
    "kv_cache_bytes": 4 << 20, "device": "cpu", "chunk_bytes": 64 << 10,
}  # fmt: skip


class NodeProcess:
    """`with NodeProcess(folder, store, extra="…", memory_bytes=…) as node: node.url`.

    One that is `braked` can be made to decode slowly, and starts faster: by a fork.
    """

    _is_braked = False  # also of one with a constructor of its own

    def __init__(
        self, folder: Path, store: Path, extra: str = "", *, braked: bool = False, **settings
    ):
        self.folder = folder
        self._is_braked = braked
        self._brake = folder / BRAKE
        self._hold = folder / HOLD
        self.config = folder / "node.toml"
        self.log = folder / "node.log"
        self.root = ROOT
        """The source tree that it runs."""
        self.config.write_text(CONFIG.format(store=str(store), **{**DEFAULTS, **settings}) + extra)
        self.messages: list[str] = []
        self.environment: dict[str, str] = {}
        """Besides this process's own."""
        self.process: Forked | subprocess.Popen[bytes]
        self._marked = 0

    def brake(self) -> None:
        """From now on sessions decode so slowly that none ends before `release`."""
        assert self._is_braked, "this node was started without a brake"
        self._brake.touch()

    def hold(self) -> None:
        """From now on send peers only the beginning of each file, until `release`."""
        assert self._is_braked, "this node was started without a brake"
        self._hold.touch()

    def release(self) -> None:
        """Let sessions decode, and files go, as fast as they can."""
        self._brake.unlink(missing_ok=True)
        self._hold.unlink(missing_ok=True)

    def mark(self) -> None:
        """Let `events` leave out what has been logged so far."""
        self._marked = self.log.stat().st_size

    def events(self, event: str) -> list[dict]:
        """Return the log lines with this event, since the start or the last mark."""
        with self.log.open("rb") as log:
            log.seek(self._marked)
            lines = [line for line in log if event.encode() in line]
        found = [json.loads(line) for line in lines if line[:1] == b"{" and line[-1:] == b"\n"]
        return [line for line in found if line["event"] == event]

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"\0sllm-e2e-{os.getpid()}-{id(self)}"
        self._socket.bind(address)
        self._marked = 0
        own = {
            "NOTIFY_SOCKET": "@" + address[1:], "HF_HUB_OFFLINE": "1", **self.environment,
        }  # fmt: skip
        self.process = self._forked(own) if self._is_braked else self._begun(own)
        try:
            self.url = self._wait_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._socket.close()
            raise
        return self

    def _forked(self, own: dict[str, str]) -> Forked:
        return Forked(self.config, self.log, own, self._change())

    def _change(self) -> Change:
        """Return what puts the brakes on."""
        return put_brakes_on

    def _begun(self, own: dict[str, str]) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "sllm_node", "serve", "--config", str(self.config)]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **own}, cwd=self.root
            )

    def start_again(self) -> None:
        """Start anew what was killed or has ended."""
        self.__exit__(None, None, None)
        self.__enter__()

    def _wait_ready(self) -> str:
        ended = os.pidfd_open(self.process.pid)
        try:
            while True:
                readable, _, _ = select.select(
                    [self._socket.fileno(), ended], [], [], START_LIMIT_S
                )
                assert self._socket.fileno() in readable, f"the node did not start:\n{self.tail()}"
                self.messages.append(self._socket.recv(4096).decode())
                if "READY=1" in self.messages[-1]:
                    found = re.search(r"http://[^\s,]+", self.messages[-1])
                    assert found is not None
                    return found[0]
        finally:
            os.close(ended)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def wait_for(self, text: str) -> None:
        """Wait until the service manager is told this."""
        self._socket.settimeout(STOP_LIMIT_S)
        while not any(text in message for message in self.messages):
            self.messages.append(self._socket.recv(4096).decode())

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(timeout=STOP_LIMIT_S)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.process.poll() is None:
            self.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if kind is None:
                raise AssertionError(f"the node did not stop:\n{self.tail()}") from None
        finally:
            self._socket.close()
        if kind is not None:
            sys.stdout.write(f"--- node log\n{self.tail(80)}\n")
