"""Real nodes whose cluster file names none of them: they find each other through a real etcd."""

import asyncio

import pytest

from tests.e2e import cluster_nodes as nodes
from tests.etcd import Etcd, needs_etcd
from tests.models import make_checkpoint
from tests.ports import free_port

BODY = {"model": "beta", "prompt": "Hello", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    server = Etcd(tmp_path_factory.mktemp("etcd")).start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory, etcd):
    """Node a has no model, node b has beta."""
    place = tmp_path_factory.mktemp("directory")
    file = nodes.make_listed_cluster(place / "shared", etcd.client_url)
    for name in "ab":
        (place / f"store-{name}").mkdir()
    make_checkpoint(place / "store-b", "beta", family="gpt2", chunk_bytes=65536)
    made = [
        nodes.made(
            place, name, place / f"store-{name}", file, f"127.0.0.1:{free_port()}", braked=True
        )
        for name in "ab"
    ]
    with nodes.running(*made) as pair:
        yield pair


async def answer(node):
    status, found = await nodes.post(node.url, "/v1/completions", BODY)
    assert status == 200, found
    return found["choices"][0]["text"]


def stands(state):
    return lambda report: report["cluster"]["directory"]["state"] == state


def is_listed(report):
    """Tell whether node a is in the directory and knows b from it."""
    directory = report["cluster"]["directory"]
    listed = {one["id"]: one["stale"] for one in directory["nodes"]}
    return directory["registered"] and listed == {"b": False}


@needs_etcd
async def test_nodes_find_each_other_and_go_on_without_etcd_even_when_started_anew(pair, etcd):
    a, b = pair
    await nodes.sees(a, "b")
    await nodes.until(a.url, "/admin/status", is_listed)
    text = await answer(b)
    assert await answer(a) == text

    etcd.kill()
    report = await nodes.until(a.url, "/admin/status", stands("cut off"))
    assert report["cluster"]["directory"]["problem"]
    assert await answer(a) == text

    a.process.kill()
    await asyncio.to_thread(a.start_again)
    await nodes.sees(a, "b")  # from its journal
    assert await answer(a) == text

    etcd.start()
    for node in pair:
        await nodes.until(node.url, "/admin/status", stands("following"))
    assert await answer(a) == text


@needs_etcd
async def test_a_node_that_leaves_is_listed_no_more(pair):
    a, b = pair
    await nodes.until(a.url, "/admin/status", is_listed)
    b.terminate()

    def is_alone(report):
        others = [node["id"] for node in report["cluster"]["nodes"] if node["id"] != "a"]
        return (report["cluster"]["directory"]["nodes"], report["cluster"]["peers"], others) == (
            [], [], [],
        )  # fmt: skip

    await nodes.until(a.url, "/admin/status", is_alone)
    assert await asyncio.to_thread(b.wait) == 0
