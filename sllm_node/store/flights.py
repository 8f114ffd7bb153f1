"""Loads under way, one for each model (single flight), and who waits for them.

A caller that is cancelled leaves the others waiting; the last one takes the load with it. What a load
has brought onto devices belongs to those who wait for it: each has a lease the moment it ends.
"""

import asyncio
from functools import partial

from sllm_node.core.types import LoadProgress, LoadReport, ModelId
from sllm_node.store.lease import Lease, parts_of, report_of
from sllm_node.store.loader import Load
from sllm_node.store.observed import Observed
from sllm_node.store.residents import Residents
from sllm_node.store.waiting import Waiting


class Flights:
    """Those of one store."""

    def __init__(self, residents: Residents, waiting: Waiting, observed: Observed) -> None:
        self.loads: dict[ModelId, Load] = {}
        """Under way; they may be ending."""
        self.remnants: dict[ModelId, Load] = {}
        """Loads that failed and whose memory somebody still looks at."""
        self._residents = residents
        self._waiting = waiting
        self._observed = observed
        self._waiters: dict[ModelId, int] = {}

    def begin(self, load: Load, *, is_warm: bool) -> None:
        """Start `load`, now or when its turn comes."""
        self.loads[load.model] = load
        self._waiters[load.model] = 0
        self._observed.show()
        self._waiting.begin(load, is_warm=is_warm)

    def ended(self, load: Load, result: LoadReport | BaseException) -> None:
        """Take note that a load is over: those who wait have leases now, or its memory is free."""
        model = load.model
        del self.loads[model]
        waiters = self._waiters.pop(model)
        self._waiting.ended(load)
        for target in load.targets:
            target.tier.loads -= 1
        if isinstance(result, LoadReport):
            for target in load.targets:
                target.tier.arena.filled(model)
            if load.is_onto_device:
                self._residents.add(load, waiters)
            self._observed.succeeded(load, result)
            return
        if load.borrowers:
            self.remnants[model] = load
        else:
            self._take_back(load)
        self._observed.failed(load, result)

    def _take_back(self, load: Load) -> None:
        """Free the memory of a load that failed."""
        for target in load.targets:
            target.tier.arena.release(load.model)
            target.tier.drop_unfilled(load.model)

    async def close(self) -> None:
        """Cancel all, and wait until they have ended."""
        for load in list(self.loads.values()):
            self._waiting.cancel(load)
        while self.loads:
            await next(iter(self.loads.values())).ended

    # --- who waits ----------------------------------------------------------------------------

    async def wait(self, load: Load, *, early: bool = False) -> LoadReport | None:
        """Wait for `load`; if it was one onto the device, a lease has been counted for us.

        With `early`, return None when its memory is there and it goes on.
        """
        model = load.model
        self._waiters[model] = self._waiters.get(model, 0) + 1
        try:
            if early:
                await asyncio.shield(load.mapped)
                if not (load.is_ending or load.ended.done()):
                    return None
            result = await asyncio.shield(load.ended)
        except asyncio.CancelledError:
            self._leave(load)
            raise
        return report_of(model, result)

    def lend(self, load: Load) -> Lease:
        """Return an early lease to somebody who is counted as waiting for `load`."""
        load.borrowers += 1
        give_back = partial(self._give_back_early, load)
        return Lease(load.checkpoint, parts_of(load), None, give_back, early=load)

    def _give_back_early(self, load: Load) -> None:
        load.borrowers -= 1
        self._leave(load)
        if not load.borrowers and self.remnants.get(load.model) is load:
            del self.remnants[load.model]
            self._take_back(load)
            load.returned.set_result(None)
            self._observed.show()

    def _leave(self, load: Load) -> None:
        """A waiter was cancelled; the last one cancels the load."""
        if load.ended.done():
            if (resident := self._residents.made_by(load)) is not None:
                resident.give_back()
            return
        self._waiters[load.model] -= 1
        if not self._waiters[load.model]:
            self._waiting.cancel(load)

    # --- what is seen from outside ------------------------------------------------------------

    def progress(self, model: ModelId) -> LoadProgress | None:
        """Return how far the load of `model` is, if one is under way."""
        load = self.loads.get(model)
        return load.progress() if load else None

    async def begun(self, model: ModelId) -> float | None:
        """Wait until a load of `model` has issued its first read or copy; return when that was.

        None: there is none onto devices, or it waits behind others, or for a prefetch of the model.
        """
        load = self.loads.get(model)
        if load is None or not load.is_onto_device or self._waiting.is_to_start(load):
            return None
        return await asyncio.shield(load.begun)

    async def settled(self, model: ModelId) -> None:
        """Wait until no load of `model` onto devices is under way.

        A cancelled one holds memory to its end; a prefetch holds none.
        """
        while (load := self.loads.get(model)) is not None and load.is_onto_device:
            await asyncio.shield(load.ended)
        if (remnant := self.remnants.get(model)) is not None:
            await asyncio.shield(remnant.returned)
