"""CUDA graphs of steps: what was launched once, launched again by one call.

The one place of the engine that touches torch.cuda. What is captured must read and write the same
addresses every time, launch to torch's current stream and wait for nothing.
"""

from collections.abc import Callable
from typing import Any

import torch


class CudaGraphs:
    """Captures functions; all graphs share one pool of memory, as they never run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return a function that does what `compute` did, which has run once before.

        What it returns is the same memory every time.
        """
        make: Any = torch.cuda.CUDAGraph
        graph = make()
        # Other threads may take memory meanwhile: those of loads, and of steps that wait for theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = compute()
        if self._pool is None:
            self._pool = graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return made

        return replay
