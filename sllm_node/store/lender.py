"""Lends chunks of the pinned pool for what is no checkpoint; who waits for a chunk to load goes first."""

from collections.abc import Sequence
from functools import partial

from sllm_node.store.loan import Loan
from sllm_node.store.observed import Observed
from sllm_node.store.pool import PinnedPool
from sllm_node.store.residency import Residency
from sllm_node.store.waiting import Waiting


class Lender:
    """The chunks that are lent, by loan."""

    def __init__(self, ledger: Residency, waiting: Waiting, observed: Observed) -> None:
        self._ledger = ledger
        self._waiting = waiting
        self._observed = observed

    def lend(self, count: int, pool: PinnedPool) -> Loan | None:
        """Lend `count` chunks of `pool`; None: there is no room."""
        if self._waiting.wants_chunks or count > self._ledger.lendable:
            return None
        chunks: list[int] = []
        size = pool.chunk_bytes
        while len(chunks) < count:
            taken = self._ledger.lend()
            assert taken is not None
            chunk, victim = taken
            chunks.append(chunk)
            if victim is not None:
                self._observed.gave_way(victim)
        self._observed.show()
        views = [pool.view(chunk, size) for chunk in chunks]
        return Loan(views, partial(self._take_back_chunks, chunks))

    def _take_back_chunks(self, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            self._ledger.take_back(chunk)
            self._waiting.wake_one()
        self._observed.show()
