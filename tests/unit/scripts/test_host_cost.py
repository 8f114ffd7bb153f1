"""The benchmark of host costs: loads end with a driver that moves no bytes, and give all back."""

from argparse import Namespace

import pytest

pytest.importorskip("cuda.bindings.driver")

from scripts.bench.host_cost import made_checkpoint, measure
from scripts.bench.null_driver import NullDriver
from sllm_node.codec.names import EXPONENT, RAW


@pytest.mark.parametrize("codec", [RAW, EXPONENT])
async def test_a_checkpoint_without_bytes_loads_over_two_links(monkeypatch, codec):
    NullDriver(2).install(monkeypatch.setattr)
    options = Namespace(chunk=16, rounds=1, profile=False)
    found = await measure(made_checkpoint("tiny", codec), 2, options)
    assert found["median_s"] > 0
