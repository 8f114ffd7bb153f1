"""Two nodes: one has a model, the other serves it without having it."""

import json
import urllib.request

import pytest

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.verify import verify
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

pytest.importorskip("obstore")


def post(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.loads(response.read())


def answer(node, model):
    body = {"model": model, "prompt": "Hello there", "max_tokens": 12, "temperature": 0}
    return post(f"{node.url}/v1/completions", body)["choices"][0]["text"]


def test_a_node_serves_what_its_peer_has(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    make_checkpoint(tmp_path / "there" / "store", "alpha", chunk_bytes=65536)
    make_checkpoint(tmp_path / "there" / "store", "beta", chunk_bytes=65536, seed=3)
    (tmp_path / "here" / "store").mkdir()
    with NodeProcess(tmp_path / "there", tmp_path / "there" / "store") as there:
        wanted = {name: answer(there, name) for name in ("alpha", "beta")}
        extra = f'[remotes.peer]\nurl = "{there.url}/peer/v1/checkpoints"\n'
        with NodeProcess(
            tmp_path / "here", tmp_path / "here" / "store", extra, braked=True
        ) as here:
            post(f"{here.url}/admin/models/beta/pull", {})
            status = get(f"{here.url}/admin/status")
            assert status["remotes"][0]["state"] == "ok"
            tiers = {model["id"]: model["tier"] for model in status["models"]}
            assert tiers == {"alpha": "remote", "beta": "nvme"}
            assert {name: answer(here, name) for name in wanted} == wanted
            assert get(f"{here.url}/admin/status")["bandwidth"]["remote"] > 0
    for name in wanted:
        assert verify(open_checkpoint(tmp_path / "here" / "store" / name)) == []
