import gc

import pytest

from sllm_node.core.units import MIB
from sllm_node.device.cpu import CpuDevice
from sllm_node.library.loader import Loader
from tests.models import make_checkpoint

DEVICES = ("cpu", "cpu:0", "cpu:1")


@pytest.fixture
def loader():
    """A loader of CPUs; at the end nobody has memory of them any more."""
    made = Loader(lambda name: CpuDevice(64 * MIB, name), lambda: ())
    yield made
    gc.collect()
    left = [made.memory_used(name) for name in DEVICES]
    made.close()
    assert left == [0, 0, 0]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store folder with tiny models."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "llama_tied", "gpt2", "gemma2"):
        make_checkpoint(root, family, family)
    return root
