"""Nodes forked from one process that has imported everything, slowed down, with brakes.

    python -m scripts.bench.forked

reads a line of JSON for each node to start (config, log, notify, step_s) and answers with its process id; at
the end of its input it kills them. A node so made is the product but for two things: a step takes `step_s`
longer, so that tiny models decode as slowly as large ones; and it stops at a brake when its folder has the
file `brake-NAME`: it makes the file `at-NAME` and waits until the first is gone. Brakes: `loading` (memory
taken, the lease there), `resuming` (a step of a session that holds), `last` (the last round has come and is
not taken), `going` (the step of the first token after it). So whoever benches knows where a node stands.
"""

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, Self

from typing_extensions import override

from tests.e2e.braked import ROOT
from tests.e2e.process import START_LIMIT_S, NodeProcess

LOOK_S: Final = 0.003


class Brakes:
    """Of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: set[str] = set()
        """What the steps that are planned do for sessions that move here."""

    def _arrived(self, name: str) -> bool:
        if not (self.folder / f"brake-{name}").exists():
            return False
        (self.folder / f"at-{name}").touch()
        return True

    def wait(self, name: str) -> None:
        """Stop a thread at a brake."""
        while self._arrived(name):
            time.sleep(LOOK_S)

    async def wait_async(self, name: str) -> None:
        """Stop a task at a brake."""
        while self._arrived(name):  # noqa: ASYNC110 - a file tells of no event
            await asyncio.sleep(LOOK_S)


def put_brakes_on(folder: Path, step_s: float) -> None:
    """Change this process: it becomes a node that can be stopped at will."""
    from sllm_node.cluster.serving import Serving
    from sllm_node.cluster.wire import unpack_extend
    from sllm_node.engine.batch import Batch
    from sllm_node.engine.runner import Runner
    from sllm_node.store.store import Store

    brakes = Brakes(folder)
    acquire, extend, plan, advance = Store.acquire, Serving.extend, Batch.plan, Runner.advance

    async def slow_acquire(self: Any, *arguments: Any, **options: Any) -> Any:
        lease = await acquire(self, *arguments, **options)
        try:
            await brakes.wait_async("loading")
        except asyncio.CancelledError:  # nobody else has the lease yet
            lease.release()
            raise
        return lease

    async def slow_extend(self: Any, sender: Any, payload: bytes, reply: Any) -> None:
        if unpack_extend(payload).lets_go:
            await brakes.wait_async("last")
        await extend(self, sender, payload, reply)

    def watched_plan(self: Any, *arguments: Any) -> Any:
        parts = plan(self, *arguments)
        moved = (part.session for part in parts if part.session.request.held)
        brakes.kinds |= {"resuming" if session.is_holding else "going" for session in moved}
        return parts

    def slow_advance(self: Any, steps: Any, *arguments: Any) -> Any:
        if steps:
            time.sleep(step_s)
        for kind in list(brakes.kinds):
            brakes.kinds.discard(kind)
            brakes.wait(kind)
        return advance(self, steps, *arguments)

    changes = {
        (Store, "acquire"): slow_acquire, (Serving, "extend"): slow_extend,
        (Batch, "plan"): watched_plan, (Runner, "advance"): slow_advance,
    }  # fmt: skip
    for (kind, name), change in changes.items():
        setattr(kind, name, change)


def become_node(asked: dict[str, Any]) -> None:
    """Be the node, until it ends."""
    from sllm_node.cli.main import app

    with Path(asked["log"]).open("wb") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["NOTIFY_SOCKET"] = asked["notify"]
    config = Path(asked["config"])
    put_brakes_on(config.parent, asked["step_s"])
    app(["serve", "--config", str(config)])


def main() -> None:
    """Start nodes until the input ends."""
    import transformers  # noqa: F401 - what takes long is done once, before any thread is there

    import sllm_node.cli.main
    import sllm_node.engine.engines
    import sllm_node.node.node  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    children = []
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                become_node(json.loads(line))
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
        print(child, flush=True)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Child:
    """A process that somebody else has started, as `Popen` shows one of ours."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file = os.pidfd_open(pid)
        self._is_over = False

    def poll(self) -> int | None:
        """Return 0 when it is over; how it ended only its log tells."""
        return self.wait(0) if self._is_over or self._ends_within(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        if not self._is_over:
            if not self._ends_within(timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._is_over = True
            os.close(self._file)
        return 0

    def _ends_within(self, timeout: float | None) -> bool:
        return bool(select.select([self._file], [], [], timeout)[0])

    def send_signal(self, number: int) -> None:
        """Send a signal to this very process, whoever has its number now."""
        if not self._is_over:
            signal.pidfd_send_signal(self._file, number)

    def kill(self) -> None:
        """End it with -9."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks; `with Nursery() as nursery`."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "scripts.bench.forked"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )  # fmt: skip
        self._turn = threading.Lock()
        assert self._read() == "ready"
        return self

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, **asked: Any) -> Child:
        """Fork a node."""
        assert self._process.stdin is not None
        with self._turn:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return Child(int(self._read()))

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class ForkedNode(NodeProcess):
    """A node of a nursery; each life has a log of its own, and `logs` are all of them."""

    nursery: Nursery
    step_s = 0.02
    lives = 0

    @override
    def __enter__(self) -> Self:
        self.lives += 1
        self.log = self.folder / f"node-{self.lives}.log"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"\0sllm-forked-{os.getpid()}-{id(self)}-{self.lives}"
        self._socket.bind(address)
        self.process = self.nursery.start(  # type: ignore[assignment]
            config=str(self.config), log=str(self.log), notify="@" + address[1:], step_s=self.step_s
        )
        try:
            self.url = self._wait_up()
        except BaseException:
            self.process.kill()
            raise
        return self

    def _wait_up(self) -> str:
        self._socket.settimeout(START_LIMIT_S)
        while True:
            self.messages.append(self._socket.recv(4096).decode())
            if "READY=1" in self.messages[-1]:
                found = re.search(r"http://[^\s,]+", self.messages[-1])
                assert found is not None
                return found[0]

    @property
    def logs(self) -> list[Path]:
        """The logs of all lives."""
        return [self.folder / f"node-{life}.log" for life in range(1, self.lives + 1)]

    def stop_at(self, *names: str) -> None:
        """Have it stop at these brakes and at no others."""
        for file in [*self.folder.glob("brake-*"), *self.folder.glob("at-*")]:
            file.unlink(missing_ok=True)
        for name in names:
            (self.folder / f"brake-{name}").touch()

    def stands_at(self, name: str) -> bool:
        """Tell whether it has come to a brake."""
        return (self.folder / f"at-{name}").exists()


if __name__ == "__main__":
    main()
