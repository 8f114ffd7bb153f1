"""Blocks of preempted sessions go from GPUs to the pinned pool and come back, and no token changes."""

import pytest
import torch

from sllm_node.core.units import MIB
from sllm_node.engine.block_copies import BlockCopies
from sllm_node.engine.offload import Transfer
from tests.gpu.test_loads import open_devices
from tests.unit.engine.offload_rig import PROMPTS, Served
from tests.unit.engine.rig import ask, collect

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("resume", ["fast", "replay"])
@pytest.mark.parametrize("launch_ahead", ["never", "auto"])
@pytest.mark.parametrize("count", [1, 2])
async def test_tokens_equal_those_of_a_run_without_preemptions(
    tmp_path, count, launch_ahead, resume
):
    async with Served(tmp_path, open_devices(count, 600 * MIB)) as served:
        # The last time with graphs.
        await served.check_tokens(PROMPTS, resume, rounds=3, launch_ahead=launch_ahead)


async def test_clients_that_leave_and_an_engine_that_closes_leave_nothing_in_the_pool(tmp_path):
    async with Served(tmp_path, open_devices(1, 600 * MIB)) as served:
        engine = await served.crowded(30)
        for _ in range(2):
            sent = [engine.submit(ask(prompt, 60)) for prompt in PROMPTS]
            async for _ in sent[0]:
                if engine._parts.offloading.offload.kept:
                    break
            for generation in sent[1:]:
                generation.cancel()
            await collect(sent[0])
            assert not engine._parts.offloading.offload.kept
            assert not served.store.pool_chunks_lent
        sent = [engine.submit(ask(prompt, 60)) for prompt in PROMPTS]
        async for _ in sent[0]:
            if engine._parts.offloading.offload.kept:
                break
        await served.close()
        assert not served.store.pool_chunks_lent


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
async def test_blocks_come_back_bit_for_bit_and_without_waiting(tmp_path):
    async with Served(tmp_path, open_devices(1, 600 * MIB)) as served:
        engine = await served.open()
        cache = engine._parts.cache
        loan = served.store.lend(2)
        copies = BlockCopies(cache, 4, 3)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(torch.randn(tensor.shape))
        blocks, places = (9, 2, 5, 7, 0), (1, 3, 4, 6, 8)
        kept = [content(cache, block) for block in blocks]
        copies.run([Transfer(loan, 5, 0, blocks, is_back=False)])
        for tensor in (*cache.keys, *cache.values):
            tensor.zero_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            copies.run([Transfer(loan, 5, 1, places[1:], is_back=True)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert all(not tensor.any() for tensor in content(cache, places[0]))
        for place, wanted in zip(places[1:], kept[1:], strict=True):
            assert all(map(torch.equal, content(cache, place), wanted))
        loan.close()
        await served.close()


def content(cache, block):
    """Return what a block of four tokens holds, on the host."""
    slots = slice(4 * block, 4 * block + 4)
    return [tensor[slots].to("cpu", copy=True) for tensor in (*cache.keys, *cache.values)]
