"""Running sessions that change their node: moved, drained, or their nodes killed in the middle."""

import asyncio
import random
import shutil

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


@pytest.fixture(scope="module")
def started_trio(tmp_path_factory):
    """Three nodes with the same model; readers come to a."""
    place = tmp_path_factory.mktemp("migration")
    file = nodes.make_cluster(place / "shared", ["a", "b", "c"])
    store = place / "store"
    store.mkdir()
    make_checkpoint(store, "alpha", family="llama", seed=3, chunk_bytes=65536)
    made = [nodes.made(place, name, store, file, drain_s=120.0, braked=True) for name in "abc"]
    with nodes.running(*made) as trio:
        yield trio


@pytest.fixture
async def trio(started_trio):
    """The nodes, all of them up, without sessions, their logs as if they began here."""
    for node in started_trio:
        if node.process.poll() is not None:
            await asyncio.to_thread(node.start_again)
    for node in (
        *started_trio,
        *started_trio,
    ):  # the second time it is no earlier life that is seen
        await nodes.sees(node, "a", "b", "c")
    for node in started_trio:
        await nodes.until(node.url, "/admin/status", quiet)
        node.mark()
    yield started_trio
    nodes.release(*started_trio)


def at_node(session, node):
    """Return where a session that `node` tells of is served."""
    return session["node"] or node.folder.name


async def only_session(node):
    """Return the id of the one session that `node` has, and where it runs."""

    def holds(report):
        return [s["state"] for s in report["sessions"]] == ["running"]

    (found,) = (await nodes.until(node.url, "/admin/status", holds))["sessions"]
    return found["session"], at_node(found, node)


async def move(node, session, to):
    return await nodes.post(node.url, f"/admin/sessions/{session}/move", {"to": to})


async def moved(node, session, to):
    """Move a session of `node`; wait until it is there, and return the name of the migration."""
    status, told = await move(node, session, to)
    assert status == 200, told
    name = told["migration"]
    ended = await nodes.logged(node, "session move ended", lambda e: e["migration"] == name)
    assert ended["outcome"] == "moved", ended
    return name


def quiet(report):
    return not report["sessions"] and not any(model["running"] for model in report["models"])


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
        raise AssertionError("the session has ended already")
    return reading


