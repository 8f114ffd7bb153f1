"""CUDA graphs: on every device, in a pool that outlives them, and nothing spoiled by one that fails."""

import gc
from threading import Thread

import pytest
import torch

from sllm_node.engine.graphs import CudaGraphs

pytestmark = pytest.mark.gpu


def devices():
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def doubled(x):
    """Return what doubles x, and has run once."""

    def compute():
        return (x * 2).relu()

    compute()
    return compute


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_graph_of_any_device_computes_again(number):
    if number >= torch.cuda.device_count():
        pytest.skip("fewer GPUs")
    device = torch.device("cuda", number)
    x = torch.ones(1000, device=device)
    replay = CudaGraphs(device).capture(doubled(x))
    for value in (1.0, 3.0, 7.0):
        x.fill_(value)
        assert torch.equal(replay(), torch.full_like(x, 2 * value))
    assert torch.cuda.current_device() == 0


def test_a_pool_outlives_all_of_its_graphs():
    (device, *_) = devices()
    graphs, x = CudaGraphs(device), torch.ones(1 << 20, device=device)
    for _ in range(3):
        replay = graphs.capture(doubled(x))
        assert float(replay().sum()) == 2 << 20
        del replay
        gc.collect()
    torch.cuda.empty_cache()
    assert float(graphs.capture(doubled(x))().sum()) == 2 << 20


@pytest.mark.parametrize("way", ["raises", "waits", "has no memory"])
def test_a_capture_that_fails_spoils_none_before_or_behind_it(way):
    (device, *_) = devices()
    graphs, x = CudaGraphs(device), torch.ones(1000, device=device)
    before = graphs.capture(doubled(x))

    def compute():
        made = x * 3
        if way == "raises":
            raise ValueError
        if way == "waits":
            made.cpu()
        return torch.empty(1 << 50, device=device) if way == "has no memory" else made

    with pytest.raises((ValueError, RuntimeError)):
        graphs.capture(compute)
    behind = graphs.capture(doubled(x))
    x.fill_(5.0)
    assert float(before().sum()) == float(behind().sum()) == 10000
    some = torch.ones(1 << 20, device=device)  # memory that several streams used comes back
    with torch.cuda.stream(torch.cuda.Stream(device)):
        some.record_stream(torch.cuda.current_stream())
    del some
    torch.cuda.synchronize()
    assert float(torch.ones(1 << 20, device=device).sum()) == 1 << 20


def test_captures_of_all_devices_at_once_go_on_while_others_take_memory():
    wrong = []

    def work(device):
        graphs = CudaGraphs(device)
        with torch.cuda.device(device):
            x = torch.ones(1 << 16, device=device)
            for value in range(1, 40):
                replay = graphs.capture(doubled(x))
                x.fill_(value)
                if float(replay().mean()) != 2 * value:
                    wrong.append((device, value))

    def take(device):
        for size in range(1, 400):
            torch.empty(size << 14, device=device).fill_(1)

    threads = [Thread(target=target, args=(one,)) for one in devices() for target in (work, take)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
