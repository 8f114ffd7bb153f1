import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("obstore")

from sllm_node.checkpoint.cards import REGISTERED
from sllm_node.cluster.registered import Registered
from sllm_node.core.errors import ModelNotFoundError
from sllm_node.core.types import ModelId
from tests.ports import free_port
from tests.unit.store.remote_rig import Node, make_remote

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


@pytest.fixture
async def remote(tmp_path):
    made = make_remote(tmp_path / "remote", "ab")
    async with made.serving():
        yield made


class Looks:
    """Counts how often something new is to be seen, and lets wait for the next time."""

    def __init__(self):
        self.outlook: Any = SimpleNamespace(keeps_remotes=False)
        self._looked = asyncio.Event()

    def look(self):
        self._looked.set()

    async def after(self, registered, urls):
        self._looked.clear()
        registered.set(urls)
        await self._looked.wait()


async def test_a_registered_model_is_loaded_from_its_address_and_leaves_with_its_registration(
    tmp_path, remote
):
    looks = Looks()
    async with Node(tmp_path / "n", {}) as node:
        registered = Registered(node.tier, node.catalog, looks.outlook, looks.look)
        assert node.tier.status() == []
        await looks.after(registered, {A: remote.url})
        assert (node.catalog.models(), looks.outlook.keeps_remotes) == (("a",), True)
        (told,) = node.tier.status()
        assert (told["name"], told["state"], told["models"]) == (REGISTERED, "ok", ["a"])
        await looks.after(registered, {B: remote.url})
        assert node.catalog.models() == ("b",)
        with pytest.raises(ModelNotFoundError):
            await node.load("a")
        assert await node.load("b") == remote.bytes["b"]
        node.unload("b")
        await looks.after(registered, {})
        assert node.catalog.models() == ("b",)  # all of it came, so it is an ordinary checkpoint
        await registered.close()


async def test_an_address_that_does_not_answer_costs_its_own_model_only(tmp_path, remote):
    looks = Looks()
    async with Node(tmp_path / "n", {}) as node:
        registered = Registered(node.tier, node.catalog, looks.outlook, looks.look)
        await looks.after(registered, {A: f"http://127.0.0.1:{free_port()}/x", B: remote.url})
        assert node.catalog.models() == ("b",)
        (told,) = node.tier.status()
        assert (told["state"], told["models"]) == ("ok", ["a", "b"])
        assert "a/tensor_index.json" in told["problem"]
        await registered.close()


async def test_a_look_at_registered_models_that_fails_is_logged_and_made_again(caplog):
    told: list[dict[ModelId, str]] = []

    async def register(urls):
        told.append(urls)
        if len(told) == 1:
            raise RuntimeError("dictionary changed size during iteration")

    looks, tier = Looks(), SimpleNamespace(register=register)
    catalog = SimpleNamespace(scan=lambda: None)
    registered = Registered(tier, catalog, looks.outlook, looks.look, again_s=0.0)  # type: ignore[arg-type]
    await looks.after(registered, {A: "https://host/x"})
    assert told == [{A: "https://host/x"}] * 2
    assert "registered models not looked at" in caplog.text
    await registered.close()


async def test_a_remote_of_the_config_goes_before_a_registration(tmp_path, remote):
    looks, config = Looks(), {"r": {"url": remote.url, "models": ("a",)}}
    async with Node(tmp_path / "n", config) as node:
        registered = Registered(node.tier, node.catalog, looks.outlook, looks.look)
        await looks.after(registered, {A: f"http://127.0.0.1:{free_port()}/x"})
        assert node.catalog.get(A).remote == "r"
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
        await registered.close()
