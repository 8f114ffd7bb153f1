import asyncio

from sllm_node.core import log
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import MonotonicClock


async def test_an_alarm_that_a_request_has_set_does_not_ring_in_its_name():
    rung = asyncio.Event()
    names = []

    def ring():
        names.append(log.request_id.get())
        rung.set()

    alarm = Alarm(MonotonicClock(), ring)
    token = log.request_id.set("r-1")
    try:
        alarm.set(0.0)
    finally:
        log.request_id.reset(token)
    await rung.wait()
    assert names == [None]
