"""CUDA graphs of steps: what was launched once, launched again by one call.

The one place of the engine that touches torch.cuda. What is captured must read and write the same
addresses every time, launch to torch's current stream and wait for nothing.

A capture computes nothing, so it waits for nothing but the step before it on the same stream; what
other threads launch meanwhile, on this device or another, is not in the graph. Torch allows one capture
at a time in a process.
"""

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any, Final, TypeVar

import torch

from sllm_node.core.errors import KernelError

T = TypeVar("T")
_ONE_AT_A_TIME: Final = Lock()
_POOLS_MAX: Final = 3
"""Pools of a device that captures may spoil; then there are no more captures."""


class CudaGraphs:
    """Captures functions on one device; all graphs share one pool of memory, as they never run at once."""

    def __init__(self, device: torch.device) -> None:
        """`device`: one with a number."""
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        self._anchors: list[Any] = []
        """A graph of each pool that is never let go: a pool dies with the last of its graphs."""

    def capture(self, compute: Callable[[], T]) -> Callable[[], T]:
        """Return a function that does what `compute` did, which has run once before.

        What it returns is the same memory every time.
        """
        with _ONE_AT_A_TIME, torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()
            try:
                self._open()
                graph, made = self._captured(compute)
            except torch.OutOfMemoryError:  # what plain steps have left in torch's hands may do
                torch.cuda.empty_cache()
                self._open()
                graph, made = self._captured(compute)

        def replay() -> T:
            graph.replay()
            return made

        return replay

    def _open(self) -> None:
        """Have a stream and a pool to capture on.

        Raises:
            KernelError: too many pools were spoiled.
        """
        if self._pool is not None:
            return
        if len(self._anchors) >= _POOLS_MAX:
            raise KernelError("CUDA graphs", f"no more of them: captures failed on {self._device}")
        stream: Any = torch.cuda.Stream
        self._stream = stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        try:
            self._anchors.append(self._captured(lambda: torch.zeros(1, device=self._device)))
        except BaseException:
            self._pool = None
            raise

    def _captured(self, compute: Callable[[], T]) -> tuple[Any, T]:
        make: Any = torch.cuda.CUDAGraph
        graph = make()
        with torch.cuda.stream(self._stream):
            # Other threads may take memory meanwhile: those of loads, and of steps that wait for theirs.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = compute()
            except BaseException:
                self._abandon(graph)
                raise
            try:
                graph.capture_end()
            except BaseException:
                self._spoil()
                raise
        return graph, made

    def _abandon(self, graph: Any) -> None:
        """End a capture whose function has failed."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._spoil()

    def _spoil(self) -> None:
        """Give up a pool and a stream on which a capture could not be ended.

        Torch's allocator still takes the stream's memory from the pool, and gives no events' memory back
        while it does: it is told to stop.
        """
        pool, self._pool, self._stream = self._pool, None, None
        stop: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)  # noqa: SLF001 - no public way
        with suppress(RuntimeError, TypeError):
            if stop is not None:
                stop(self._device.index, pool)
