"""Real nodes whose cluster file names none of them: they find each other through a real etcd."""

import pytest

from tests.e2e import cluster_nodes as nodes
from tests.etcd import Etcd, needs_etcd
from tests.models import make_checkpoint

BODY = {"model": "beta", "prompt": "Hello", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def etcd(tmp_path):
    server = Etcd(tmp_path / "etcd").start()
    yield server
    server.close()


@pytest.fixture
def pair(tmp_path, etcd):
    """Node a has no model, node b has beta; not started."""
    file = nodes.make_listed_cluster(tmp_path / "shared", etcd.client_url)
    for name in "ab":
        (tmp_path / f"store-{name}").mkdir()
    make_checkpoint(tmp_path / "store-b", "beta", family="gpt2", chunk_bytes=65536)
    return [
        nodes.made(
            tmp_path, name, tmp_path / f"store-{name}", file, f"127.0.0.1:{nodes.free_port()}"
        )
        for name in "ab"
    ]  # fmt: skip


async def answer(node):
    status, found = await nodes.post(node.url, "/v1/completions", BODY)
    assert status == 200, found
    return found["choices"][0]["text"]


def stands(state):
    return lambda report: report["cluster"]["directory"]["state"] == state


@needs_etcd
async def test_nodes_find_each_other_and_go_on_without_etcd_even_when_started_anew(pair, etcd):
    a, b = pair
    with nodes.running(a, b):
        await nodes.sees(a, "b")
        report = await nodes.until(
            a.url, "/admin/status", lambda r: r["cluster"]["directory"]["registered"]
        )
        listed = {one["id"]: one["stale"] for one in report["cluster"]["directory"]["nodes"]}
        assert listed == {"b": False}
        text = await answer(b)
        assert await answer(a) == text

        etcd.kill()
        report = await nodes.until(a.url, "/admin/status", stands("cut off"))
        assert report["cluster"]["directory"]["problem"]
        assert await answer(a) == text

        a.process.kill()
        a.__exit__(None, None, None)
        a.__enter__()
        await nodes.sees(a, "b")  # from its journal
        assert await answer(a) == text

        etcd.start()
        for node in pair:
            await nodes.until(node.url, "/admin/status", stands("following"))
        assert await answer(a) == text


@needs_etcd
async def test_a_node_that_leaves_is_listed_no_more(pair, etcd):
    a, b = pair
    with nodes.running(a):
        with nodes.running(b):
            await nodes.sees(a, "b")
        report = await nodes.until(
            a.url, "/admin/status", lambda r: not r["cluster"]["directory"]["nodes"]
        )
        assert [node["id"] for node in report["cluster"]["nodes"]] == ["a"]
        assert report["cluster"]["peers"] == []
