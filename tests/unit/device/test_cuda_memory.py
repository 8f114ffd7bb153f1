"""Which pieces of device memory are mapped together."""

import pytest

cuda_memory = pytest.importorskip("sllm_node.device.cuda_memory")


def test_neighbouring_pieces_are_one_run():
    assert cuda_memory._runs([]) == []
    assert cuda_memory._runs([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)]
