"""Steps of a module whose weights are on their way."""

import asyncio
import contextlib
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.errors import CancelledByOperatorError, ChecksumError, LoadFailedError
from sllm_node.core.types import ModelId, Part
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.arriving import Arriving, EarlyThreads, needs_of
from sllm_node.engine.decode_ops import ReferenceOps
from sllm_node.engine.skeleton import build_skeleton, layer_shapes
from sllm_node.engine.steps import Gate, StepThread
from tests.models import make_checkpoint
from tests.unit.engine.rig import Weights, ask, collect, engine_of, engines_of
from tests.unit.engine.test_families import SERVED

PROMPT = tuple(range(5, 25))


class Arrival:
    """Bytes that come when the test says so."""

    def __init__(self):
        self.end = 0
        self.error = None
        self.awaited = []
        self.is_waiting = threading.Event()
        self._changed = threading.Condition()

    def has(self, ends):
        return self.error is None and max(ends) <= self.end

    def wait(self, ends):
        with self._changed:
            self.awaited.append(max(ends))
            self.is_waiting.set()
            self._changed.wait_for(lambda: self.has(ends) or self.error)
            if self.error:
                raise self.error

    def come(self, end):
        with self._changed:
            self.end = end
            self.is_waiting.clear()
            self._changed.notify_all()

    def fail(self, error):
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def stop(self):
        self.fail(LoadFailedError(ModelId("m"), "stopped"))


class Prompt(Arrival):
    """What is waited for is there at once."""

    def wait(self, ends):
        self.come(max(ends))


class Coming(Weights):
    """Weights of which each byte is wrong until it comes."""

    def __init__(self, checkpoint, device):
        super().__init__(checkpoint, device)
        self.arrival = Arrival()
        self._whole = bytes(self.buffer.array)
        self.buffer.array[:] = 0xFF

    def come(self, end):
        begin = self.arrival.end
        self.buffer.array[begin:end] = torch.frombuffer(
            bytearray(self._whole[begin:end]), dtype=torch.uint8
        ).numpy()
        self.arrival.come(end)


@contextlib.asynccontextmanager
async def coming(checkpoint, clock=None, ops_of=None, **config):
    """Yield an engine and the weights that it waits for; at the end all is given back."""
    settings = EngineConfig(kv_cache_bytes=ByteSize(8 << 20), torch_threads=1, **config)
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, settings, clock, ops_of)
        weights = Coming(checkpoint, device)
        codec = await engines.load_codec(checkpoint.path)
        engine = await engines.open(weights, await engines.skeleton(checkpoint), codec)
        try:
            yield engine, weights, engines
        finally:
            await engine.close()
            assert engine.kv_usage == 0.0
            assert hooks_of(engine) == 0
            weights.buffer.close()
            engines.close()
        assert device.memory_used == 0


def hooks_of(engine):
    return sum(len(module._forward_pre_hooks) for module in engine._parts.model.modules())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


class Uses(TorchFunctionMode):
    """Compares the tensors that functions are given with what was waited for before."""

    def __init__(self, places, arrival):
        super().__init__()
        self.places, self.arrival, self.used = places, arrival, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for one in (*args, *(kwargs or {}).values()):
            if id(one) in self.places:
                name, end = self.places[id(one)]
                self.used.add(name)
                assert end <= self.arrival.end, f"{name} was used before it was there"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", SERVED)
