import gc
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from sllm_node.core.errors import DeviceLostError
from sllm_node.core.types import Part
from sllm_node.core.units import MIB, PAGE
from sllm_node.device.cpu import CpuDevice
from sllm_node.library.memory import Held, Releaser


@pytest.fixture
def releaser():
    made = Releaser()
    yield made
    made.close()


def held_on(device, releaser, size=2 * PAGE, start=0):
    buffer = device.allocate(size)
    buffer.array[:] = np.arange(size) % 251
    return Held(Part("cpu", start, start + size), buffer, releaser.take(device))


def test_the_memory_goes_back_when_the_last_tensor_dies(releaser):
    with CpuDevice(MIB) as device:
        held = held_on(device, releaser)
        one, other = held.tensor(0, PAGE), held.tensor(PAGE, 2 * PAGE)
        del held, other
        view = one[5:9]
        del one
        releaser.settle()
        assert device.memory_used == 2 * PAGE
        assert view.tolist() == [5, 6, 7, 8]
        del view
        releaser.settle()
        assert device.memory_used == 0


def test_no_collector_is_needed_for_it(releaser):
    with CpuDevice(MIB) as device:
        gc.disable()
        try:
            parameter = torch.nn.Parameter(
                held_on(device, releaser).tensor(0, 64).view(torch.float32)
            )
            assert parameter.requires_grad
            del parameter
            releaser.settle()
            assert device.memory_used == 0
        finally:
            gc.enable()


def test_each_tensor_has_a_storage_of_its_own(releaser):
    with CpuDevice(MIB) as device:
        held = held_on(device, releaser, start=512)
        tensor = held.tensor(512 + 256, 512 + 266)
        assert tensor.untyped_storage().nbytes() == 10
        assert len(pickle.dumps(tensor)) < 1000
        assert tensor.tolist() == [(256 + n) % 251 for n in range(10)]
        assert held.has(512, 512 + 2 * PAGE)
        assert not held.has(0, 600)
        assert held.tensor(600, 600).shape == (0,)
        del held, tensor
        releaser.settle()


def test_finalizers_take_no_lock_so_one_may_run_while_another_thread_holds_the_ledgers(releaser):
    with CpuDevice(MIB) as device:
        held = held_on(device, releaser)
        with device._ledger._lock:
            del held  # would hang if it closed the range here
        releaser.settle()
        assert device.memory_used == 0


def test_a_lost_device_does_not_end_the_thread(releaser, caplog):
    class Lost(CpuDevice):
        def check(self):
            raise DeviceLostError(self.name, "gone")

    device, sound = Lost(MIB), CpuDevice(MIB)
    held_on(device, releaser)
    held_on(sound, releaser)
    releaser.settle()
    assert sound.memory_used == 0
    assert "not given back" in caplog.text


AT_THE_END = """
from concurrent.futures.thread import _python_exit
from sllm_node.core.types import Part
from sllm_node.device.cpu import CpuDevice
from sllm_node.library.memory import Held, Releaser

device, releaser = CpuDevice(8192), Releaser()
held = Held(Part("cpu", 0, 4096), device.allocate(4096), releaser.take(device))
_python_exit()  # what the interpreter calls as main() has returned
del held
releaser.settle()
"""


def test_memory_that_dies_as_the_interpreter_goes_down_is_no_trouble():
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
