"""A poisoned context ends the process, with a line that says why."""

import subprocess
import sys

import pytest

from sllm_node.node.devices import EXIT_DEVICE_LOST

pytestmark = pytest.mark.gpu

CODE = """
import torch
from sllm_node.device.cuda import CudaDevice
from sllm_node.node.devices import end_process
from sllm_node.node.systemd import Notifier

device = CudaDevice(0, 64 << 20, on_lost=lambda error: end_process(error, Notifier({})))
place = device.reserve(4 << 20, 2 << 20)
place.map((0, 1)).wait()
view = torch.as_tensor(place.array, device="cuda:0")
place.unmap((0, 1)).wait()
try:
    view.add_(1)
    torch.cuda.synchronize()
except Exception as error:
    print("step failed:", type(error).__name__, flush=True)
device.check()
print("still here")
"""


def test_an_illegal_address_ends_the_process_with_its_own_status():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == EXIT_DEVICE_LOST, done.stderr
    assert "step failed" in done.stdout
    assert "still here" not in done.stdout
    assert "device lost" in done.stderr
