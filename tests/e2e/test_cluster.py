"""Nodes that share a cluster file: any of them serves the models of all, whatever becomes of the others."""

import contextlib

import pytest

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
    with contextlib.ExitStack() as stack:
        yield [
            nodes.start(stack, place, name, place / f"store-{name}", file) for name in ("a", "b")
        ]


async def test_a_model_of_another_node_is_answered_with_the_same_tokens(pair):
    a, b = pair
    await nodes.sees(a, "a", "b")
    through, direct = await answer(a, ask("beta")), await answer(b, ask("beta"))
    assert through["choices"] == direct["choices"]
    assert through["usage"]["completion_tokens"] == direct["usage"]["completion_tokens"] == 24
    (taken,) = nodes.events(b, "forwarded session taken")
    placed = nodes.events(a, "request placed")[-1]
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
