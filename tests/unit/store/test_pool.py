import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import DeviceError
from sllm_node.device.cpu import CpuDevice, CpuPinnedBuffer
from sllm_node.store.pool import take_pool

CONFIG = StoreConfig(pool_bytes=ByteSize(1 << 16), chunk_bytes=ByteSize(1 << 12), huge_pages=False)


class Buffer(CpuPinnedBuffer):
    is_closed = False

    def close(self):
        super().close()
        self.is_closed = True


class SlowDevice(CpuDevice):
    """Pins when it is told to, and may fail then."""

    def __init__(self, failure=None):
        super().__init__(1 << 20)
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.failure = failure
        self.pinned: list[Buffer] = []

    def pin(self, size, *, huge_pages):
        self.asked.set()
        assert self.go_on.wait(60)
        if self.failure is not None:
            raise self.failure
        self.pinned.append(Buffer(size, huge_pages=huge_pages))
        return self.pinned[0]


async def cancelled_taking(device, times):
    """Cancel `times` who takes the pool of `device` while it is pinned; return once that has ended."""
    with ThreadPoolExecutor(1) as threads:
        taking = asyncio.create_task(take_pool(threads, device, CONFIG))
        await asyncio.to_thread(device.asked.wait)
        for _ in range(times):
            taking.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert taking.done() == (times > 1)
        device.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_pool_is_cut_into_chunks():
    device = SlowDevice()
    device.go_on.set()
    with ThreadPoolExecutor(1) as threads:
        pool = await take_pool(threads, device, CONFIG)
    assert (pool.chunks, len(pool.view(15, 1 << 12))) == (16, 1 << 12)
    pool.close()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_pool_that_nobody_waits_for_any_more_is_given_back(times):
    device = SlowDevice()
    await cancelled_taking(device, times)
    assert [buffer.is_closed for buffer in device.pinned] == [True]


async def test_a_pool_that_is_refused_when_nobody_waits_is_nobodys_error():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    await cancelled_taking(SlowDevice(DeviceError("cpu", "no memory")), 1)
    assert told == []
