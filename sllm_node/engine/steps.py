"""The step thread of a device: forward passes and everything else that must not run beside one."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sllm_node.core.clock import Clock

ResultT = TypeVar("ResultT")


class StepThread:
    """Runs jobs one after another; each engine has one job at a time, so they take turns."""

    def __init__(self, clock: Clock, torch_threads: int) -> None:
        self._clock = clock
        self._thread = ThreadPoolExecutor(
            1, "sllm-step", initializer=_set_threads, initargs=(torch_threads,)
        )
        self._began: float | None = None

    async def run(self, job: Callable[..., ResultT], *values: Any) -> ResultT:
        """Run `job` and return its result. A caller that is cancelled leaves the job running."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._timed, job, values)

    def _timed(self, job: Callable[..., ResultT], values: tuple[Any, ...]) -> ResultT:
        self._began = self._clock.now()
        try:
            return job(*values)
        finally:
            self._began = None

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
