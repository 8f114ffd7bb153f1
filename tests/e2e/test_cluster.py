"""Nodes that share a cluster file: any of them serves the models of all, whatever becomes of the others."""

import asyncio

import aiohttp
import pytest

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.verify import verify
from tests.e2e import cluster_nodes as nodes
from tests.models import make_checkpoint


def ask(model, prompt="Hello there", tokens=24, **more):
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "logprobs": 1, **more,
    }  # fmt: skip


async def answer(node, body):
    status, found = await nodes.post(node.url, "/v1/completions", body)
    assert status == 200, found
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Node a has alpha, node b has beta."""
    place = tmp_path_factory.mktemp("cluster")
    file = nodes.make_cluster(place / "shared", ["a", "b"])
    for seed, (name, model, family) in enumerate([("a", "alpha", "llama"), ("b", "beta", "gpt2")]):
        (place / f"store-{name}").mkdir()
        make_checkpoint(place / f"store-{name}", model, family=family, seed=seed, chunk_bytes=65536)
    made = [
        nodes.made(place, name, place / f"store-{name}", file, braked=True) for name in ("a", "b")
    ]
    with nodes.running(*made) as pair:
        yield pair


async def test_a_model_of_another_node_is_answered_with_the_same_tokens(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    through, direct = await answer(a, ask("beta")), await answer(b, ask("beta"))
    assert through["choices"] == direct["choices"]
    assert through["usage"]["completion_tokens"] == direct["usage"]["completion_tokens"] == 24
    (taken,) = b.events("forwarded session taken")
    placed = a.events("request placed")[-1]
    assert (taken["entry"], placed["node"]) == ("a", "b")
    assert taken["request"] == placed["request"]
    assert taken["why"] == placed["why"]


async def test_models_of_all_nodes_are_listed_by_each(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    await nodes.sees(b, "a", "b")
    for node in pair:
        listed = await nodes.get(node.url, "/v1/models")
        assert [model["id"] for model in listed["data"]] == ["alpha", "beta"]


async def test_usage_and_tokens_of_a_stream_come_through(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    whole = await answer(b, ask("beta", tokens=40))
    streamed = await nodes.Streamed().read(a.url, ask("beta", tokens=40))
    assert streamed.text == whole["choices"][0]["text"]
    assert streamed.tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert streamed.usage["completion_tokens"] == 40
    assert streamed.usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]


async def test_what_the_serving_node_refuses_is_told_as_it_would_be_directly(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    body = ask("beta", tokens=100_000)
    through = await nodes.post(a.url, "/v1/completions", body)
    assert through == await nodes.post(b.url, "/v1/completions", body)
    assert through[0] == 400


def is_quiet(report):
    return not report["sessions"] and not any(model["running"] for model in report["models"])


async def test_a_client_that_goes_away_ends_the_session_on_the_other_node(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    b.brake()
    body = ask("beta", tokens=400, stream=True)
    async with (
        aiohttp.ClientSession() as http,
        http.post(a.url + "/v1/completions", json=body) as r,
    ):
        await r.content.readline()
    for node in pair:
        await nodes.until(node.url, "/admin/status", is_quiet)
    b.release()


async def test_placement_is_explained_with_all_estimates(pair):
    a, _ = pair
    await nodes.sees(a, "a", "b")
    told = await nodes.get(a.url, "/admin/placement?model=beta")
    assert told["node"] == "b"
    ways = {candidate["node"]: candidate["source"] for candidate in told["candidates"]}
    assert ways["a"] == "peer"
    assert ways.keys() == {"a", "b"}
    unknown = await nodes.get(a.url, "/admin/placement?model=none")
    assert unknown["error"]["code"] == "model_not_found"


async def test_a_wrong_cluster_file_is_refused_and_the_old_one_stays(pair):
    a, _ = pair
    await nodes.sees(a, "a", "b")
    file = a.config.parent.parent / "shared" / "cluster.toml"
    good = file.read_text()
    file.write_text(good + "[[nodes]]\nid = 7\n")
    try:
        a.process.send_signal(1)
        await nodes.logged(a, "cluster file refused, the old one stays")
    finally:
        file.write_text(good)
    assert (await answer(a, ask("beta")))["usage"]["completion_tokens"] == 24


def has_drained(report):
    return any(node["id"] == "a" and node["draining"] for node in report["cluster"]["nodes"])


async def test_a_model_of_a_node_that_drains_is_loaded_from_it(pair):
    """The last one for this pair: node a takes no requests from here on."""
    a, b = pair
    await nodes.sees(b, "a")
    there = await answer(a, ask("alpha"))
    store = b.config.parent.parent / "store-b"
    await nodes.post(a.url, "/admin/drain", {})
    await nodes.until(b.url, "/admin/status", has_drained)
    here = await answer(b, ask("alpha"))
    assert here["choices"] == there["choices"]
    await nodes.until(b.url, "/admin/status", lambda _: (store / "alpha").is_dir())
    assert verify(open_checkpoint(store / "alpha")) == []


def has_some(report):
    return any(
        m["bytes_by_tier"].get("dram", 0) > 0 for m in report["models"] if m["id"] == "alpha"
    )


async def test_a_load_whose_only_sender_is_killed_goes_on_when_that_is_back(tmp_path):
    """Node b has alpha, and no room to serve it."""
    file = nodes.make_cluster(tmp_path / "shared", ["a", "b"])
    stores = {name: tmp_path / f"store-{name}" for name in ("a", "b")}
    for store in stores.values():
        store.mkdir()
    make_checkpoint(stores["b"], "alpha", family="llama", seed=4, chunk_bytes=65536)
    a = nodes.made(tmp_path, "a", stores["a"], file, braked=True)
    b = nodes.made(
        tmp_path, "b", stores["b"], file, braked=True, memory_bytes=nodes.KV_BYTES + 4096
    )
    with nodes.running(a, b):
        await nodes.sees(a, "b")
        b.hold()
        first = asyncio.create_task(nodes.Streamed().read(a.url, ask("alpha")))
        await nodes.until(a.url, "/admin/status", has_some)
        second = asyncio.create_task(nodes.Streamed().read(a.url, ask("alpha")))
        await nodes.until(a.url, "/admin/status", lambda found: len(found["sessions"]) == 2)
        b.process.kill()
        await nodes.logged(a, "load failed")
        b.release()
        await asyncio.to_thread(b.start_again)
        answers = [await first, await second]
        there = await answer(a, ask("alpha"))
    assert [found.text for found in answers] == [there["choices"][0]["text"]] * 2
    assert len(a.events("session lost its node")) == 2
    assert verify(open_checkpoint(stores["a"] / "alpha")) == []


@pytest.fixture
def trio(tmp_path):
    """Node a has no model; b and c have alpha."""
    file = nodes.make_cluster(tmp_path / "shared", ["a", "b", "c"], trust="tls")
    stores = {name: tmp_path / f"store-{name}" for name in ("a", "b", "c")}
    for name, store in stores.items():
        store.mkdir()
        if name != "a":
            make_checkpoint(store, "alpha", family="llama", seed=3, chunk_bytes=65536)
    made = [nodes.made(tmp_path, name, store, file, braked=True) for name, store in stores.items()]
    with nodes.running(*made) as trio:
        yield trio


async def test_a_session_whose_node_dies_goes_on_elsewhere_with_the_same_tokens(trio):
    a, b, c = trio
    await nodes.sees(a, "b", "c")
    body = ask("alpha", tokens=450)
    unmoved = await nodes.Streamed().read(b.url, body)
    nodes.brake(b, c)
    killed = []

    def kill(count):
        if count == 10:
            killed.append(nodes.serving(a, b, c))
            killed[0].process.kill()
            nodes.release(b, c)

    moved = await nodes.Streamed().read(a.url, body, kill)
    assert a.events("session lost its node")
    assert (moved.text, moved.tokens) == (unmoved.text, unmoved.tokens)
    assert (moved.finish, moved.usage["completion_tokens"]) == ("length", 450)
    (survivor,) = {b, c} - set(killed)
    resumed = [line["resumed"] for line in survivor.events("forwarded session taken")]
    assert 0 < resumed[-1] < 450


@pytest.mark.slow
async def test_no_stream_loses_a_token_while_nodes_are_killed_and_started_again(tmp_path):
    models = {"alpha": "llama", "beta": "gpt2", "gamma": "qwen3"}
    file = nodes.make_cluster(tmp_path / "shared", ["a", "b", "c", "d"])
    store, empty = tmp_path / "store", tmp_path / "empty"
    for folder in (store, empty):
        folder.mkdir()
    for seed, (model, family) in enumerate(models.items()):
        make_checkpoint(store, model, family=family, seed=seed, chunk_bytes=65536)
    entry = nodes.made(tmp_path, "a", empty, file)
    others = [nodes.made(tmp_path, name, store, file, braked=True) for name in "bcd"]
    with nodes.running(entry, *others):
        await nodes.sees(entry, "b", "c", "d")
        bodies = [ask(list(models)[i % 3], f"Question {i % 7}", 300 + i) for i in range(12)]
        wanted = [await nodes.Streamed().read(others[0].url, body) for body in bodies]
        is_done = asyncio.Event()

        async def trouble():
            count = 0
            while not is_done.is_set():
                victim = others[count % 3]
                victim.process.kill()
                victim.__exit__(None, None, None)
                await asyncio.to_thread(victim.__enter__)
                await nodes.sees(entry, victim.config.parent.name)
                count += 1
            return count

        async def stream(number):
            for i in range(12):
                index = (number + i) % 12
                found = await nodes.Streamed().read(entry.url, bodies[index])
                assert found.tokens == wanted[index].tokens
                assert found.text == wanted[index].text
                assert found.usage["completion_tokens"] == bodies[index]["max_tokens"]

        killing = asyncio.create_task(trouble())
        await asyncio.gather(*(stream(number) for number in range(6)))
        is_done.set()
        assert await killing > 0
        assert entry.events("session lost its node")


SCALED = "[models.beta]\nmin_replicas = 1\nmax_replicas = 2\n"


def is_up(report):
    ready = [(one["model"], one["ready"]) for one in report["cluster"]["scaling"]]
    states = [(model["id"], model["state"]) for model in report["models"]]
    return (ready, states) == ([("beta", 1)], [("beta", "ready")])


async def test_a_minimum_in_the_cluster_file_brings_a_model_up_without_a_request(tmp_path):
    file = nodes.make_cluster(tmp_path / "shared", ["a", "b"], timing=nodes.QUICK)
    file.write_text(file.read_text().replace("dead_s = 5.0", "dead_s = 1.2") + SCALED)
    stores = {name: tmp_path / f"store-{name}" for name in ("a", "b")}
    for store in stores.values():
        store.mkdir()
    make_checkpoint(stores["b"], "beta", family="gpt2", chunk_bytes=65536)
    made = [nodes.made(tmp_path, name, store, file, braked=True) for name, store in stores.items()]
    with nodes.running(*made):
        for node in made:
            await nodes.until(node.url, "/admin/status", is_up)
