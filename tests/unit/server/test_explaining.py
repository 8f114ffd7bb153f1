import json
from dataclasses import replace

import pytest

from sllm_node.core.types import Startup, Stay
from tests.unit.server.fake_service import FakeStream, chunks_of
from tests.unit.server.rig import serving

BODY = {"model": "m", "prompt": "x"}
PATH = "/v1/completions"
LOADED = Startup("b", "load", "b cpu: there is room to load it", 0.25, 0.3)


def stream(startup=LOADED):
    made = FakeStream(chunks_of("ok"))
    made.startup_ = startup
    return made


@pytest.fixture
async def rig():
    async with serving() as made:
        made.service.make_stream = lambda request: stream()
        yield made


async def test_an_answer_tells_where_it_came_from_if_its_client_asks(rig):
    _, _, headers = await rig.post(PATH, BODY, **{"x-sllm-explain": "1"})
    assert headers["x-sllm-node"] == "b"
    assert headers["x-sllm-way"] == "load"
    assert headers["x-sllm-startup-ms"] == "300.0"
    assert headers["x-sllm-expected-ms"] == "250.0"


async def test_nobody_is_told_who_does_not_ask(rig):
    for headers in ({}, {"x-sllm-explain": "0"}):
        _, _, told = await rig.post(PATH, BODY, **headers)
        assert not [name for name in told if name.lower().startswith("x-sllm-")]


async def test_each_choice_has_a_value(rig):
    rig.service.make_stream = lambda request: stream(
        LOADED if request.session.endswith("-0") else Startup("a", "serve", startup_s=0.001)
    )
    _, _, headers = await rig.post(PATH, {**BODY, "n": 2}, **{"x-sllm-explain": "1"})
    assert headers["x-sllm-node"] == "b, a"
    assert headers["x-sllm-startup-ms"] == "300.0, 1.0"
    assert headers["x-sllm-expected-ms"] == "250.0, -"


async def test_a_node_in_no_cluster_tells_how_long_it_took(rig):
    rig.service.make_stream = lambda request: stream(Startup(startup_s=0.5))
    _, _, headers = await rig.post(PATH, BODY, **{"x-sllm-explain": "1"})
    assert headers["x-sllm-startup-ms"] == "500.0"
    assert "x-sllm-node" not in headers


async def test_a_stream_says_it_at_its_end(rig):
    asked = {**BODY, "stream": True}
    async with rig.http.post(
        rig.url + PATH, json=asked, headers={"x-sllm-explain": "1"}
    ) as response:
        assert response.headers["x-sllm-node"] == "b"
        lines = (await response.read()).decode().splitlines()
    told = [line for line in lines if line.startswith(": sllm ")]
    assert json.loads(told[0].removeprefix(": sllm ")) == [
        {"node": "b", "way": "load", "why": LOADED.why, "expected_s": 0.25, "startup_s": 0.3}
    ]
    assert lines.index(told[0]) < lines.index("data: [DONE]")


async def test_a_session_that_went_on_elsewhere_tells_all_its_nodes(rig):
    stays = (Stay("b", 12, "peer_unreachable"), Stay("c", 3, "moved"))
    rig.service.make_stream = lambda request: stream(replace(LOADED, node="d", earlier=stays))
    _, _, headers = await rig.post(PATH, BODY, **{"x-sllm-explain": "1"})
    assert (headers["x-sllm-node"], headers["x-sllm-earlier-nodes"]) == ("d", "b+c")
    asked = {**BODY, "stream": True}
    async with rig.http.post(
        rig.url + PATH, json=asked, headers={"x-sllm-explain": "1"}
    ) as response:
        lines = (await response.read()).decode().splitlines()
    (told,) = [line for line in lines if line.startswith(": sllm ")]
    (session,) = json.loads(told.removeprefix(": sllm "))
    assert session["earlier"] == [
        {"node": "b", "tokens": 12, "left": "peer_unreachable"},
        {"node": "c", "tokens": 3, "left": "moved"},
    ]


async def test_a_stream_is_told_when_its_tokens_were_written(rig):
    await rig.events(PATH, {**BODY, "stream": True})
    assert rig.service.streams[0].passes >= 1
