"""What opening an engine takes, and gives back when it comes to nothing."""

import pytest

from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.errors import LoadFailedError
from sllm_node.device.cpu import CpuDevice
from tests.models import make_checkpoint
from tests.unit.engine.rig import Weights, engines_of


class FailingWeights(Weights):
    """Weights whose load is given up in the moment in which an engine is to wait for them."""

    @property
    def arrival(self):
        raise LoadFailedError("m", "it was given up")


async def test_an_engine_that_can_not_wait_for_its_weights_gives_its_kv_memory_back(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "m")
    config = EngineConfig(kv_cache_bytes=ByteSize(8 << 20), torch_threads=1)
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, config)
        weights = FailingWeights(checkpoint, device)
        codec = await engines.load_codec(checkpoint.path)
        skeleton = await engines.skeleton(checkpoint)
        taken = device.memory_used
        with pytest.raises(LoadFailedError):
            await engines.open(weights, skeleton, codec)
        assert device.memory_used == taken
        weights.buffer.close()
        engines.close()
