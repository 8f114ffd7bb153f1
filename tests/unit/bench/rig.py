"""Files, clocks and contestants of the tests of `bench`."""

from pathlib import Path

import torch

from sllm_node.bench.contestants import Loaded
from sllm_node.bench.files import ModelFiles, PageCache, prepare_shape
from sllm_node.bench.reference import Reference
from sllm_node.bench.scenarios import Field
from sllm_node.bench.shapes import find_shape
from sllm_node.core.clock import ManualClock


def make_files(store: Path, copies: int = 1) -> list[ModelFiles]:
    return prepare_shape(find_shape("tiny"), store, copies, seed=3, device="cpu")


def no_drop(folder: Path) -> PageCache:
    """A page cache whose switch nobody may use: files are dropped one by one."""
    return PageCache(folder / "none" / "drop_caches")


class Slow:
    """A contestant that takes `seconds` of a manual clock for each load."""

    in_module_layout = False

    def __init__(self, name, clock, seconds, tensors, *, fails_at=None):
        self.name = name
        self.clock = clock
        self.seconds = seconds
        self.tensors = tensors
        self.fails_at = fails_at
        self.loads = []
        self.freed = 0

    def version(self):
        return "1"

    def refusal(self, device):
        return None

    def load(self, files, device, *, warm):
        self.loads.append((files.model, warm))
        if len(self.loads) == self.fails_at:
            raise ValueError("out of breath\nand more")
        self.clock.advance(self.seconds)
        return Loaded(dict(self.tensors), self._release)

    def _release(self):
        self.freed += 1

    def close(self):
        pass


class FixedCeiling:
    name = "plain reader"
    scenarios = ("random",)

    def __init__(self, rate):
        self.rate = rate

    def measure(self, files, clock):
        return self.rate


WEIGHTS = {"a": torch.arange(6, dtype=torch.int16), "b": torch.ones(3, dtype=torch.bfloat16)}


def make_field(files, contestants, folder, ceilings=(), clock=None):
    reference = Reference(
        {name: tensor.clone().view(torch.uint8).clone for name, tensor in WEIGHTS.items()}
    )
    return Field(
        contestants, ceilings, files, reference, "cpu", clock or ManualClock(), no_drop(folder)
    )
