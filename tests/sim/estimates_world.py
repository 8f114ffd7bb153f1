"""Nodes on virtual time whose loads share links, and sessions that come at random: for startup estimates.

Used by the test beside this and by `scripts/bench/estimates_simulated.py`.
"""

import asyncio
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.sim.cluster_world import World, read
from tests.sim.loop import run

BYTES_S, BESIDE_S = 1.0, 0.5
"""What a load takes of its node's link alone, and beside its bytes."""
GRAIN_S = 0.02
MODELS, ROOM = 16, 2
WARM = 40
"""Requests whose estimates do not count."""


class Link:
    """Loads side by side have equal shares of it."""

    def __init__(self):
        self.under_way = 0

    async def carry(self, seconds):
        self.under_way += 1
        try:
            while seconds > 0:
                await asyncio.sleep(GRAIN_S)
                seconds -= GRAIN_S / self.under_way
        finally:
            self.under_way -= 1


def share_a_link(store):
    """Let the loads of a node take what their bytes and the rest of them take."""
    link, took, bring, acquire = Link(), {}, store.bring, store.acquire

    async def over_the_link(model, _):
        begun = asyncio.get_running_loop().time()
        await link.carry(BYTES_S)
        took[model] = asyncio.get_running_loop().time() - begun
        await bring(model, BESIDE_S)

    async def acquired(model, placement, *, early):
        lease = await acquire(model, placement, early=early)
        lease.report = replace(lease.report, elapsed_s=took[model])
        return lease

    store.bring, store.acquire = over_the_link, acquired


async def play(root, seed, gap_s, count):
    """Run sessions that come at random, for models that don't fit the devices."""
    draw = random.Random(seed)
    models = [f"m{i}" for i in range(MODELS)]
    nodes = {name: [] for name in "abcd"}
    for model in models:
        for name in draw.sample("abcd", draw.randint(1, 3)):
            nodes[name].append(model)
    world = World(root, nodes, ROOM)
    for node in world.nodes.values():
        share_a_link(node.rig.store)
    await asyncio.sleep(3.0)
    weights = [1 / (rank + 1) for rank in range(MODELS)]
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            await asyncio.sleep(draw.expovariate(1 / gap_s))
            (model,) = draw.choices(models, weights)
            stream = world.open(draw.choice("abcd"), model, draw.randint(3, 60))
            group.create_task(read(stream))
    await world.close()


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append(record)


def estimates(root: Path, seed: int, gap_s: float, count: int) -> list[Any]:
    """Play, and return what is told of each session that started, those that warm up apart."""
    log, lines = logging.getLogger("sllm_node.cluster.placing"), Lines()
    level = log.level
    root.mkdir(exist_ok=True)
    log.addHandler(lines)
    log.setLevel(logging.DEBUG)
    try:
        run(play(root, seed, gap_s, count))
    finally:
        log.setLevel(level)
        log.removeHandler(lines)
    return [r for r in lines.records if r.getMessage() == "session started"][WARM:]


def is_good(line: Any) -> bool:
    """Tell whether an estimate was within a fifth, or 5 ms."""
    gap_s = abs(line.startup_s - line.expected_s)
    return bool(gap_s <= max(0.005, 0.2 * line.startup_s))