@pytest.mark.parametrize("more", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_a_session_that_moves_again_and_again_gives_the_tokens_of_the_unmoved(trio, more):
    a, b, c = trio
    body = ask("Hello there", 470, **more)
    unmoved = await nodes.Streamed().read(b.url, body)
    nodes.brake(*trio)
    reading = await started(a, body)
    session, at = await only_session(a)
    rng, ids = random.Random(5), []
    for _ in range(3):
        at = rng.choice([name for name in "abc" if name != at])
        ids.append(await moved(a, session, at))
    nodes.release(*trio)
    found = await reading
    assert (found.text, found.tokens, found.finish) == (unmoved.text, unmoved.tokens, "length")
    assert found.usage["completion_tokens"] == 470
    taken = [e["migration"] for n in (b, c) for e in n.events("forwarded session taken")
             if "migration" in e]  # fmt: skip
    assert set(taken) <= set(ids)
    assert taken
    for node in trio:
        await nodes.until(node.url, "/admin/status", quiet)
    told = (await nodes.get(a.url, "/admin/status"))["cluster"]["migrations"]
    assert {m["id"] for m in told} >= set(ids)


async def test_moves_that_can_not_be_are_refused_with_a_reason(trio):
    a, _, _ = trio
    nodes.brake(*trio)
    reading = await started(a, ask("Hello there", 450))
    session, at = await only_session(a)
    for who, to in [(session, "nowhere"), (session, at), ("none-0", "b")]:
        status, told = await move(a, who, to)
        assert (status, told["error"]["code"]) == (409, "move_refused"), told
    other = next(name for name in "bc" if name != at)
    assert (await move(a, session, other))[0] == 200
    nodes.release(*trio)
    assert (await reading).usage["completion_tokens"] == 450


async def test_a_reader_that_goes_away_during_a_move_leaves_nothing_behind(trio):
    a, _, _ = trio
    nodes.brake(*trio)
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
    body = ask("Hello there", 460, **SAMPLED)
    unmoved = await nodes.Streamed().read(b.url, body)
    nodes.brake(*trio)
    reading = await started(a, body)
    session, at = await only_session(a)
    if at != "c":  # so that neither end is the reader's node
        await moved(a, session, "c")
    assert (await move(a, session, "b"))[0] == 200
    (c if victim == "source" else b).process.kill()
    nodes.release(*trio)
    found = await reading
    assert (found.text, found.tokens) == (unmoved.text, unmoved.tokens)
    assert found.usage["completion_tokens"] == 460
    await nodes.until(a.url, "/admin/status", quiet)


async def test_a_drained_node_gives_its_sessions_away_and_no_stream_is_dropped(trio):
    a, b, _ = trio
    bodies = [ask(f"Question {i}", 440 + i, **SAMPLED) for i in range(6)]
    wanted = [await nodes.Streamed().read(b.url, body) for body in bodies]
    nodes.brake(*trio)
    tasks, known = [], set()
    for node, asked in ((b, bodies[:3]), (a, bodies[3:])):
        tasks += [await started(node, body) for body in asked]
        sessions = (await nodes.get(node.url, "/admin/status"))["sessions"]
        own = [session for session in sessions if session["session"] not in known]
        known |= {session["session"] for session in own}
        if not any(at_node(session, node) == "b" for session in own):
            await moved(node, own[0]["session"], "b")
    b.terminate()
    for node in (a, b):
        ended = await nodes.logged(node, "session move ended", lambda e: e["reason"] == "drain")
        assert (ended["outcome"], ended["node"]) == ("moved", "b")
    nodes.release(*trio)
    for task, body, unmoved in zip(tasks, bodies, wanted, strict=True):
        found = await task
        assert (found.text, found.tokens) == (unmoved.text, unmoved.tokens)
        assert found.usage["completion_tokens"] == body["max_tokens"]
    assert await asyncio.to_thread(b.wait) == 0
    assert b.events("drained")[0]["sessions_ended"] == 0
    for node in (a, b):
        drained = [e for e in node.events("session move ended") if e["reason"] == "drain"]
        assert {e["node"] for e in drained} == {"b"}


@pytest.fixture
def example(tmp_path):
    """Make the paper's nodes: b lies on two only, which has room for one model; one gets a, and has readers."""
    file = nodes.make_cluster(tmp_path / "shared", ["one", "two"])
    file.write_text(file.read_text() + "[limits]\npeer_bandwidth = 0\n")
    stores = [tmp_path / "store-1", tmp_path / "store-2"]
    for name, seed in (("a", 3), ("b", 4)):
        make_checkpoint(stores[1], name, seed=seed, chunk_bytes=65536)
    shutil.copytree(stores[1] / "a", tmp_path / "a")
    stores[0].mkdir()
    room = {"memory_bytes": 2 << 20}  # each takes half a MiB, and one MiB for its sessions
    with nodes.running(
        nodes.made(tmp_path, "one", stores[0], file, braked=True, **room),
        nodes.made(tmp_path, "two", stores[1], file, braked=True, **room),
    ) as example:
        yield example


async def act(node, model, *verbs):
    for verb in verbs:
        assert (await nodes.post(node.url, f"/admin/models/{model}/{verb}", {}))[0] == 200


def has(report, name, model, on_device=False):
    """Tell whether a node knows that one has a model, and whether on its device."""
    (there,) = [node for node in report["cluster"]["nodes"] if node["id"] == name]
    return [found["device"] for found in there["models"] if found["id"] == model] == [on_device]


async def test_a_model_starts_from_dram_where_another_runs_whose_reader_sees_one_gap(
    example, tmp_path
):
    one, two = example
    await nodes.sees(one, "two")
    body = ask("Hello there", 470, model="a")
    await act(two, "b", "load", "unload")
    unmoved = await nodes.Streamed().read(one.url, body)
    nodes.brake(one, two)
    reading = await started(one, body)
    assert nodes.serving(one, two) is two  # nobody else has the model yet
    shutil.move(tmp_path / "a", tmp_path / "store-1" / "a")
    await act(one, "a", "load", "unload")
    await nodes.until(one.url, "/admin/status", lambda report: has(report, "one", "a"))
    await nodes.until(one.url, "/admin/status", lambda report: has(report, "two", "a", True))
    status, told = await nodes.post(one.url, "/v1/completions", ask("Hi", 5, model="b"))
    assert (status, told["usage"]["completion_tokens"]) == (200, 5)
    load = two.events("load finished")[-1]
    assert (load["model"], load["bytes_from_nvme"]) == ("b", 0)
    ended = await nodes.logged(one, "session move ended")
    nodes.release(one, two)
    found = await reading
    assert (found.text, found.tokens) == (unmoved.text, unmoved.tokens)
    (left,) = two.events("sessions have left")
    assert (left["outcome"], left["sessions"], left["to"]) == ("freed", 1, ["one"])
    assert len(one.events("session move ended")) == 1
    assert [ended[key] for key in ("outcome", "reason", "node", "to", "vacate")] == [
        "moved", "placement", "two", "one", left["vacate"],
    ]  # fmt: skip
    for node in example:
        await nodes.until(node.url, "/admin/status", quiet)
