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
        self.is_taken = False
        """A job runs alone."""
        self.freed_at = float("-inf")
        """When one last ended that ran alone, by the clock of its thread."""

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
            self._changed.wait_for(lambda: not (self._sharing or self.is_taken))
            self.is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._alone -= 1
                self.is_taken = False
                self._changed.notify_all()


class StepThread:
    """Runs jobs one after another; whose step is next is decided before it comes here: `turns`."""

    def __init__(self, clock: Clock, gate: Gate, torch_threads: int) -> None:
        self._clock = clock
        self._gate = gate
        self._thread = ThreadPoolExecutor(
            1, "sllm-step", initializer=_set_threads, initargs=(torch_threads,)
        )
        self._began: float | None = None
        self._is_paused = False
        self._resumed_at = float("-inf")
        """When a job here last went on after a pause."""

    async def run(self, job: Callable[..., ResultT], *values: Any) -> ResultT:
        """Run `job` and return its result. A caller that is cancelled leaves the job running."""
        return await self._submit(self._gate.shared, job, values)

    async def run_alone(self, job: Callable[..., ResultT], *values: Any) -> ResultT:
        """Run `job` beside no other job of any step thread."""
        return await self._submit(self._gate.alone, job, values)

    def submit(self, job: Callable[..., ResultT], *values: Any) -> asyncio.Future[ResultT]:
        """Put `job` behind what was submitted before; now, and not when the result is awaited."""
        return self._submit(self._gate.shared, job, values)

    def _submit(
        self, enter: _Enter, job: Callable[..., ResultT], values: tuple[Any, ...]
    ) -> asyncio.Future[ResultT]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self._timed, enter, job, values)

    def _timed(
        self, enter: _Enter, job: Callable[..., ResultT], values: tuple[Any, ...]
    ) -> ResultT:
        with enter():
            is_alone = self._gate.is_taken
            self._began = None if is_alone else self._clock.now()
            try:
                return job(*values)
            finally:
                self._began = None
                if is_alone:
                    self._gate.freed_at = self._clock.now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for something inside of a job that `run` runs: it counts as none meanwhile."""
        self._began, self._is_paused = None, True
        try:
            with self._gate.left():
                yield
        finally:
            self._began = self._resumed_at = self._clock.now()
            self._is_paused = False

    def busy_s(self) -> float:
        """Return for how long the job under way has been running; 0 if none is, or it runs alone."""
        began = self._began
        return 0.0 if began is None else self._clock.now() - began

    def free_since(self) -> float:
        """Return since when nothing has kept a job here from running; now, if something does.

        That is a job that runs alone, on any step thread, and what a job here waits for, `paused`.
        """
        if self._gate.is_taken or self._is_paused:
            return self._clock.now()
        return max(self._gate.freed_at, self._resumed_at)

    def close(self) -> None:
        """Wait for the job under way and stop."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _set_threads(count: int) -> None:
    import torch

    if count:
        torch.set_num_threads(count)
