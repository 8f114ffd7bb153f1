import asyncio
import functools
import logging
import threading

import pytest

from sllm_node.core.clock import ManualClock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.engine.stall import StallWatch
from tests.models import make_checkpoint
from tests.sim.loop import LoopClock, run
from tests.unit.engine.rig import ask, collect, engine_and_engines_of


class Rig:
    """A watch on virtual time."""

    def __init__(self, limit_s=60.0):
        self.metrics = Metrics()
        self.loaded_at = float("-inf")
        gauge = self.metrics.engine_stalled.labels("m")
        self.watch = StallWatch(
            ModelId("m"), limit_s, LoopClock(), gauge,
            sessions=lambda: (2, 1), free_since=lambda: self.loaded_at,
        )  # fmt: skip

    @property
    def gauge(self):
        return self.metrics.registry.get_sample_value("sllm_engine_stalled", {"model": "m"})


def on_virtual_time(test):
    @functools.wraps(test)
    def wrapper(caplog):
        caplog.set_level(logging.INFO)
        run(test(caplog))

    return wrapper


@on_virtual_time
async def test_work_without_a_step_that_ends_is_told_once(caplog):
    rig = Rig()
    rig.watch.work()
    rig.watch.began(3, 17)
    await asyncio.sleep(60.0)
    assert (rig.watch.stalled_s, rig.gauge) == (None, 0.0)
    await asyncio.sleep(300.0)
    assert (rig.watch.stalled_s, rig.gauge) == (360.0, 1.0)
    (record,) = caplog.records
    assert (record.message, record.levelname) == ("engine stalled", "ERROR")
    told = (record.model, record.running, record.waiting, record.step_sessions, record.step_tokens)
    assert told == ("m", 2, 1, 3, 17)
    assert 60.0 < record.seconds < 61.0
    assert "'m' has had work for 360 s" in rig.watch.describe()
    assert "the step under way has 3 sessions and 17 tokens" in rig.watch.describe()


@on_virtual_time
async def test_it_recovers_when_the_step_ends_and_can_stall_again(caplog):
    rig = Rig()
    rig.watch.work()
    rig.watch.began(1, 1)
    await asyncio.sleep(90.0)
    rig.watch.ended()
    assert (rig.watch.stalled_s, rig.gauge) == (None, 0.0)
    rig.watch.began(1, 1)
    await asyncio.sleep(90.0)
    assert rig.gauge == 1.0
    told = ["engine stalled", "engine moves again", "engine stalled"]
    assert [record.message for record in caplog.records] == told
    assert caplog.records[1].seconds == 90.0


@on_virtual_time
async def test_steps_that_end_in_time_are_no_stall_however_long_the_work_lasts(caplog):
    rig = Rig()
    rig.watch.work()
    for _ in range(20):
        rig.watch.began(1, 1)
        await asyncio.sleep(50.0)
        rig.watch.work()
        rig.watch.ended()
    assert not caplog.records


@on_virtual_time
async def test_rest_is_no_stall_and_leaves_no_timer(caplog):
    rig = Rig()
    rig.watch.work()
    rig.watch.rest()
    await asyncio.sleep(1000.0)
    assert rig.watch.stalled_s is None
    rig.watch.work()
    await asyncio.sleep(50.0)
    assert not caplog.records
    rig.watch.rest()


@on_virtual_time
async def test_what_waits_and_is_never_admitted_is_a_stall(caplog):
    rig = Rig()
    rig.watch.work()
    await asyncio.sleep(90.0)
    assert rig.gauge == 1.0
    assert "its last step has 0 sessions" in rig.watch.describe()
    rig.watch.rest()  # who waited went away
    assert (rig.watch.stalled_s, rig.gauge) == (None, 0.0)


@on_virtual_time
async def test_while_a_model_is_loaded_the_time_does_not_count(caplog):
    rig = Rig()
    rig.watch.work()
    await asyncio.sleep(100.0 - 60.0)
    rig.loaded_at = 40.0
    await asyncio.sleep(50.0)
    assert not caplog.records
    await asyncio.sleep(11.0)
    assert rig.gauge == 1.0


@on_virtual_time
async def test_a_limit_of_0_never_tells(caplog):
    rig = Rig(limit_s=0.0)
    rig.watch.work()
    rig.watch.began(1, 1)
    await asyncio.sleep(10_000.0)
    assert (rig.watch.stalled_s, rig.gauge, caplog.records) == (None, 0.0, [])


# --- in an engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


class Hang:
    """A job that hangs until it is told to go on."""

    def __init__(self, job=lambda *_: None):
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._go_on = threading.Event()
        self.begun = asyncio.Event()

    def __call__(self, *values):
        self._loop.call_soon_threadsafe(self.begun.set)
        self._go_on.wait()
        return self._job(*values)

    def go_on(self):
        self._go_on.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go_on()


async def test_an_engine_whose_step_hangs_is_stalled_until_it_ends(checkpoint):
    clock = ManualClock()
    async with engine_and_engines_of(checkpoint, clock, stall_after_s=5.0) as (engine, engines):
        await collect(engine.submit(ask((5, 6), 3)))
        clock.advance(100.0)
        assert engines.stalled() is None
        with Hang(engine._runner.advance) as hang:
            engine._runner.advance = hang
            generation = engine.submit(ask((5, 6, 7), 3))
            await hang.begun.wait()
            clock.advance(5.0)
            assert engines.stalled() is None
            clock.advance(1.0)
            stall = engines.stalled()
            assert stall.models == ("m",)
            assert "'m' has had work for 6 s" in stall.reason
            assert "1 sessions run, 0 wait, the step under way has 1 sessions and 3" in stall.reason
            generation.cancel()  # its client gave up: the step hangs as before
            assert engine.stalled_s == 6.0
        await collect(engine.submit(ask((5, 6), 3)))
        assert (engines.stalled(), engine.stalled_s) == (None, None)


async def test_a_step_that_waits_for_a_load_is_no_stall(checkpoint):
    clock = ManualClock()
    async with engine_and_engines_of(checkpoint, clock, stall_after_s=5.0) as (engine, engines):
        with Hang() as hang:
            building = asyncio.create_task(engines._builder.run_alone(hang))
            await hang.begun.wait()
            generation = engine.submit(ask((5, 6, 7), 3))
            await asyncio.sleep(0)
            clock.advance(1000.0)
            assert engines.stalled() is None
        await building
        assert engines.stalled() is None
        await collect(generation)


async def test_a_closed_engine_is_not_stalled(checkpoint):
    clock = ManualClock()
    async with engine_and_engines_of(checkpoint, clock, stall_after_s=5.0) as (engine, engines):
        generation = engine.submit(ask((5, 6, 7), 300))
        await anext(generation)
        await engine.close()
        clock.advance(1000.0)
        assert engines.stalled() is None
