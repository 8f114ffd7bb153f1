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


async def started(node, body, count=8):
    """Begin to read a stream; return its task when so many events have come."""
    reached = asyncio.Event()

    def at(seen):
        if seen == count:
            reached.set()

    reading = asyncio.create_task(nodes.Streamed().read(node.url, body, at))
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait([reading, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if reading.done():
        reading.result()
    return reading


async def test_a_drained_node_gives_its_sessions_away_and_no_stream_is_dropped(trio):
    a, b, _ = trio
    for node in trio:
        await nodes.sees(node, "a", "b", "c")
    bodies = [ask(f"Question {i}", 440 + i, **SAMPLED) for i in range(6)]
    wanted = [await nodes.Streamed().read(b.url, body) for body in bodies]
    tasks = [await started((a, b)[i % 2], body) for i, body in enumerate(bodies)]
    b.terminate()
    for task, body, unmoved in zip(tasks, bodies, wanted, strict=True):
        found = await task
        assert (found.text, found.tokens) == (unmoved.text, unmoved.tokens)
        assert found.usage["completion_tokens"] == body["max_tokens"]
    assert await asyncio.to_thread(b.wait) == 0
    assert nodes.events(b, "drained")[0]["sessions_ended"] == 0
    for node in (a, b):  # a has readers of sessions that b served, and b has some of its own
        ended = nodes.events(node, "session move ended")
        assert {(e["reason"], e["node"]) for e in ended} == {("drain", "b")}
        assert "moved" in {e["outcome"] for e in ended}


async def test_moves_that_can_not_be_are_refused_with_a_reason(trio):
    a, _, _ = trio
    await nodes.sees(a, "b", "c")
    reading = await started(a, ask("Hello there", 450))
    session, at = await only_session(a)
    for who, to in [(session, "nowhere"), (session, at), ("none-0", "b")]:
        status, told = await move(a, who, to)
        assert (status, told["error"]["code"]) == (409, "move_refused"), told
    other = next(name for name in "bc" if name != at)
    assert (await move(a, session, other))[0] == 200
    assert (await reading).usage["completion_tokens"] == 450


async def test_a_reader_that_goes_away_during_a_move_leaves_nothing_behind(trio):
    a, _, _ = trio
    await nodes.sees(a, "b", "c")
    body = ask("Hello there", 450, stream=True)
    async with (
        aiohttp.ClientSession() as http,
        http.post(a.url + "/v1/completions", json=body) as response,
    ):
        await response.content.readline()
        session, at = await only_session(a)
        assert (await move(a, session, next(n for n in "bc" if n != at)))[0] == 200
    for node in trio:
        await nodes.until(node.url, "/admin/status", quiet)


@pytest.mark.parametrize("victim", ["source", "destination"])
async def test_a_node_killed_during_a_move_costs_no_token(trio, victim):
    a, b, c = trio
    await nodes.sees(a, "b", "c")
    body = ask("Hello there", 460, **SAMPLED)
    unmoved = await nodes.Streamed().read(b.url, body)
    reading = await started(a, body)
    session, at = await only_session(a)
    to = "b"
    if at != "c":  # so that neither end is the reader's node
        await elsewhere(a, random.Random(1), [at, "c"])
    by_name = {"b": b, "c": c}
    assert (await move(a, session, to))[0] == 200
    by_name["c" if victim == "source" else to].process.kill()
    found = await reading
    assert (found.text, found.tokens) == (unmoved.text, unmoved.tokens)
    assert found.usage["completion_tokens"] == 460
    await nodes.until(a.url, "/admin/status", quiet)
