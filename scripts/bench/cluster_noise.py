"""What the machine adds to times of a run of nodes: how long their event loops waited for a processor.

The kernel counts for each thread how long it could run and did not (`/proc/PID/schedstat`). Where nodes,
their steps and clients share few cores, that is most of what a startup of some milliseconds varies by;
it is no node's to know, and would not be there on a machine for each node. A thread of the benchmark
reads the counts of the nodes' event loops every few milliseconds. Between two reads a wait is taken to
have passed evenly; so what it says of one session is rough, and of hundreds it is not.
"""

import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

EVERY_S: Final = 0.004


def waited_s(schedstat: str) -> float:
    """Return how long a thread has waited for a processor, as the kernel tells it."""
    return int(schedstat.split()[1]) / 1e9


class RunDelays:
    """By node: when it was looked at (wall clock), and how long its event loop had waited by then."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = defaultdict(list)
        self._waits: dict[str, list[float]] = defaultdict(list)
        self._nodes: Mapping[str, int] = {}
        self._lives: dict[str, tuple[int, float, float]] = {}
        """Process, what it had waited, and what the node's lives before it had, in all."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run delays", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def watch(self, nodes: Mapping[str, int]) -> None:
        """Look at these processes, by node, from now on; what is in the mapping may change."""
        self._nodes = nodes

    def take(self, node: str, process: int, wait_s: float, at: float) -> None:
        """Take that the event loop of a node's process had waited so long at a time."""
        known, last_s, before_s = self._lives.get(node, (process, wait_s, 0.0))
        if known != process:
            before_s += last_s
        self._lives[node] = process, wait_s, before_s
        self._times[node].append(at)
        self._waits[node].append(before_s + wait_s)

    def between(self, node: str, begin: float, end: float) -> float:
        """Return how long the event loop of `node` waited between two times."""
        return max(0.0, self._at(node, end) - self._at(node, begin))

    def _at(self, node: str, time_s: float) -> float:
        times, waits = self._times[node], self._waits[node]
        if not times:
            return 0.0
        before = max(0, bisect_right(times, time_s) - 1)
        after = min(len(times) - 1, bisect_left(times, time_s))
        if times[after] <= times[before]:
            return waits[before]
        share = (time_s - times[before]) / (times[after] - times[before])
        return waits[before] + min(1.0, max(0.0, share)) * (waits[after] - waits[before])

    def _run(self) -> None:
        while not self._is_over.wait(EVERY_S):
            for node, process in list(self._nodes.items()):
                try:
                    told = Path(f"/proc/{process}/task/{process}/schedstat").read_text()
                except OSError:  # it has ended
                    continue
                self.take(node, process, waited_s(told), time.time())
