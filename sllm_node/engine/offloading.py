"""Carries out what `offload` decides for one engine: copies before steps, rates and metrics after them.

A copy to the pool that fails costs its session no more than computing again, and the step goes on. One back that
fails takes the step along, which counts on what it brings.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from sllm_node.core.clock import Clock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.engine.block_copies import BlockCopies, block_bytes
from sllm_node.engine.kv import KvCache
from sllm_node.engine.offload import Offload, Room, Transfer

log = logging.getLogger(__name__)

StepsT = TypeVar("StepsT")
DrawnT = TypeVar("DrawnT")


class Offloading:
    """The pinned pool as one engine uses it."""

    def __init__(
        self, name: ModelId, offload: Offload, copies: BlockCopies, clock: Clock, metrics: Metrics
    ) -> None:
        self.offload = offload
        self._name = name
        self._copies = copies
        self._clock = clock
        self._decisions = partial(metrics.kv_offload_decisions.labels, name)
        self._bytes = partial(metrics.kv_offload_bytes.labels, name)

    def before(
        self, advance: Callable[[StepsT], DrawnT], prompt_tokens: int
    ) -> Callable[[StepsT], DrawnT]:
        """Return `advance` with all copies before it that were decided.

        `prompt_tokens`: of the step that ends with it.
        """
        transfers, loop = self.offload.take(), asyncio.get_running_loop()
        for decision, count in self.offload.tally.taken().items():
            self._decisions(decision).inc(count)

        def job(steps: StepsT) -> DrawnT:
            if transfers:
                self._carry_out(transfers, loop)
            began = self._clock.now()
            drawn = advance(steps)
            took_s = self._clock.now() - began
            loop.call_soon_threadsafe(self.offload.rates.stepped, prompt_tokens, took_s)
            return drawn

        return job

    def _carry_out(self, transfers: Sequence[Transfer], loop: asyncio.AbstractEventLoop) -> None:
        """Copy, on the step thread: to the pool first, as what comes back may overwrite what goes."""
        out = [one for one in transfers if not one.is_back]
        back = [one for one in transfers if one.is_back]
        began = self._clock.now()
        if out:
            try:
                self._copies.run(out)
            except Exception as error:
                if {id(one.loan) for one in out} & {id(one.loan) for one in back}:
                    raise
                loop.call_soon_threadsafe(self._lost, out, error)
                out = []
        took_s = self._clock.now() - began
        if back:
            self._copies.run(back)
        loop.call_soon_threadsafe(self._carried_out, [*out, *back], took_s)

    def _lost(self, transfers: Sequence[Transfer], error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        log.warning("copy to the pool failed", extra={"model": self._name, "error": text})
        self.offload.lost(transfers)

    def _carried_out(self, transfers: Sequence[Transfer], took_s: float) -> None:
        out = sum(len(one.blocks) for one in transfers if not one.is_back)
        back = sum(len(one.blocks) for one in transfers if one.is_back)
        # Copies back alone are not waited for: what they took is not known.
        self.offload.carried_out(transfers, took_s if out else None)
        self._bytes("out").inc(out * self.offload.block_bytes)
        self._bytes("in").inc(back * self.offload.block_bytes)


def with_copies(
    offloading: Offloading | None, advance: Callable[[StepsT], DrawnT], prompt_tokens: int
) -> Callable[[StepsT], DrawnT]:
    """Return `advance`, behind the copies that were decided, if any ever are."""
    return advance if offloading is None else offloading.before(advance, prompt_tokens)


class Offloads:
    """Makes them for the engines of a node; `room` is what they share, None: nothing is kept."""

    def __init__(self, room: Room | None, clock: Clock, metrics: Metrics) -> None:
        self._room = room
        self._clock = clock
        self._metrics = metrics

    def of(self, name: ModelId, cache: KvCache, block_tokens: int) -> Offloading | None:
        """Return that of one engine."""
        if self._room is None:
            return None
        offload = Offload(self._room, block_bytes(cache, block_tokens))
        copies = BlockCopies(cache, block_tokens, offload.chunk_blocks)
        return Offloading(name, offload, copies, self._clock, self._metrics)
