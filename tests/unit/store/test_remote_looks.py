import pytest

pytest.importorskip("obstore")

from aiohttp import web

from sllm_node.core.types import ModelId
from tests.unit.store.remote_rig import Node, make_remote

A = ModelId("a")


@pytest.fixture
async def remote(tmp_path):
    made = make_remote(tmp_path / "remote", "abc")
    async with made.serving():
        yield made


def refusing(remote, *names):
    """Let `remote` answer as a bucket to who may not list it: what is not there is refused, and `names`."""

    async def before(request):
        name = request.match_info["file"]
        is_there = (remote.root / request.match_info["model"] / name).is_file()
        return web.Response(status=403) if name in names or not is_there else None

    remote.before = before


async def test_texts_that_a_remote_refuses_once_it_gave_the_index_are_not_there(tmp_path, remote):
    refusing(remote)
    async with Node(tmp_path / "n", {"r": {"url": remote.url, "models": ("a",)}}) as node:
        assert node.tier.status()[0]["problem"] is None
        texts = {path.name for path in node.catalog.get(A).path.glob("*.json")}
        assert texts == {"tensor_index.json", "card.json", "config.json", "tokenizer.json"}
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")


@pytest.mark.parametrize("name", ["tensor_index.json", "config.json"])
async def test_a_refused_index_or_config_is_told_as_a_matter_of_credentials(tmp_path, remote, name):
    refusing(remote, name)
    async with Node(tmp_path / "n", {"r": {"url": remote.url}}) as node:
        assert node.catalog.models() == ()
        problem = node.tier.status()[0]["problem"]
        assert problem.startswith(f"remote 'r': a/{name}: is refused, see the remote's credentials")
