"""What the decoder of a GPU gives back, with a driver that only counts: no GPU is needed."""

import itertools
from types import SimpleNamespace

import pytest

from sllm_node.core.errors import DeviceError
from sllm_node.core.units import MIB
from sllm_node.device.base import ChunkJob, ChunkJobs

driver = pytest.importorskip("cuda.bindings.driver")
CudaContext = pytest.importorskip("sllm_node.device.cuda_context").CudaContext
CudaDecoder = pytest.importorskip("sllm_node.device.cuda_decoder").CudaDecoder
CudaRange = pytest.importorskip("sllm_node.device.cuda_memory").CudaRange
CudaStream = pytest.importorskip("sllm_node.device.cuda_stream").CudaStream
OK, REFUSED = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
PAGE = 4096


class Driver:
    """Everything happens when it is enqueued; `refuse(name)` says which calls fail."""

    def __init__(self, monkeypatch):
        self.events = set()
        self.calls = []
        self.refuse = lambda name: False
        self._handles = itertools.count(1)
        made = {
            "cuEventCreate": self._create_event, "cuEventDestroy": self._destroy_event,
            "cuStreamCreate": lambda *_: (OK, next(self._handles)),
            "cuDeviceGetAttribute": lambda which, _: (OK, 9 if "MAJOR" in which.name else 0),
            "cuModuleLoadData": lambda _: (OK, 1), "cuModuleGetFunction": lambda *_: (OK, 1),
            "cuEventElapsedTime": lambda *_: (OK, 1.0),
        }  # fmt: skip
        for name in (
            "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxSetCurrent", "cuStreamSynchronize",
            "cuStreamDestroy", "cuStreamWaitEvent", "cuEventRecord", "cuEventSynchronize",
            "cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuLaunchKernel", "cuModuleUnload",
        ):  # fmt: skip
            made[name] = lambda *_: (OK,)
        for name, call in made.items():
            monkeypatch.setattr(driver, name, self._counted(name, call))

    def _counted(self, name, call):
        def counted(*arguments):
            self.calls.append((name, arguments))
            return (REFUSED, None) if self.refuse(name) else call(*arguments)

        return counted

    def _create_event(self, _):
        event = next(self._handles)
        self.events.add(event)
        return OK, event

    def _destroy_event(self, event):
        self.events.remove(event)
        return (OK,)

    def count(self, name):
        return sum(called == name for called, _ in self.calls)


class Rig:
    def __init__(self, monkeypatch):
        self.driver = Driver(monkeypatch)
        context = CudaContext("cuda:0", 0, 0, lambda error: None)
        self.link, stream = CudaStream(context), CudaStream(context)

        def pin(size):
            return SimpleNamespace(view=memoryview(bytearray(size)), close=lambda: None)

        self.decoder = CudaDecoder(context, stream, pin)
        self.decoder.stage_in(self.memory(MIB))
        self.source = memoryview(bytearray(MIB))
        self.told = []

    @staticmethod
    def memory(size):
        """Return device memory that nobody touches."""
        made = CudaRange.__new__(CudaRange)
        made.address, made._size = 1 << 40, size
        return made

    def decode(self, jobs):
        def done(*told):
            self.told.append(told)

        self.decoder.decode(self.link, self.memory(64 * MIB), 0, self.source, ChunkJobs(jobs), done)

    def close(self):
        self.decoder.close()
        self.link.close()


@pytest.fixture
def rig(monkeypatch):
    return Rig(monkeypatch)


def jobs(count, codec="exp-bf16", digest=None):
    return [
        ChunkJob(
            codec, i * 4 * PAGE, 4 * PAGE, i * 32768, 32768, ((i * 32768, i * 32768 + 32768),), digest
        )
        for i in range(count)
    ]  # fmt: skip


def test_every_event_is_given_back_and_every_call_told_once(rig):
    for _ in range(5):
        rig.decode(jobs(50))
    rig.close()
    assert [error for error, _ in rig.told] == [None] * 5
    assert rig.driver.events == set()


def test_chunks_that_take_no_staging_memory_leave_no_event_behind(rig):
    rig.decode(jobs(1, "raw"))
    before = len(rig.driver.events)
    for _ in range(20):
        rig.decode(jobs(1, "raw"))
    rig.decoder._stream.close()
    rig.link.close()
    assert len(rig.driver.events) <= before


@pytest.mark.parametrize("digest", [None, 1])
def test_whatever_event_is_refused_nothing_is_under_way_or_lost(rig, digest):
    rig.decode(jobs(50))
    for number in range(12):
        created = rig.driver.count("cuEventCreate") + number

        def is_next(name, last=created):
            return name == "cuEventCreate" and rig.driver.count(name) == last + 1

        rig.driver.refuse = is_next
        rig.driver.calls.append(("decode", ()))
        try:
            rig.decode(jobs(50, digest=digest))
        except DeviceError:
            names = [name for name, _ in rig.driver.calls]
            begun = len(names) - names[::-1].index("decode")
            waited = names.index("cuStreamSynchronize", begun)
            assert "cuLaunchKernel" not in names[waited:]
        rig.driver.refuse = lambda name: False
    rig.decoder._stream.close()
    assert len(rig.decoder._tables) == 64 * len(rig.decoder._slabs)
    rig.decoder._stream = CudaStream(rig.decoder._cuda)
    rig.close()
    assert rig.driver.events == set()