def test_no_layer_of_any_architecture_uses_bytes_before_it_has_waited_for_them(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    index, model = checkpoint.index, build_skeleton(checkpoint.path)
    arrival = Prompt()
    threads = EarlyThreads(lambda: StepThread(ManualClock(), Gate(), 1))
    needs = needs_of(model, index, [Part("cpu", 0, index.size)])
    arriving = Arriving(needs, arrival, threads)
    places = {}
    tensors = model.state_dict(keep_vars=True)
    for entry in index.tensors:
        end = index.shard_base(entry.shard) + entry.offset + entry.size
        places[id(tensors[entry.name])] = (entry.name, end)
    uses = Uses(places, arrival)
    with uses:
        layer_shapes(model)  # by a forward pass over nothing
    assert len(uses.used) == len(places)
    ends = [max(ends) for _, ends in needs]
    assert len({end for end in ends if end < index.size}) >= model.config.num_hidden_layers
    arriving.end()
    arriving.steps.close()


async def test_the_first_layers_run_while_the_last_bytes_are_held_back(checkpoint):
    async with engine_of(checkpoint) as whole:
        wanted = await collect(whole.submit(ask(PROMPT)))
    async with coming(checkpoint) as (engine, weights, _):
        generation = engine.submit(ask(PROMPT))
        last = checkpoint.index.tensors[-1]
        size, ends = checkpoint.index.shard_base(last.shard) + last.offset + last.size, []
        while not ends or ends[-1] < size:
            await asyncio.to_thread(weights.arrival.is_waiting.wait)
            ends.append(weights.arrival.awaited[-1])
            assert not generation.tokens
            weights.come(ends[-1])
        assert ends == sorted(ends)
        assert len(ends) >= 4  # embedding, two layers, what follows them
        assert await collect(generation) == wanted


async def test_when_all_bytes_are_there_no_later_step_has_a_hook(checkpoint):
    async with coming(checkpoint) as (engine, weights, engines):
        generation = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        assert hooks_of(engine) > 0
        weights.come(checkpoint.index.size)
        first = await collect(generation)
        assert hooks_of(engine) == 0  # before anybody has said that the load has ended
        assert first[1] == (await collect(engine.submit(ask(PROMPT))))[1]
        assert (engines._early.taken, len(engines._early.all)) == (0, 1)


async def test_an_engine_without_sessions_gives_its_thread_back_when_the_load_has_ended(checkpoint):
    async with coming(checkpoint) as (engine, weights, engines):
        assert (hooks_of(engine) > 0, engines._early.taken) == (True, 1)
        weights.come(checkpoint.index.size)
        engine.loaded()
        while engine._arriving is not None:
            await asyncio.sleep(0)
        assert hooks_of(engine) == 0
        assert (engines._early.taken, len(engines._early.all)) == (0, 1)


async def test_a_step_that_waits_holds_up_no_other_model(checkpoint, tmp_path):
    other = make_checkpoint(tmp_path, "other", "qwen3")
    async with coming(checkpoint) as (engine, weights, engines):
        waiting = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        ready = Weights(other, engines._devices[0])
        codec = await engines.load_codec(other.path)
        beside = await engines.open(ready, await engines.skeleton(other), codec)
        assert len((await collect(beside.submit(ask(PROMPT))))[1]) == 12
        assert waiting.tokens == ()
        await beside.close()
        ready.buffer.close()
        weights.come(checkpoint.index.size)
        await collect(waiting)


async def test_a_step_that_waits_does_not_count_as_stalled(checkpoint):
    clock = ManualClock()
    async with coming(checkpoint, clock) as (engine, weights, engines):
        generation = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        clock.advance(10_000)
        assert engines.stalled() is None
        assert engine.stalled_s is None
        weights.come(checkpoint.index.size)
        await collect(generation)


async def test_a_step_that_hangs_after_its_wait_counts_as_stalled(checkpoint):
    clock, go_on = ManualClock(), threading.Event()
    async with coming(checkpoint, clock) as (engine, weights, engines):
        model = engine._parts.model
        hook = model.lm_head.register_forward_pre_hook(lambda *_: go_on.wait() and None)
        generation = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        clock.advance(10_000)
        weights.come(checkpoint.index.size)
        while engine._stepping.free_since() < 10_000 or engine._stepping._is_paused:
            await asyncio.sleep(0)
        clock.advance(120.5)
        stalled = engines.stalled()
        go_on.set()
        hook.remove()
        await collect(generation)
        assert stalled is not None
        assert stalled.models == ("m",)


@pytest.mark.parametrize("launch_ahead", ["never", "always"])
async def test_nothing_is_fused_or_launched_ahead_before_all_bytes_are_there(
    checkpoint, launch_ahead
):
    ops = {"ops_of": lambda device, longest: ReferenceOps(), "launch_ahead": launch_ahead}
    async with engine_of(checkpoint, **ops) as whole:
        wanted = [await collect(whole.submit(ask(PROMPT[:n]))) for n in (1, 20)]
    async with coming(checkpoint, **ops) as (engine, weights, _):
        alone = engine.submit(ask(PROMPT[:1]))  # a step like any that decodes
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        beside = engine.submit(ask(PROMPT))
        assert engine._runner.decode is None
        assert len(engine._flight) == 1
        weights.come(checkpoint.index.size)
        engine.loaded()
        assert [await collect(alone), await collect(beside)] == wanted
        assert engine._runner.decode is engine._parts.decode is not None


async def test_what_was_launched_before_a_load_failed_has_ended_before_anybody_is_told(checkpoint):
    async with coming(checkpoint) as (engine, weights, engines):
        checked = []
        engines._devices[0].check = lambda: checked.append(engine._broken)
        generation = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        weights.arrival.fail(LoadFailedError(ModelId("m"), "the disk is gone"))
        with pytest.raises(LoadFailedError):
            await collect(generation)
        assert checked == [None]


async def test_a_load_that_fails_ends_the_sessions_with_its_error(checkpoint):
    async with coming(checkpoint) as (engine, weights, _):
        first, second = engine.submit(ask(PROMPT)), engine.submit(ask(PROMPT[:3]))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        error = ChecksumError(ModelId("m"), "shard-00000.bin", 0, 4096, ("t",))
        weights.arrival.fail(error)
        for generation in (first, second):
            with pytest.raises(ChecksumError):
                await collect(generation)
        with pytest.raises(ChecksumError):
            engine.submit(ask(PROMPT))


async def test_closing_an_engine_ends_the_step_that_waits(checkpoint):
    async with coming(checkpoint) as (engine, weights, engines):
        generation = engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        await engine.close()
        with pytest.raises(CancelledByOperatorError):
            await collect(generation)
        assert len(engines._kept) == 1


async def test_a_session_cancelled_while_it_waits_leaves_the_others_alone(checkpoint):
    async with engine_of(checkpoint) as whole:
        wanted = await collect(whole.submit(ask(PROMPT)))
    async with coming(checkpoint) as (engine, weights, _):
        gone, stays = engine.submit(ask(PROMPT[:7])), engine.submit(ask(PROMPT))
        await asyncio.to_thread(weights.arrival.is_waiting.wait)
        gone.cancel()
        weights.come(checkpoint.index.size)
        assert await collect(stays) == wanted


def test_a_job_alone_runs_while_a_shared_one_has_left_the_gate():
    gate, log = Gate(), []
    left, done = threading.Event(), threading.Event()

    def shared():
        with gate.shared():
            with gate.left():
                left.set()
                done.wait()
            log.append("shared")

    thread = threading.Thread(target=shared)
    thread.start()
    left.wait()
    with gate.alone():
        done.set()
        log.append("alone")
    thread.join()
    assert log == ["alone", "shared"]
