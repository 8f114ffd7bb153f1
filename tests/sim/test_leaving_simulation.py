"""Real peers and routers on virtual time: what clients are told while nodes drain, leave and die."""

import asyncio

import pytest

from sllm_node.core.errors import DrainingError, ModelNotFoundError
from tests.sim.test_cluster_simulation import in_world


@in_world(a=("mine",), b=("m",))
async def test_an_entry_that_drains_says_so_for_models_of_peers_as_for_its_own(world):
    router = world["a"].router
    router.drain()
    for model in ("mine", "m"):
        with pytest.raises(DrainingError):
            world.open("a", model)
    with pytest.raises(DrainingError):
        await router.prepare("m")
    with pytest.raises(ModelNotFoundError):
        await router.prepare("none")
    await asyncio.sleep(1.0)
