"""The step thread of a device: forward passes and everything else that must not run beside one.

Building a module changes state of the whole process (torch's default dtype and random numbers), so
such a job runs alone, whichever device's thread it is on: steps share the gate, it does not.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import Condition
from typing import Any, TypeVar

from sllm_node.core.clock import Clock

ResultT = TypeVar("ResultT")
_Enter = Callable[[], AbstractContextManager[None]]


class Gate:
    """Lets many jobs through that may run beside each other, or one that may not."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._sharing = 0
        self._alone = 0
        """Jobs that run or wait to run alone; new sharers wait for them."""
        self._is_taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Let others run alone meanwhile; for one that shares, and waits for something else."""
        with self._changed:
            self._sharing -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self._alone)
                self._sharing += 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run beside nobody."""
        with self._changed:
            self._alone += 1
            self._changed.wait_for(lambda: not (self._sharing or self._is_taken))
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._alone -= 1
                self._is_taken = False
                self._changed.notify_all()


class StepThread:
    """Runs jobs one after another; each engine has one job at a time, so they take turns."""

    def __init__(self, clock: Clock, gate: Gate, torch_threads: int) -> None:
        self._clock = clock
        self._gate = gate
        self._thread = ThreadPoolExecutor(
            1, "sllm-step", initializer=_set_threads, initargs=(torch_threads,)
        )
        self._began: float | None = None

    async def run(self, job: Callable[..., ResultT], *values: Any) -> ResultT:
        """Run `job` and return its result. A caller that is cancelled leaves the job running."""
        return await self._submit(self._gate.shared, job, values)

    async def run_alone(self, job: Callable[..., ResultT], *values: Any) -> ResultT:
        """Run `job` beside no other job of any step thread."""
        return await self._submit(self._gate.alone, job, values)

    async def _submit(
        self, enter: _Enter, job: Callable[..., ResultT], values: tuple[Any, ...]
    ) -> ResultT:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._timed, enter, job, values)

    def _timed(
        self, enter: _Enter, job: Callable[..., ResultT], values: tuple[Any, ...]
    ) -> ResultT:
        with enter():
            self._began = self._clock.now()
            try:
                return job(*values)
            finally:
                self._began = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for something inside of a job that `run` runs: it counts as none meanwhile."""
        self._began = None
        try:
            with self._gate.left():
                yield
        finally:
            self._began = self._clock.now()

    def busy_s(self) -> float:
        """Return for how long the job under way has been running; 0 if none is."""
        began = self._began
        return 0.0 if began is None else self._clock.now() - began

    def close(self) -> None:
        """Wait for the job under way and stop."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _set_threads(count: int) -> None:
    import torch

    if count:
        torch.set_num_threads(count)
