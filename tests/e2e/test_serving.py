"""The whole path over HTTP: three tiny models, a device that holds two, OpenAI's own client."""

import asyncio
import json

import openai
import pytest

from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

MODELS = {"alpha": "llama", "beta": "gpt2", "gamma": "qwen3"}
QUESTIONS = ["Hello there", "What is the sea?", "Tell me a story of old", "a", "one two three four"]
KV_BYTES = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    sizes = [
        make_checkpoint(folder, name, family=family, seed=seed, chunk_bytes=65536).index.size
        for seed, (name, family) in enumerate(MODELS.items())
    ]
    return folder, sizes


@pytest.fixture(scope="module")
def node(store, tmp_path_factory):
    folder, sizes = store
    room = sum(sizes) - min(sizes) // 2 + 2 * KV_BYTES  # two models with their KV memory, not three
    pool = -(-sum(sizes) * 2 // 3 // 65536) * 65536
    settings = {"memory_bytes": room, "pool_bytes": pool, "kv_cache_bytes": KV_BYTES}
    with NodeProcess(tmp_path_factory.mktemp("node"), folder, braked=True, **settings) as running:
        yield running


@pytest.fixture
async def client(node):
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(model, question):
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
    }


async def answer(client, model, question):
    response = await client.chat.completions.create(**ask(model, question))
    return response.choices[0].message.content, response.choices[0].finish_reason


async def streamed_answer(client, model, question):
    text, finish = "", None
    stream = await client.chat.completions.create(**ask(model, question), stream=True)
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


def metric(node, name):
    import urllib.request

    with urllib.request.urlopen(f"{node.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def test_sixteen_at_once_on_three_models_answer_as_each_alone(client, node):
    work = [(list(MODELS)[i % 3], QUESTIONS[i % len(QUESTIONS)], i % 2) for i in range(16)]
    alone = [await answer(client, model, question) for model, question, _ in work]
    before = metric(node, 'sllm_evictions_total{reason="room",tier="device"}')
    together = await asyncio.gather(
        *(
            (streamed_answer if streamed else answer)(client, model, question)
            for model, question, streamed in work
        )
    )
    assert together == alone
    assert metric(node, 'sllm_evictions_total{reason="room",tier="device"}') > before


async def test_a_seed_gives_the_same_text_whoever_else_is_served(client):
    body = {**ask("alpha", "Hello"), "temperature": 1.0, "seed": 7, "top_p": 0.9}
    alone = await client.chat.completions.create(**body)
    crowd = [client.chat.completions.create(**{**body, "seed": seed}) for seed in range(8)]
    crowded, *_ = await asyncio.gather(client.chat.completions.create(**body), *crowd)
    assert crowded.choices[0].message.content == alone.choices[0].message.content


async def test_usage_choices_and_stop_are_as_openai_defines_them(client):
    response = await client.chat.completions.create(
        **{**ask("alpha", "Hi"), "n": 2, "seed": 3, "temperature": 1}
    )
    assert [choice.index for choice in response.choices] == [0, 1]
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    full, _ = await answer(client, "alpha", "Hi")
    stop = full[len(full) // 2 :][:3]
    cut = await client.chat.completions.create(**ask("alpha", "Hi"), stop=[stop])
    assert cut.choices[0].message.content == full[: full.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def test_a_prompt_that_was_served_is_found_cached_by_who_has_its_salt(client, node):
    body = {
        **ask("beta", "Tell me all that you know of it. " * 4),
        "extra_body": {"cache_salt": "a"},
    }
    first = await client.chat.completions.create(**body)
    hits = metric(node, "sllm_prefix_cache_hits_total")
    second = await client.chat.completions.create(**body)
    assert second.choices[0].message.content == first.choices[0].message.content
    found = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < found < second.usage.prompt_tokens
    assert metric(node, "sllm_prefix_cache_hits_total") == hits + found
    other = await client.chat.completions.create(**{**body, "extra_body": {"cache_salt": "b"}})
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert other.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "delta"}, openai.NotFoundError, None),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"banana": 1}}, openai.BadRequestError, "banana"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_parameter(client, change, kind, param):
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**{**ask("alpha", "Hi"), **change})
    assert caught.value.param == param or param is None
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_a_client_that_goes_away_frees_its_session(client, node):
    body = {**ask("alpha", "Hi"), "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    cancelled = 'sllm_sessions_total{model="alpha",outcome="cancelled"}'
    before = metric(node, cancelled)
    node.brake()
    stream = await client.chat.completions.create(**body, stream=True)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(120):
        while metric(node, cancelled) == before:
            await asyncio.sleep(0.02)
    node.release()
    assert metric(node, cancelled) == before + 1
    assert metric(node, 'sllm_num_requests_running{model="alpha"}') == 0


async def test_models_tell_their_state(client):
    await answer(client, "beta", "Hi")
    listed = {model.id: model for model in (await client.models.list()).data}
    assert set(listed) == set(MODELS)
    beta = (await client.models.retrieve("beta")).model_dump()["sllm"]
    assert (beta["state"], beta["tier"]) == ("ready", "device")
    assert beta["bytes_by_tier"]["device"] == beta["bytes"]


def test_events_of_a_stream_end_with_done(node):
    import urllib.request

    body = json.dumps(
        {**ask("gamma", "Hi"), "stream": True, "stream_options": {"include_usage": True}}
    )
    request = urllib.request.Request(
        f"{node.url}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [
            line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")
        ]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["usage"]["completion_tokens"] > 0
