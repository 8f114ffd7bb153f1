"""A store that a program has open: how its pool is cut, who loads with it, and how it ends.

A store may be closed beside loads. Each of them is cancelled as by its caller, so that no lease is left
between a load's end and the step in which its caller takes the memory over.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import ArgumentError, LoadFailedError
from sllm_node.core.types import ModelId, Placement, Tier
from sllm_node.core.units import GIB
from sllm_node.library.devices import physical_memory
from sllm_node.store.lease import LeasedPart
from sllm_node.store.store import Store

POOL_BYTES_MAX: Final = GIB
"""Of the pool, unless another size is asked for."""
_POOL_SHARE: Final = 16
"""The pool takes at most this part of the machine's memory by itself."""
_POOL_CHUNKS: Final = 8
"""A pool has at least so many chunks if it can, so that reads and copies overlap."""


@dataclass(slots=True)
class OpenStore:
    """One that is open; all on the event loop."""

    store: Store
    pool_bytes: int
    chunk_bytes: int
    _loads: set[asyncio.Task[Any]] = field(default_factory=set)
    _is_closing: bool = False

    def check(self, pool_bytes: int | None, checkpoint: Checkpoint) -> None:
        """Refuse what the pool that is open can't do.

        Raises:
            ArgumentError: it has another size than asked for, or does not fit the file chunks.
        """
        problem = None
        if pool_bytes not in (None, self.pool_bytes):
            problem = f"{pool_bytes} bytes asked for, and one of {self.pool_bytes} is open"
        elif not _fits(checkpoint.index, self.chunk_bytes):
            problem = (
                f"{checkpoint.path} has chunks of {checkpoint.index.chunk_bytes} bytes, which don't "
                f"fill those of the pool that is open ({self.chunk_bytes})"
            )
        if problem is not None:
            raise ArgumentError("pool_bytes", f"{problem}; call release_pool() before this load")

    async def bring(self, model: ModelId, placement: Placement) -> tuple[LeasedPart, ...]:
        """Load `model`; its memory is the caller's.

        Raises:
            LoadFailedError: the store was closed meanwhile.
            SllmError: it can't be loaded.
        """
        store, task = self.store, asyncio.current_task()
        assert task is not None
        self._loads.add(task)
        try:
            return store.hand_over(await store.acquire(model, placement))
        except BaseException as error:
            await store.settled(model)
            # A load that ended just before it was cancelled has left a replica of nobody.
            store.evict(model, Tier.DEVICE, "failed")
            store.forget(model)
            if self._is_closing and isinstance(error, asyncio.CancelledError):
                problem = "release_pool() took the pool away meanwhile; load it again"
                raise LoadFailedError(model, problem) from None
            raise
        finally:
            self._loads.remove(task)

    async def close(self) -> None:
        """End loads under way, each with an error of its own, then the store.

        Raises:
            ModelBusyError: somebody holds a lease.
        """
        self._is_closing = True
        for load in self._loads:
            load.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        await self.store.close()


def default_pool_bytes() -> int:
    """Return the size of a pool that nobody has asked another size of."""
    return min(POOL_BYTES_MAX, physical_memory() // _POOL_SHARE)


def _fits(index: TensorIndex, chunk_bytes: int) -> bool:
    """Tell whether chunks of the pool hold file chunks, and raw ones without a gap."""
    if index.is_encoded:
        return index.chunk_bytes <= chunk_bytes
    return chunk_bytes % index.chunk_bytes == 0


def store_config(pool_bytes: int, file_chunk_bytes: int) -> StoreConfig:
    """Return the config of a store whose pool chunks hold whole file chunks."""
    wanted = min(StoreConfig().chunk_bytes, pool_bytes // _POOL_CHUNKS)
    chunk = max(1, wanted // file_chunk_bytes) * file_chunk_bytes
    if pool_bytes < 2 * chunk:
        raise ArgumentError(
            "pool_bytes",
            f"{pool_bytes} bytes are too few for this checkpoint: {2 * chunk} at least",
        )
    # No relays: they would take staging memory of GPUs that belong to other work.
    return StoreConfig(pool_bytes=ByteSize(pool_bytes), chunk_bytes=ByteSize(chunk), relay=False)
