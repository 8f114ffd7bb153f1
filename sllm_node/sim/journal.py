"""What happened in a simulation: a digest over every event, and the counts that reports are made of."""

import hashlib
from collections import Counter
from typing import Final, TextIO

from sllm_node.sim.hardware import Session

_BATCH: Final = 4096


class Journal:
    """Takes events in order; two runs are the same if their digests are."""

    def __init__(self, copy: TextIO | None = None) -> None:
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self._copy = copy
        self.counts: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        """By the tier that they came from."""
        self.bytes_moved: Counter[str] = Counter()
        self.load_s: float = 0.0
        self.errors_s: list[float] = []
        """Of loads: what it lasted less what was expected, in seconds."""
        self.pauses_s: list[float] = []
        """Of sessions that moved or were stopped: how long no token came."""
        self.over: list[Session] = []

    def note(self, now: float, kind: str, *what: object) -> None:
        """Take one event."""
        self.counts[kind] += 1
        self._lines.append(f"{now:.6f} {kind} {' '.join(map(str, what))}\n")
        if len(self._lines) >= _BATCH:
            self._flush()

    def digest(self) -> str:
        """Return the SHA-256 of all events so far."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        text = "".join(self._lines)
        self._hash.update(text.encode())
        if self._copy is not None:
            self._copy.write(text)
        self._lines.clear()
