"""Running sessions that change their node: moved, drained, or their nodes killed in the middle."""

import asyncio
import random

import aiohttp
import pytest

from tests.e2e import cluster_nodes as nodes
from tests.models import make_checkpoint

SAMPLED = {
    "temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3,
}  # fmt: skip


def ask(prompt, tokens, **more):
    body = {"model": "alpha", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**body, "ignore_eos": True, "logprobs": 1, **more}


@pytest.fixture
def trio(tmp_path):
    """Three nodes with the same model; readers come to a."""
    file = nodes.make_cluster(tmp_path / "shared", ["a", "b", "c"])
    store = tmp_path / "store"
    store.mkdir()
    make_checkpoint(store, "alpha", family="llama", seed=3, chunk_bytes=65536)
    made = [nodes.made(tmp_path, name, store, file) for name in "abc"]
    with nodes.running(*made) as trio:
        yield trio


async def only_session(node):
    """Return the id of the one session that `node` has, and where it runs."""

    def holds(report):
        return [s for s in report["sessions"] if s["state"] == "running"]

    (found,) = (await nodes.until(node.url, "/admin/status", holds))["sessions"]
    return found["session"], found["node"] or node.folder.name


async def move(node, session, to):
    return await nodes.post(node.url, f"/admin/sessions/{session}/move", {"to": to})


async def elsewhere(node, rng, names="abc"):
    """Move the one session of `node` to another node; wait until it is there."""
    session, at = await only_session(node)
    to = rng.choice([name for name in names if name != at])
    status, told = await move(node, session, to)
    assert status == 200, told
    ended = "session move ended"
    async with asyncio.timeout(30):
        while not any(e["migration"] == told["migration"] for e in nodes.events(node, ended)):
            await nodes.get(node.url, "/livez")
    return told["migration"]


def quiet(report):
    return not report["sessions"] and not any(model["running"] for model in report["models"])


@pytest.mark.parametrize("more", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_a_session_that_moves_again_and_again_gives_the_tokens_of_the_unmoved(trio, more):
    a, b, c = trio
    await nodes.sees(a, "b", "c")
    body = ask("Hello there", 470, **more)
    unmoved = await nodes.Streamed().read(b.url, body)
    rng = random.Random(5)
    moving = []

    def at(count):
        if count == 5:
            moving.append(asyncio.create_task(several()))

    async def several():
        return [await elsewhere(a, rng) for _ in range(3)]

    moved = await nodes.Streamed().read(a.url, body, at)
    ids = await moving[0]
    assert (moved.text, moved.tokens, moved.finish) == (unmoved.text, unmoved.tokens, "length")
    assert moved.usage["completion_tokens"] == 470
    ended = {e["migration"]: e for e in nodes.events(a, "session move ended")}
    assert [ended[name]["outcome"] for name in ids] == ["moved"] * 3
    taken = [e["migration"] for n in (b, c) for e in nodes.events(n, "forwarded session taken")
             if "migration" in e]  # fmt: skip
    assert set(taken) <= set(ids)
    assert taken
    for node in trio:
        await nodes.until(node.url, "/admin/status", quiet)
    told = (await nodes.get(a.url, "/admin/status"))["cluster"]["migrations"]
    assert {m["id"] for m in told} >= set(ids)
