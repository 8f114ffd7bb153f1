import pytest
import torch

from sllm_node.core.errors import DeviceError
from sllm_node.library.devices import gpu_names, open_device, physical_memory

without_cuda = pytest.mark.skipif(bool(torch.version.cuda), reason="this torch knows CUDA")


def test_the_cpu_is_a_device_with_the_machines_memory():
    with open_device("cpu") as device:
        assert device.memory_total == physical_memory() > 0


@pytest.mark.parametrize("name", ["cpu:1", "disk", "cuda", "cuda:x", "mps:0"])
def test_what_is_no_device_is_told(name):
    with pytest.raises(DeviceError, match="is no device"):
        open_device(name)


@without_cuda
def test_a_torch_without_cuda_has_no_gpus():
    assert gpu_names() == ()
    with pytest.raises(DeviceError, match="knows no CUDA"):
        open_device("cuda:0")
