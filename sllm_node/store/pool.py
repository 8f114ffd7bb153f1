"""The pinned pool: one page-locked region, taken at start, cut into equal chunks, never grown."""

import asyncio
from concurrent.futures import Executor
from functools import partial

from sllm_node.core.config import StoreConfig
from sllm_node.device.base import Device, PinnedBuffer


class PinnedPool:
    """`chunks` slices of `chunk_bytes` each; which of them hold what is `residency`'s to know."""

    def __init__(
        self, device: Device, pool_bytes: int, chunk_bytes: int, *, huge_pages: bool
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks = pool_bytes // chunk_bytes
        self._buffer: PinnedBuffer = device.pin(self.chunks * chunk_bytes, huge_pages=huge_pages)

    def view(self, chunk: int, size: int) -> memoryview:
        """Return the first `size` bytes of `chunk`, writable."""
        assert 0 <= chunk < self.chunks
        assert size <= self.chunk_bytes
        start = chunk * self.chunk_bytes
        return self._buffer.view[start : start + size]

    def close(self) -> None:
        """Give the region back; no view may be in use."""
        self._buffer.close()


async def take_pool(threads: Executor, device: Device, config: StoreConfig) -> PinnedPool:
    """Take the pool of `config` in one of `threads`.

    A thread can't be stopped: who is cancelled waits until the pool has been taken and given back.

    Raises:
        DeviceError: the system refuses it.
    """
    take = partial(PinnedPool, device, huge_pages=config.huge_pages)
    taking = asyncio.get_running_loop().run_in_executor(
        threads, take, config.pool_bytes, config.chunk_bytes
    )
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_give_back)
        await asyncio.gather(asyncio.shield(taking), return_exceptions=True)
        raise


def _give_back(taking: asyncio.Future[PinnedPool]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        taking.result().close()
