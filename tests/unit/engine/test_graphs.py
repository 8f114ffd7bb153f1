"""Captures on a torch.cuda that is not there: pools, anchors, and what is left when one fails."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sllm_node.core.errors import KernelError
from sllm_node.engine.graphs import CudaGraphs


class Cuda:
    """What torch.cuda is asked for, and what became of it."""

    def __init__(self):
        self.pools = self.streams = self.emptied = self.ended = self.waited = 0
        self.begun = []
        self.fails_to_end = False
        self.stream = nullcontext
        self.device = nullcontext
        self.stopped = []

    def Stream(self, device):  # noqa: N802 - torch's name
        self.streams += 1
        return self.streams

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def current_stream(self):
        return SimpleNamespace(synchronize=self.wait)

    def wait(self):
        self.waited += 1

    def empty_cache(self):
        self.emptied += 1

    def CUDAGraph(self):  # noqa: N802 - torch's name
        return Graph(self)


class Graph:
    def __init__(self, cuda):
        self._cuda = cuda
        self.replayed = 0

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self._cuda.begun.append(pool)

    def capture_end(self):
        self._cuda.ended += 1
        if self._cuda.fails_to_end:
            raise RuntimeError("the capture was invalidated")

    def replay(self):
        self.replayed += 1


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    for name in ("Stream", "graph_pool_handle", "current_stream", "empty_cache", "CUDAGraph",
                 "stream", "device"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    stop = lambda device, pool: made.stopped.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", stop, raising=False)
    return made


def graphs():
    return CudaGraphs(torch.device("cuda", 1))


def test_all_graphs_share_a_pool_that_an_anchor_keeps(cuda):
    made = graphs()
    replays = [made.capture(lambda: 7) for _ in range(3)]
    assert [replay() for replay in replays] == [7, 7, 7]
    assert cuda.begun == [1, 1, 1, 1]  # the anchor, and three
    assert (cuda.pools, cuda.streams, cuda.emptied) == (1, 1, 0)
    assert cuda.waited == 3


def test_a_function_that_fails_leaves_the_pool_to_others(cuda):
    made = graphs()
    with pytest.raises(ZeroDivisionError):
        made.capture(lambda: 1 // 0)
    assert cuda.ended == len(cuda.begun) == 2
    assert made.capture(lambda: 7)() == 7
    assert cuda.pools == 1


def test_a_capture_without_memory_is_made_again_when_torch_has_given_some_back(cuda):
    def compute():
        if not cuda.emptied:
            raise torch.OutOfMemoryError
        return 7

    assert graphs().capture(compute)() == 7
    assert cuda.emptied == 1


def test_a_pool_in_which_a_capture_could_not_be_ended_is_given_up(cuda):
    made = graphs()
    before = made.capture(lambda: 7)
    cuda.fails_to_end = True
    with pytest.raises(RuntimeError):
        made.capture(lambda: 8)
    cuda.fails_to_end = False
    assert cuda.stopped == [(1, 1)]
    assert made.capture(lambda: 9)() == 9
    assert before() == 7
    assert cuda.begun == [1, 1, 1, 2, 2]
    assert (cuda.pools, cuda.streams) == (2, 2)


def test_a_device_that_spoils_pool_after_pool_has_no_more_graphs(cuda):
    made = graphs()
    for _ in range(3):
        made.capture(lambda: 7)
        cuda.fails_to_end = True
        with pytest.raises(RuntimeError):
            made.capture(lambda: 8)
        cuda.fails_to_end = False
    with pytest.raises(KernelError, match="no more of them"):
        made.capture(lambda: 9)
    assert cuda.pools == 3
