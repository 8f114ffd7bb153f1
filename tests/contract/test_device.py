"""What every Device does, checked on each implementation."""

import threading

import numpy as np
import pytest
import torch

from sllm_node.core.errors import DeviceMemoryError
from sllm_node.core.units import MIB, PAGE
from sllm_node.device.cpu import CpuDevice

MEMORY = 64 * MIB
PIECE = 2 * MIB
"""What the coarsest device here hands out."""
TORCH_NAMES = {"CpuRange": "cpu", "CudaRange": "cuda"}


def cuda_device():
    from sllm_node.device.cuda import CudaDevice

    return CudaDevice(0, MEMORY)


@pytest.fixture(
    params=[
        pytest.param(lambda: CpuDevice(MEMORY), id="cpu"),
        pytest.param(cuda_device, id="cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    with request.param() as made:
        yield made


@pytest.fixture
def stream(device):
    made = device.stream()
    yield made
    made.close()


def wait(event):
    """Block until `event` has happened; return its failure."""
    happened, result = threading.Event(), []

    def done(error):
        result.append(error)
        happened.set()

    event.on_done(done)
    assert happened.wait(30)
    return result[0]


def bytes_of(buffer, start=0, end=None):
    flat = torch.as_tensor(buffer.array, device=TORCH_NAMES.get(type(buffer).__name__))
    return bytes(flat[start:end].cpu().numpy())


def test_copies_arrive_in_order_before_their_event(device, stream):
    pinned = device.pin(2 * PAGE, huge_pages=False)
    pinned.view[:PAGE] = b"a" * PAGE
    pinned.view[PAGE:] = b"b" * PAGE
    buffer = device.allocate(3 * PAGE)
    stream.copy_in(buffer, PAGE, pinned.view[:PAGE])
    stream.copy_in(buffer, 2 * PAGE, pinned.view[:PAGE])
    stream.copy_in(buffer, 2 * PAGE, pinned.view[PAGE:])
    assert wait(stream.record()) is None
    assert bytes_of(buffer, PAGE) == b"a" * PAGE + b"b" * PAGE
    buffer.close()
    pinned.close()


def test_memory_is_counted_and_given_back(device):
    assert MEMORY % device.granularity == 0
    first = device.allocate(MEMORY // 2)
    assert device.memory_used == MEMORY // 2
    assert device.free_bytes() == MEMORY // 2
    with pytest.raises(DeviceMemoryError) as caught:
        device.allocate(MEMORY // 2 + PIECE)
    assert (caught.value.free, caught.value.total) == (MEMORY // 2, MEMORY)
    first.close()
    first.close()
    assert device.memory_used == 0
    device.allocate(MEMORY).close()


def test_pinned_memory_is_aligned_for_direct_io(device):
    pinned = device.pin(3 * PAGE, huge_pages=True)
    assert np.frombuffer(pinned.view, np.uint8).ctypes.data % PAGE == 0
    assert pinned.size == len(pinned.view) == 3 * PAGE
    pinned.close()


def test_an_event_of_an_empty_stream_happens(stream):
    assert wait(stream.record()) is None


def test_a_failed_copy_fails_the_next_event_and_only_that(device, stream):
    pinned = device.pin(PAGE, huge_pages=False)
    buffer = device.allocate(PAGE)
    stream.copy_in(buffer, buffer.size, pinned.view)
    assert isinstance(wait(stream.record()), Exception)
    assert wait(stream.record()) is None
    buffer.close()
    pinned.close()


def test_closing_a_stream_waits_for_what_is_enqueued(device):
    stream = device.stream()
    buffer, pinned = device.allocate(MEMORY), device.pin(MEMORY, huge_pages=False)
    pinned.view[-1] = 7
    stream.copy_in(buffer, 0, pinned.view)
    stream.close()
    assert bytes_of(buffer, -1) == b"\7"
    buffer.close()
    pinned.close()


def test_memory_comes_and_goes_by_pieces_behind_the_same_addresses(device, stream):
    pinned = device.pin(PIECE, huge_pages=False)
    pinned.view[:] = b"x" * PIECE
    place = device.reserve(3 * PIECE - PAGE, PIECE)
    assert device.memory_used == 0
    assert wait(place.map((0, 2))) is None
    assert sorted(place.mapped) == [0, 2]
    stream.copy_in(place, 0, pinned.view)
    stream.copy_in(place, 2 * PIECE, pinned.view[: PIECE - PAGE])
    assert wait(stream.record()) is None
    view = torch.as_tensor(place.array, device=TORCH_NAMES[type(place).__name__])
    assert wait(place.unmap((0,))) is None
    assert sorted(place.mapped) == [2]
    pinned.view[:] = b"y" * PIECE
    assert wait(place.map((0, 1))) is None
    stream.copy_in(place, 0, pinned.view)
    assert wait(stream.record()) is None
    assert bytes(view[:PIECE].cpu().numpy()) == b"y" * PIECE
    assert bytes(view[2 * PIECE :].cpu().numpy()) == b"x" * (PIECE - PAGE)
    place.close()
    assert device.memory_used == 0
    pinned.close()


def test_a_range_takes_no_more_than_there_is(device):
    place = device.reserve(2 * MEMORY, PIECE)
    half = range(MEMORY // PIECE // 2)
    wait(place.map(half))
    with pytest.raises(DeviceMemoryError):
        place.map(range(MEMORY // PIECE, MEMORY // PIECE + MEMORY // PIECE // 2 + 1))
    assert device.memory_used == MEMORY // 2
    wait(place.unmap(half))
    assert device.memory_used == 0
    place.close()


def test_bytes_are_copied_from_one_buffer_to_another(device, stream):
    pinned = device.pin(PIECE, huge_pages=False)
    pinned.view[:] = bytes(range(256)) * (PIECE // 256)
    origin, target = device.allocate(PIECE), device.allocate(PIECE)
    stream.copy_in(origin, 0, pinned.view)
    stream.copy_device(target, 512, origin, (256, 1024))
    assert wait(stream.record()) is None
    assert bytes_of(target, 512, 1280) == bytes(pinned.view[256:1024])
    origin.close()
    target.close()
    pinned.close()


def test_leaving_a_device_with_memory_in_use_is_noticed():
    with pytest.raises(AssertionError, match="still allocated"), CpuDevice(MEMORY) as device:
        leaked = device.allocate(PAGE)
    leaked.close()
