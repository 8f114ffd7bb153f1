import pytest
import torch

from sllm_node.bench import devices
from sllm_node.core.errors import DeviceError


def test_the_cpu_is_opened_with_its_memory():
    with devices.open_device("cpu", 4096) as device:
        assert (device.name, device.memory_total) == ("cpu", 4096)


@pytest.mark.parametrize("name", ["tpu", "cuda", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(DeviceError, match=name):
        devices.open_device(name, 4096)


def test_free_memory_of_the_cpu_is_what_the_system_says():
    assert devices.free_memory("cpu") > 0


def test_host_memory_begins_at_a_page():
    memory = devices.host_memory(5000, "cpu", pinned=False)
    assert (memory.data_ptr() % 4096, memory.numel()) == (0, 5000)


def test_a_slot_copies_its_first_bytes():
    slot = devices.Slot(8, "cpu")
    slot.view[:] = bytes(range(8))
    target = torch.zeros(3, dtype=torch.uint8)
    slot.wait()
    slot.copy_to(target)
    assert target.tolist() == [0, 1, 2]
