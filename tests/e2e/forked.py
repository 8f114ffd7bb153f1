"""Nodes started by a fork of a server that has imported everything, and changed before they begin.

A node needs seconds of a processor to import what it is made of, and tests and benchmarks start dozens. They
change what they have to control, which is how fast it goes: see `tests.e2e.braked`, `scripts.bench.braked`.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
Change = Callable[[Path], None]
"""What is done in the node's process first, given the folder of its configuration; it is pickled."""

_PR_SET_PDEATHSIG: Final = 1
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["__main__", "tests.e2e.preloaded"])


class Forked:
    """A node's process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, config: Path, log: Path, environment: Mapping[str, str], change: Change
    ) -> None:
        given = (config, log, dict(environment), change)
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


def _run(config: Path, log: Path, environment: dict[str, str], change: Change) -> None:
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

        change(config.parent)
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
