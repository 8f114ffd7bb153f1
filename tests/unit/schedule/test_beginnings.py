import asyncio

import pytest

from sllm_node.schedule.beginnings import LIMIT_S, Beginnings
from tests.sim.loop import run


def now():
    return asyncio.get_running_loop().time()


async def told_after(beginnings):
    start = now()
    await beginnings.over()
    return now() - start


def test_nobody_waits_while_nothing_begins():
    async def play():
        beginnings = Beginnings()
        assert await told_after(beginnings) == 0
        beginnings.discard("never there")
        assert await told_after(beginnings) == 0

    run(play())


def test_what_can_wait_waits_for_the_last_beginning():
    async def play():
        beginnings = Beginnings()
        beginnings.add("a")
        beginnings.add("b")
        loop = asyncio.get_running_loop()
        loop.call_later(LIMIT_S / 4, beginnings.discard, "a")
        loop.call_later(LIMIT_S / 2, beginnings.discard, "b")
        assert await told_after(beginnings) == pytest.approx(LIMIT_S / 2)
        assert await told_after(beginnings) == 0

    run(play())


def test_a_slow_beginning_keeps_nobody_for_long():
    async def play():
        beginnings = Beginnings()
        beginnings.add("a")
        assert await told_after(beginnings) == pytest.approx(LIMIT_S)

    run(play())
