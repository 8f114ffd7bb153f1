"""Nodes for tests: started by a fork of a server that has imported everything, and with a brake.

A node needs seconds of a processor to import what it is made of, and tests start dozens.

The tiny models generate all their tokens within moments, or don't, as the machine likes; a test that
does something to a running session must not depend on that. While the file `brake` lies beside the
node's configuration, each decode step takes `STEP_S`, and where a session has `SLOW_FROM` tokens
`LATE_S`: whatever a test does in between, however slow the machine, the session is not over before.
Prompts and what a move computes ahead are not held, and every step ends: moves make progress.

While the file `hold` lies there, the node sends of each file that peers ask for only what comes first.
"""

import asyncio
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
BRAKE: Final = "brake"
HOLD: Final = "hold"
STEP_S: Final = 0.02
SLOW_FROM: Final = 150
LATE_S: Final = 1.0
LOOK_S: Final = 0.01
"""How long it takes until a step sees that the brake is off."""

_PR_SET_PDEATHSIG: Final = 1
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["__main__", "tests.e2e.preloaded"])


class Forked:
    """A node's process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, config: Path, log: Path, environment: Mapping[str, str]) -> None:
        given = (config, log, dict(environment))
        self._process = _forks.Process(target=_run, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("node", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(config: Path, log: Path, environment: dict[str, str]) -> None:
    """Be the node, in the process that was forked for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the server ends with the tests
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["sllm-node", "serve", "--config", str(config)]
    measured = _measured()
    try:
        from sllm_node.cli.main import main

        _install(config.parent / BRAKE)
        _install_hold(config.parent / HOLD)
        main()
    finally:
        if measured is not None:
            measured.stop()
            measured.save()


def _measured() -> Any:
    """Let coverage see this process, where it sees the tests; None: it doesn't."""
    if "COVERAGE_PROCESS_CONFIG" not in os.environ:
        return None
    import coverage

    inherited = coverage.Coverage.current()  # of the server: what that imported is its to tell
    if inherited is not None:
        inherited.stop()
    return coverage.process_startup(force=True)


def _install(brake: Path) -> None:
    """Let steps that draw tokens of sessions under way take their time."""
    from sllm_node.engine.runner import Runner, StepPart
    from sllm_node.engine.sampling import Drawn

    advance = Runner.advance
    never = threading.Event()

    def braked(self: Runner, steps: Sequence[Sequence[StepPart]]) -> list[Drawn | None]:
        drawn = [part.draw.index for step in steps for part in step if part.draw is not None]
        last = max(drawn, default=0)  # of a first token it is 0
        until = monotonic() + (LATE_S if last >= SLOW_FROM else STEP_S)
        while last and (left := until - monotonic()) > 0 and brake.exists():
            never.wait(min(left, LOOK_S))
        return advance(self, steps)

    Runner.advance = braked  # type: ignore[method-assign]


def _install_hold(hold: Path) -> None:
    """Let ranges of files behind the first wait."""
    from sllm_node.cluster.file_messages import AskFile
    from sllm_node.cluster.giving import Giving
    from sllm_node.cluster.transport import Reply

    send = Giving._send

    async def held(self: Giving, ask: AskFile, path: Path, reply: Reply) -> None:
        while ask.first and hold.exists():
            await asyncio.sleep(LOOK_S)
        await send(self, ask, path, reply)

    Giving._send = held  # type: ignore[method-assign]
