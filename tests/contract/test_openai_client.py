"""OpenAI's own package as the judge of the endpoint, sync and async."""

import asyncio

import openai
import pytest

from sllm_node.core.errors import EngineError, NodeFullError
from tests.unit.server.fake_service import FakeStream, chunks_of
from tests.unit.server.rig import serving

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def rig():
    async with serving() as made:
        yield made


@pytest.fixture
async def client(rig):
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_chat(client):
    answer = await client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].logprobs.content[0].token == "H"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_streamed(client):
    stream = await client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage.completion_tokens == 6


async def answers_of_every_helper(client):
    """Yield what the package's own ways to ask make of an answer."""
    yield (await client.chat.completions.create(**CHAT)).choices[0].message
    yield (await client.chat.completions.parse(**CHAT)).choices[0].message
    async with client.chat.completions.stream(**CHAT) as stream:
        yield (await stream.get_final_completion()).choices[0].message


async def test_what_every_helper_answers_can_be_sent_back(client):
    async for message in answers_of_every_helper(client):
        for sent in (message, message.model_dump(), message.to_dict()):
            messages = [*CHAT["messages"], sent, {"role": "user", "content": "And?"}]
            answer = await client.chat.completions.create(**{**CHAT, "messages": messages})
            assert answer.choices[0].message.content == "Hello"


async def test_completion_streamed_and_not(client):
    answer = await client.completions.create(model="m", prompt="x", logprobs=1)
    assert answer.choices[0].text == "Hello"
    stream = await client.completions.create(model="m", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello"


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).owned_by == "sllm_node"


async def test_the_sync_client_works_too(rig):
    def talk():
        with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(**CHAT)
            with client.chat.completions.create(**CHAT, stream=True) as stream:
                streamed = "".join(c.choices[0].delta.content or "" for c in stream)
            return answer.choices[0].message.content, streamed

    assert await asyncio.to_thread(talk) == ("Hello", "Hello")


async def test_errors_become_the_clients_own(client, rig):
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(**CHAT, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**{**CHAT, "model": "x"})
    assert missing.value.code == "model_not_found"
    rig.service.refuse = (0, NodeFullError(9, 8, 1.0))
    with pytest.raises(openai.InternalServerError) as full:
        await client.chat.completions.create(**CHAT)
    assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "1")


async def test_a_key_is_asked_for():
    async with (
        serving(api_keys=("k",)) as rig,
        openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        assert (await client.with_options(api_key="k").models.list()).data


async def test_a_request_that_cannot_succeed_is_sent_once(rig):
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="x", max_retries=2) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**CHAT, top_p=7)
    labels = {"route": "/v1/chat/completions", "status": "400"}
    assert rig.metrics.registry.get_sample_value("sllm_requests_total", labels) == 1


async def test_a_full_node_is_asked_again_when_it_said(rig):
    refused = []

    def refuse_once(request):
        if not refused:
            refused.append(request)
            raise NodeFullError(9, 8, 0.01)
        return FakeStream(chunks_of("ok"))

    rig.service.make_stream = refuse_once
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="x", max_retries=1) as client:
        answer = await client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "ok"


async def test_an_error_in_mid_stream_is_raised(client, rig):
    rig.service.make_stream = lambda request: FakeStream(
        [chunks_of("a")[0], EngineError("m", "broke")]
    )
    stream = await client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="broke"):
        _ = [chunk async for chunk in stream]


async def test_leaving_a_stream_frees_its_session(client, rig):
    rig.service.make_stream = lambda request: FakeStream([chunks_of("a")[0], asyncio.Event()])
    stream = await client.chat.completions.create(**CHAT, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await rig.service.streams[0].cancelled.wait()
