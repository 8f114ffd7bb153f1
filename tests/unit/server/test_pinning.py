import asyncio

import pytest

from sllm_node.core.errors import PinnedMemoryError
from sllm_node.server.pinning import Pinning
from tests.unit.server.fake_service import FakeService


class SlowService(FakeService):
    """Loads when it is told how that ends."""

    def __init__(self):
        super().__init__()
        self.loads = asyncio.Queue()

    async def load(self, model):
        end = asyncio.get_running_loop().create_future()
        await self.loads.put(end)
        await end


@pytest.fixture
async def pinning():
    made = Pinning(SlowService())
    yield made
    await made.close()


@pytest.fixture
def service(pinning):
    return pinning._service


def refusal():
    return PinnedMemoryError("m", 9, 4, ("p",))


async def left(pinning, service):
    """Return the load of a pin whose caller has gone away."""
    asked = asyncio.create_task(pinning.pin("m"))
    load = await service.loads.get()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    return load


async def test_a_pin_whose_caller_has_left_is_taken_back_if_the_model_cannot_come(pinning, service):
    load = await left(pinning, service)
    assert service.pinned
    load.set_exception(refusal())
    await asyncio.gather(*pinning._tasks, return_exceptions=True)
    assert not service.pinned


async def test_a_pin_whose_caller_has_left_stays_if_the_model_comes(pinning, service):
    load = await left(pinning, service)
    load.set_result(None)
    await asyncio.gather(*pinning._tasks)
    await pinning.close()
    assert service.pinned


@pytest.mark.parametrize("was_pinned", [True, False])
async def test_a_server_that_closes_takes_back_what_has_not_come(pinning, service, was_pinned):
    service.pinned = was_pinned
    await left(pinning, service)
    await pinning.close()
    assert service.pinned is was_pinned


async def test_a_pin_that_is_taken_back_takes_no_other_with_it(pinning, service):
    first, second = (asyncio.create_task(pinning.pin("m")) for _ in range(2))
    (await service.loads.get()).set_exception(refusal())
    with pytest.raises(PinnedMemoryError):
        await first
    (await service.loads.get()).set_result(None)
    await second
    assert service.pinned
