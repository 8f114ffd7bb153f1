"""What every Device does, checked on each implementation."""

import threading

import numpy as np
import pytest

from sllm_node.core.errors import DeviceMemoryError
from sllm_node.core.units import PAGE
from sllm_node.device.cpu import CpuDevice

MEMORY = 1 << 20


def cuda_device():
    from sllm_node.device import cuda  # type: ignore[attr-defined]

    return cuda.CudaDevice(0, MEMORY)


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


def bytes_of(buffer):
    return bytes(np.asarray(buffer.array))


def test_copies_arrive_in_order_before_their_event(device, stream):
    pinned = device.pin(2 * PAGE, huge_pages=False)
    pinned.view[:PAGE] = b"a" * PAGE
    pinned.view[PAGE:] = b"b" * PAGE
    buffer = device.allocate(3 * PAGE)
    stream.copy_in(buffer, PAGE, pinned.view[:PAGE])
    stream.copy_in(buffer, 2 * PAGE, pinned.view[:PAGE])
    stream.copy_in(buffer, 2 * PAGE, pinned.view[PAGE:])
    assert wait(stream.record()) is None
    assert bytes_of(buffer)[PAGE:] == b"a" * PAGE + b"b" * PAGE
    buffer.close()
    pinned.close()


def test_memory_is_counted_and_given_back(device):
    first = device.allocate(MEMORY // 2)
    assert device.memory_used == MEMORY // 2
    with pytest.raises(DeviceMemoryError) as caught:
        device.allocate(MEMORY // 2 + 1)
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
    stream.copy_in(buffer, PAGE, pinned.view)
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
    assert bytes_of(buffer)[-1] == 7
    buffer.close()
    pinned.close()


def test_a_buffer_with_views_in_use_is_not_closed():
    with CpuDevice(MEMORY) as device:
        buffer = device.allocate(PAGE)
        view = buffer.array[10:20]
        with pytest.raises(BufferError, match="still in use"):
            buffer.close()
        assert device.memory_used == PAGE
        del view
        buffer.close()


def test_leaving_a_device_with_memory_in_use_is_noticed():
    with pytest.raises(AssertionError, match="still allocated"), CpuDevice(MEMORY) as device:
        leaked = device.allocate(PAGE)
    leaked.close()
