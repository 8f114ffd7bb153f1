"""Pins that operators ask for: a model stays pinned only if it came, even if who asked has gone away.

A pin counts from when it is asked for, so that nothing takes the model's room while it comes, and is
taken back where the model can't come. Pins of one model are made one after another: one that is taken
back takes none with it that somebody else was told.
"""

import asyncio
import logging
from weakref import WeakValueDictionary

from sllm_node.server.service import GenerationService

log = logging.getLogger(__name__)


class Pinning:
    """Pins under way."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def pin(self, model: str) -> None:
        """Keep `model` on the device, and bring it there; a caller that is cancelled ends neither.

        Raises:
            SllmError: it can't come, or the pin can't be kept; it is pinned no more than before.
        """
        task = asyncio.create_task(self._in_turn(model), name="pin")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Take back the pins whose models have not come."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("not pinned", extra={"error": str(error)})  # its caller may be gone

    async def _in_turn(self, model: str) -> None:
        async with self._turns.setdefault(model, asyncio.Lock()):
            was_pinned = self._service.status(model).pinned
            await self._service.pin(model)
            try:
                await self._service.load(model)
            except BaseException as error:
                if not was_pinned:
                    await self._service.unpin(model)
                    log.info("pin taken back", extra={"model": model, "error": str(error)})
                raise
