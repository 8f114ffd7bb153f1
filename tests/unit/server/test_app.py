import asyncio
import json
import math
import re
import socket
import threading
import zlib

import pytest
from prometheus_client import generate_latest

from sllm_node.core.errors import (
    ChecksumError,
    DrainingError,
    EngineError,
    ListenError,
    ModelTooLargeError,
    NodeFullError,
    PinnedMemoryError,
)
from sllm_node.core.types import GenerationChunk, ModelId, Stall
from sllm_node.server.app import ROUTES
from sllm_node.server.prompts import FEW_CHARACTERS, FEW_PROMPTS
from tests.unit.server.fake_service import FakeStream, chunks_of, status_of
from tests.unit.server.rig import serving

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def rig():
    async with serving() as made:
        yield made


# --- answers --------------------------------------------------------------------------------------


async def test_a_chat_is_answered_with_one_object(rig):
    status, body, headers = await rig.post(CHATS, CHAT)
    assert (status, body["object"], body["model"], body["created"]) == (
        200,
        "chat.completion",
        "m",
        1000,
    )
    assert body["choices"] == [
        {
            "index": 0, "finish_reason": "stop", "logprobs": None,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
        }
    ]  # fmt: skip
    assert body["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 6, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert body["id"] == f"chatcmpl-{headers['x-request-id']}"


async def test_what_the_engine_is_asked_follows_from_the_request(rig):
    body = {
        **CHAT,
        "n": 2,
        "seed": 4,
        "max_tokens": 7,
        "stop": ["x"],
        "ignore_eos": True,
        "keep_alive": "5m",
    }
    await rig.post(CHATS, body, **{"x-request-id": "mine"})
    first, second = rig.service.requests
    assert re.fullmatch("mine-[0-9a-f]{8}-0", first.session)
    assert second.session == first.session[:-1] + "1"
    assert (first.sampling.seed, first.max_tokens, first.stop, first.ignore_eos) == (
        4,
        7,
        ("x",),
        True,
    )
    assert second.sampling.seed != 4
    assert rig.service.keep_alives == [300.0, 300.0]


async def test_equal_prompts_of_one_request_draw_different_numbers(rig):
    await rig.post(COMPLETIONS, {"model": "m", "prompt": ["a"] * 3, "n": 2})
    assert len({request.sampling.seed for request in rig.service.requests}) == 6


async def test_with_a_seed_a_prompt_draws_what_it_draws_when_it_is_sent_alone(rig):
    for prompt in (["a", "b"], ["b"]):
        await rig.post(COMPLETIONS, {"model": "m", "prompt": prompt, "n": 2, "seed": 4})
    seeds = [request.sampling.seed for request in rig.service.requests]
    assert seeds[:2] == seeds[2:4] == seeds[4:]
    assert len({*seeds}) == 2


async def test_without_a_limit_a_session_may_fill_what_is_left(rig):
    await rig.post(CHATS, CHAT)
    await rig.post(CHATS, {**CHAT, "max_tokens": 92})
    first, second = rig.service.requests
    assert (first.max_tokens, first.open_ended) == (100 - 8, True)
    assert (second.max_tokens, second.open_ended) == (92, False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHATS, {**CHAT, "max_tokens": 93}, "max_tokens"),
        (CHATS, {**CHAT, "max_completion_tokens": 93}, "max_completion_tokens"),
        (COMPLETIONS, {"model": "m", "prompt": [1, 0x110000]}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": [[1], []]}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": ["a"] * 51, "n": 2}, "n"),
        (COMPLETIONS, {"model": "m", "prompt": ["a"] * 101}, "prompt"),
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": "x" * 99}]}, "messages"),
        (COMPLETIONS, {"model": "m", "prompt": "x" * 100}, "prompt"),
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": "refuse"}]}, "messages"),
        (CHATS, {**CHAT, "banana": 1}, "banana"),
    ],
)
async def test_what_can_never_succeed_is_refused_for_good(rig, path, body, param):
    status, answer, headers = await rig.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert headers["x-should-retry"] == "false"
    assert rig.service.requests == []


async def test_completions_take_many_prompts_and_echo(rig):
    body = {"model": "m", "prompt": ["ab", [99]], "n": 2, "echo": True}
    _, answer, _ = await rig.post(COMPLETIONS, body)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "abHello"), (1, "abHello"), (2, "cHello"), (3, "cHello"),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 3


async def test_an_echo_is_the_prompt_as_it_came_with_its_special_tokens(rig):
    given = "<s>ab"
    for prompt in (given, [given], list(map(ord, given)), [list(map(ord, given))]):
        body = {"model": "m", "prompt": prompt, "echo": True}
        _, answer, _ = await rig.post(COMPLETIONS, body)
        assert answer["choices"][0]["text"] == "<s>abHello"
        _, data = await rig.events(COMPLETIONS, {**body, "stream": True})
        assert json.loads(data[0])["choices"][0]["text"] == "<s>ab"


async def test_logprobs_come_in_both_shapes(rig):
    _, chat, _ = await rig.post(CHATS, {**CHAT, "logprobs": True, "top_logprobs": 1})
    entry = chat["choices"][0]["logprobs"]["content"][0]
    assert entry == {
        "token": "H", "logprob": -0.5, "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }  # fmt: skip
    _, text, _ = await rig.post(COMPLETIONS, {"model": "m", "prompt": "x", "logprobs": 1})
    logprobs = text["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("Hello")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][0] == {"H": -0.5}


async def test_a_salt_goes_to_the_engine_and_is_none_unless_it_is_sent(rig):
    for more in ({"cache_salt": "tenant-1"}, {}, {"cache_salt": None}):
        await rig.post(CHATS, {**CHAT, **more})
    assert [request.cache_salt for request in rig.service.requests] == ["tenant-1", "", ""]


async def test_usage_tells_what_was_cached_of_each_prompt_when_it_was_first_met(rig):
    cached = iter((3, 100, 4, 100))
    rig.service.make_stream = lambda request: FakeStream(chunks_of("a", cached=next(cached)))
    _, body, _ = await rig.post(COMPLETIONS, {"model": "m", "prompt": ["hello", "world"], "n": 2})
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    rig.service.make_stream = lambda request: FakeStream(chunks_of("a", cached=5))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, data = await rig.events(CHATS, {**CHAT, **options})
    assert json.loads(data[-2])["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


# --- streams --------------------------------------------------------------------------------------


async def test_a_stream_opens_with_the_role_and_ends_with_usage_and_done(rig):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, data = await rig.events(CHATS, {**CHAT, **options})
    assert data[-1] == "[DONE]"
    events = [json.loads(line) for line in data[:-1]]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 14
    assert all(event["usage"] is None for event in events[:-1])


async def test_a_completion_stream_tells_offsets_of_logprobs(rig):
    body = {"model": "m", "prompt": "x", "stream": True, "logprobs": 1, "echo": False}
    _, data = await rig.events(COMPLETIONS, body)
    found = [json.loads(line)["choices"][0]["logprobs"] for line in data[:-1]]
    assert [logprobs["text_offset"][0] for logprobs in found if logprobs] == [0, 1, 2, 3, 4]


async def test_a_completion_stream_echoes_the_prompt_first(rig):
    _, data = await rig.events(
        COMPLETIONS, {"model": "m", "prompt": "ab", "stream": True, "echo": True}
    )
    assert json.loads(data[0])["choices"][0]["text"] == "ab"


async def test_choices_of_a_stream_interleave_under_their_index(rig):
    _, data = await rig.events(CHATS, {**CHAT, "n": 3, "stream": True})
    text = {0: "", 1: "", 2: ""}
    for line in data[:-1]:
        choice = json.loads(line)["choices"][0]
        text[choice["index"]] += choice["delta"].get("content", "")
    assert text == {0: "Hello", 1: "Hello", 2: "Hello"}


@pytest.mark.parametrize("waits", [True, False])
async def test_a_stream_ends_for_a_client_that_knows_no_chunks(rig, waits):
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = head_of(len(body), "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    gate = asyncio.Event()
    rig.service.prepare_gate = gate if waits else None
    reader, writer = await asyncio.open_connection(*rig.url[7:].split(":"))
    writer.write(head + body)
    assert b"keep-alive" not in await reader.readuntil(b"\r\n\r\n")
    gate.set()
    assert (await reader.read()).endswith(b"data: [DONE]\n\n")
    writer.close()


async def test_while_a_model_loads_comments_tell_the_progress(rig):
    gate = asyncio.Event()
    rig.service.make_stream = lambda request: FakeStream(chunks_of("ok"), gate, status_of())
    async with rig.http.post(rig.url + CHATS, json={**CHAT, "stream": True}) as response:
        comment = await response.content.readuntil(b"\n\n")
        while not comment.startswith(b":"):
            comment = await response.content.readuntil(b"\n\n")
        assert comment == b": m loading from nvme: 25 %, 50 B of 200 B, 1.5 s left\n\n"
        gate.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_model_that_only_waits_says_so(rig):
    gate = asyncio.Event()
    status = status_of(progress=None)
    rig.service.make_stream = lambda request: FakeStream(chunks_of("ok"), gate, status)
    async with rig.http.post(rig.url + CHATS, json={**CHAT, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        assert await response.content.readuntil(b"\n\n") == b": m loading, 2 waiting\n\n"
        gate.set()


async def test_while_a_tokenizer_is_waited_for_comments_tell_it(rig):
    rig.service.prepare_gate = asyncio.Event()
    async with rig.http.post(rig.url + CHATS, json={**CHAT, "stream": True}) as response:
        comment = await response.content.readuntil(b"\n\n")
        assert comment == b": m waits for a node that gives its tokenizer\n\n"
        rig.service.prepare_gate.set()
        text = await response.read()
    assert b'"role":"assistant"' in text
    assert text.endswith(b"data: [DONE]\n\n")


async def test_a_tokenizer_that_nobody_gives_after_all_is_told_as_an_event(rig):
    rig.service.prepare_gate = asyncio.Event()
    async with rig.http.post(
        rig.url + CHATS, json={**CHAT, "model": "other", "stream": True}
    ) as response:
        await response.content.readuntil(b"\n\n")
        rig.service.prepare_gate.set()
        assert b"model_not_found" in await response.read()


async def test_an_error_before_the_first_token_has_its_own_status(rig):
    error = ChecksumError("m", "shard-00000.bin", 0, 4096)
    rig.service.make_stream = lambda request: FakeStream([error])
    status, body, _ = await rig.post(CHATS, {**CHAT, "stream": True})
    assert (status, body["error"]["code"]) == (500, "checksum_mismatch")


async def test_an_error_after_the_first_token_is_an_event_and_no_end_mark(rig):
    rig.service.make_stream = lambda request: FakeStream(
        [chunks_of("a")[0], EngineError("m", "broke")]
    )
    _, data = await rig.events(CHATS, {**CHAT, "stream": True})
    assert json.loads(data[-1])["error"]["code"] == "engine_error"
    assert "[DONE]" not in data


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), TimeoutError("oh")])
async def test_a_mistake_of_ours_in_a_stream_is_an_event_too(rig, caplog, error):
    rig.service.make_stream = lambda request: FakeStream([chunks_of("a")[0], error])
    _, data = await rig.events(CHATS, {**CHAT, "stream": True})
    assert json.loads(data[-1])["error"]["code"] == "internal_error"
    assert "[DONE]" not in data
    record = next(r for r in caplog.records if r.message == "request failed")
    assert record.exc_info[1] is error


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_all_its_sessions(rig, stream):
    never = asyncio.Event()
    rig.service.make_stream = lambda request: FakeStream([chunks_of("a")[0], never])
    body = {**CHAT, "n": 2, "stream": stream}
    request = asyncio.create_task(rig.post(CHATS, body))
    while len(rig.service.streams) < 2:
        await asyncio.sleep(0)
    if stream:
        await asyncio.sleep(0)
    request.cancel()
    for made in rig.service.streams:
        await made.cancelled.wait()


async def test_a_client_that_takes_no_bytes_is_dropped():
    async with serving(write_timeout_s=0.05) as rig:
        big = chunks_of("x" * 200_000)[0]
        rig.service.make_stream = lambda request: FakeStream(
            [big] * 2000 + chunks_of("x" * 1000) * 200
        )
        reader, writer = await asyncio.open_connection(*rig.url[7:].split(":"), limit=1)
        body = json.dumps({**CHAT, "stream": True, "logprobs": True}).encode()
        head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while not rig.service.streams:
            await asyncio.sleep(0)
        await rig.service.streams[0].cancelled.wait()
        writer.close()
        reader.feed_eof()


@pytest.mark.parametrize(("answers", "size"), [(1, 1 << 26), (1 << 11, 1 << 15)])
async def test_a_client_that_takes_nothing_of_whole_answers_is_dropped(caplog, answers, size):
    body = json.dumps(CHAT).encode()
    head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    text = GenerationChunk("x" * size, (1,), (), "stop")
    async with serving(write_timeout_s=0.05) as rig:
        rig.service.make_stream = lambda request: FakeStream([text])
        with socket.create_connection(("127.0.0.1", int(rig.url.rpartition(":")[2]))) as client:
            client.setblocking(False)
            sent = asyncio.get_running_loop().sock_sendall(client, answers * (head.encode() + body))
            sending = asyncio.create_task(sent)
            while "client takes no bytes, dropped" not in caplog.messages:
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def test_short_prompts_do_not_wait_for_long_ones_of_clients_that_are_gone(rig):
    rig.service.limit = 1 << 30
    gate = threading.Event()
    texts = [f"{i}" + "x" * (1 << 17) for i in range(3)]
    rig.service.codec.gates = dict.fromkeys(texts, gate)
    asked = [
        asyncio.create_task(rig.post(COMPLETIONS, {"model": "m", "prompt": text})) for text in texts
    ]
    while not rig.service.codec.encoded:
        await asyncio.sleep(0)
    try:
        for task in asked:
            task.cancel()
        short = "short" * FEW_CHARACTERS
        assert (await rig.post(COMPLETIONS, {"model": "m", "prompt": short}))[0] == 200
    finally:
        gate.set()


async def test_a_few_words_become_tokens_without_a_way_to_another_thread(rig):
    rig.service.limit = 1 << 30
    for prompt in ("x" * FEW_CHARACTERS, "x" * (FEW_CHARACTERS + 1)):
        assert (await rig.post(COMPLETIONS, {"model": "m", "prompt": prompt}))[0] == 200
    here, there = rig.service.codec.threads
    assert here is threading.current_thread()
    assert there is not here


@pytest.mark.parametrize("prompts", [["x" * FEW_CHARACTERS] * 2, ["x"] * (FEW_PROMPTS + 1)])
async def test_many_short_prompts_of_one_request_do_not_stop_the_event_loop(rig, prompts):
    rig.service.limit = 1 << 30
    rig.service.sessions_max = len(prompts)
    assert (await rig.post(COMPLETIONS, {"model": "m", "prompt": prompts}))[0] == 200
    assert len(rig.service.codec.threads) == len(prompts)
    assert threading.current_thread() not in rig.service.codec.threads


async def test_a_request_for_more_choices_than_there_are_places_is_refused_before_its_prompts_are_read(
    rig,
):
    rig.service.sessions_max = 3
    status, answer, _ = await rig.post(CHATS, {**CHAT, "n": 4})
    assert (status, answer["error"]["param"]) == (400, "n")
    assert rig.service.codec.encoded == []
    assert (await rig.post(CHATS, {**CHAT, "n": 3}))[0] == 200


async def test_requests_that_come_with_one_id_are_told_apart(rig):
    answers = [await rig.post(CHATS, CHAT, **{"x-request-id": "same"}) for _ in range(2)]
    assert [headers["x-request-id"] for _, _, headers in answers] == ["same", "same"]
    assert len({body["id"] for _, body, _ in answers}) == 2
    assert len({request.session for request in rig.service.requests}) == 2


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [
        (NodeFullError(9, 8, 2.3), 503, "3"),
        (NodeFullError(9, 8, 2.0004), 503, "2"),
        (DrainingError(30.0), 503, "30"),
        (PinnedMemoryError("m", 9, 4, ("p",)), 503, "30"),
        (ModelTooLargeError("m", 9, 4), 400, None),
    ],
)
async def test_a_refusal_tells_when_to_come_back(rig, error, status, after):
    rig.service.refuse = (0, error)
    found, body, headers = await rig.post(CHATS, CHAT)
    assert (found, body["error"]["code"]) == (status, error.code)
    assert headers.get("Retry-After") == after
    if after is not None:
        assert math.ceil(int(headers["retry-after-ms"]) / 1000) == int(after)
    is_in_vain = status == 400 or isinstance(error, PinnedMemoryError)
    assert ("x-should-retry" in headers) is is_in_vain


async def test_choices_that_do_not_fit_all_are_refused_before_the_first_is_opened(rig):
    rig.service.full = NodeFullError(744, 1024, 1.0, 2)
    status, body, _ = await rig.post(CHATS, {**CHAT, "n": 2})
    message = "744 requests wait already, this one asks for 2 choices, and the limit is 1024"
    assert (status, body["error"]["message"].partition(";")[0]) == (503, message)
    assert rig.service.streams == []
    assert (await rig.post(CHATS, CHAT))[0] == 200


async def test_if_one_choice_is_refused_the_others_are_cancelled(rig):
    rig.service.refuse = (1, NodeFullError(9, 8, 1.0))
    status, _, _ = await rig.post(CHATS, {**CHAT, "n": 2})
    assert status == 503
    assert rig.service.streams[0].cancelled.is_set()


async def test_one_failed_choice_fails_the_request_and_cancels_the_rest(rig):
    streams = iter([FakeStream([EngineError("m", "broke")]), FakeStream([asyncio.Event()])])
    rig.service.make_stream = lambda request: next(streams)
    status, body, _ = await rig.post(CHATS, {**CHAT, "n": 2})
    assert (status, body["error"]["type"]) == (500, "server_error")
    await rig.service.streams[1].cancelled.wait()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", CHATS, 405), ("DELETE", "/livez", 405)]
)  # fmt: skip
async def test_unknown_routes_have_the_same_error_shape(rig, method, path, status):
    async with rig.http.request(method, rig.url + path) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]
        assert ("Allow" in response.headers) is (status == 405)


async def test_a_path_tells_which_methods_it_takes(rig):
    for path, allowed in ((CHATS, "POST"), ("/livez", "GET,HEAD")):
        async with rig.http.delete(rig.url + path) as response:
            assert response.headers["Allow"] == allowed


async def test_what_can_be_read_can_be_asked_for_without_its_body(rig):
    for path in ("/livez", "/v1/models", "/metrics"):
        async with rig.http.head(rig.url + path) as response:
            assert (response.status, await response.read()) == (200, b"")
            assert int(response.headers["Content-Length"]) > 0


async def test_a_mistake_of_ours_is_a_500_that_names_the_request(rig, caplog):
    rig.service.models = lambda: 1 / 0
    status, body, headers = await rig.get("/v1/models")
    assert status == 500
    assert headers["x-request-id"] in body["error"]["message"]
    assert "ZeroDivisionError" in caplog.text


async def test_a_body_beyond_the_limit_is_refused():
    async with serving(max_body_bytes=1000) as rig:
        status, body, _ = await rig.post(CHATS, b"x" * 2000)
        assert (status, body["error"]["code"]) == (413, "body_too_large")


async def talk(rig, sent, *, upto=b"}}"):
    """Send bytes and return what is answered, up to the end of an error."""
    reader, writer = await asyncio.open_connection(*rig.url[7:].split(":"))
    writer.write(sent)
    answer = await reader.readuntil(upto)
    writer.close()
    return answer


def head_of(size, *lines):
    fields = "".join(f"{line}\r\n" for line in lines)
    return f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n{fields}\r\n".encode()


@pytest.mark.parametrize("lines", [(), ("Expect: 100-continue",)])
async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(rig, lines):
    answer = await talk(rig, head_of(1 << 40, *lines))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


async def test_a_client_that_asks_whether_to_send_is_told_to_go_on(rig):
    answer = await talk(rig, head_of(5, "Expect: 100-continue"), upto=b"\r\n\r\n")
    assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/livez", 200)])
async def test_what_a_client_expects_is_ignored_if_nobody_knows_it(rig, caplog, path, status):
    caplog.set_level("INFO")
    lines = b"Expect: something\r\nExpect: 100-continue\r\nConnection: close\r\n"
    head = b"GET %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (path.encode(), lines)
    answer = await talk(rig, head, upto=b"}")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id" in answer
    logged = [record.status for record in caplog.records if record.message == "request"]
    assert (b'"code":"' in answer, 404 in logged) == (status == 404, status == 404)


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever():
    async with serving(read_timeout_s=0.01) as rig:
        answer = await talk(rig, head_of(99) + b"{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"server.read_timeout_s" in answer


async def test_the_body_of_a_request_that_goes_nowhere_is_not_waited_for(rig):
    answer = await talk(rig, head_of(99).replace(CHATS.encode(), b"/nowhere"))
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_what_is_no_http_is_answered_like_everything_else(rig):
    for sent in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/9.x\r\n\r\n"):
        answer = await talk(rig, sent)
        assert answer.startswith(b"HTTP/1.")
        assert b" 400 " in answer
        assert b'"code":"malformed_request"' in answer
        assert b"x-request-id" in answer.lower()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_may_be_compressed(rig, encoding):
    packed = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    body = packed.compress(json.dumps(CHAT).encode()) + packed.flush()
    assert (await rig.post(CHATS, body, **{"Content-Encoding": encoding}))[0] == 200
    status, answer, _ = await rig.post(
        CHATS, body[:20] + b"xx" + body[22:], **{"Content-Encoding": encoding}
    )
    assert (status, answer["error"]["code"]) == (400, "malformed_request")
    assert rig.service.requests[1:] == []


@pytest.mark.parametrize("encoding", ["x-snappy", "br", "zstd", "BR"])
async def test_an_encoding_that_is_not_known_is_refused_and_not_ignored(rig, encoding):
    status, answer, headers = await rig.post(CHATS, b"{}", **{"Content-Encoding": encoding})
    assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")
    assert repr(encoding.lower()) in answer["error"]["message"]
    assert headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize("path", [CHATS, "/nowhere"])
async def test_a_body_that_is_no_gzip_is_no_error_of_the_node(rig, caplog, path):
    sent = head_of(3, "Content-Encoding: gzip").replace(CHATS.encode(), path.encode()) + b"abc"
    reader, writer = await asyncio.open_connection(*rig.url[7:].split(":"))
    writer.write(sent)
    answer = await reader.read()  # up to the end: what is logged after the answer is there, too
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 " if path == CHATS else b"HTTP/1.1 404 ")
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "ünicode"])
async def test_a_request_id_that_is_unfit_for_logs_is_replaced(rig, given):
    _, _, headers = await rig.get("/livez", **{"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{16}", headers["x-request-id"])


# --- who may come in ------------------------------------------------------------------------------


async def test_keys_open_what_they_are_for():
    async with serving(api_keys=("client",), admin_keys=("admin",)) as rig:
        for key, models, status in (("client", 200, 401), ("admin", 401, 200), ("", 401, 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert (await rig.get("/v1/models", **headers))[0] == models
            assert (await rig.get("/admin/status", **headers))[0] == status
        refusal = await rig.get("/v1/models", Authorization="Basic client")
        assert refusal[0] == 401
        assert refusal[2]["WWW-Authenticate"] == "Bearer"
        assert refusal[1]["error"]["code"] == "invalid_api_key"
        for path in ("/livez", "/readyz", "/health"):
            assert (await rig.get(path))[0] == 200


async def test_a_key_that_is_no_text_is_a_wrong_key():
    async with serving(api_keys=("k",)) as rig:
        head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\xe4\r\n\r\n"
        assert (await talk(rig, head)).startswith(b"HTTP/1.1 401 ")


async def test_client_keys_open_the_admin_endpoints_if_there_are_no_others():
    async with serving(api_keys=("k",)) as rig:
        assert (await rig.get("/admin/status", Authorization="Bearer k"))[0] == 200


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Host", "evil.example", 403), ("Host", "[::1", 403), ("Host", "localhost:80", 200),
        ("Origin", "https://evil.example", 403), ("Origin", "http://localhost:3000", 200), ("Origin", "null", 403),
    ],
)  # fmt: skip
async def test_web_pages_of_other_sites_cannot_drive_a_node_without_keys(
    rig, header, value, status
):
    found, body, _ = await rig.get("/v1/models", **{header: value})
    assert found == status
    assert status == 200 or body["error"]["code"] == "forbidden_origin"


async def test_a_key_is_enough_under_any_name():
    async with serving(api_keys=("k",)) as rig:
        headers = {"Host": "models.example", "Authorization": "Bearer k"}
        assert (await rig.get("/v1/models", **headers))[0] == 200


# --- the other endpoints --------------------------------------------------------------------------


async def test_models_carry_what_the_node_knows(rig):
    _, listed, _ = await rig.get("/v1/models")
    _, one, _ = await rig.get("/v1/models/m")
    assert listed["data"] == [one]
    assert one["sllm"]["progress"]["eta_s"] == 1.5
    assert one["sllm"]["bytes_by_tier"] == {"nvme": 200, "dram": 50}
    status, body, _ = await rig.get("/v1/models/some/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "'some/other'" in body["error"]["message"]
    assert body["error"]["param"] == "model"


async def test_admin_acts_reach_the_service(rig):
    for verb in ("load", "unload", "pin", "unpin"):
        status, body, _ = await rig.post(f"/admin/models/m/{verb}", {})
        assert (status, body["id"], body["state"]) == (200, "m", "loading")
    await rig.post("/admin/models/m/unload", {"force": True})
    _, cancelled, _ = await rig.post("/admin/requests/r-9/cancel", b"")
    await rig.post("/admin/drain", {})
    assert rig.service.acts == [
        ("load", "m"), ("unload", "m", False), ("pin", "m"), ("load", "m"), ("unpin", "m"),
        ("unload", "m", True), ("cancel", "r-9"),
    ]  # fmt: skip
    assert cancelled == {"cancelled": 2}
    assert (await rig.get("/readyz"))[0] == 503
    assert (await rig.post("/admin/undrain", b""))[1] == {"draining": False}
    assert (await rig.get("/readyz"))[0] == 200


@pytest.mark.parametrize("was_pinned", [True, False])
async def test_a_model_that_cannot_come_is_pinned_no_more_than_before(rig, was_pinned):
    rig.service.pinned = was_pinned
    rig.service.load_error = PinnedMemoryError("m", 9, 4, ("p",))
    assert (await rig.post("/admin/models/m/pin", {}))[0] == 503
    assert rig.service.pinned is was_pinned


async def test_a_pin_is_taken_back_though_who_asked_has_hung_up(rig):
    gate = asyncio.Event()

    async def load(_):
        began.set()
        await gate.wait()
        raise PinnedMemoryError("m", 9, 4, ("p",))

    async def unpin(_):
        rig.service.pinned = False
        taken_back.set()

    began, taken_back = asyncio.Event(), asyncio.Event()
    rig.service.load, rig.service.unpin = load, unpin
    asked = asyncio.create_task(rig.post("/admin/models/m/pin", {}))
    await began.wait()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    while b'status="499"' not in generate_latest(rig.metrics.registry):
        await asyncio.sleep(0)  # until the server has seen it
    gate.set()
    await taken_back.wait()


async def test_admin_bodies_are_strict(rig):
    for path in ("/admin/models/m/unload", "/admin/drain", "/admin/undrain"):
        status, body, _ = await rig.post(path, {"forced": True})
        assert (status, body["error"]["param"]) == (400, "forced")


async def test_status_is_one_object(rig):
    _, body, _ = await rig.get("/admin/status")
    assert body["node"] == {"id": "n"}
    assert body["models"][0]["id"] == "m"
    assert body["sessions"][0]["session"] == "r-0"


async def test_health_tells_a_stall(rig):
    assert (await rig.get("/health"))[0] == 200
    rig.stall = Stall("a step hangs", (ModelId("m"),))
    status, body, _ = await rig.get("/health")
    assert (status, body["reason"], body["models"]) == (503, "a step hangs", ["m"])
    assert (await rig.get("/livez"))[0] == 200


async def test_metrics_count_requests_by_route_and_not_by_what_clients_make_up(rig):
    await rig.get("/v1/models/x")
    await rig.get("/v1/models/y")
    await rig.get("/banana")
    async with rig.http.get(rig.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = await response.text()
    assert 'sllm_requests_total{route="/v1/models/{id}",status="404"} 2.0' in text
    assert 'sllm_requests_total{route="none",status="404"} 1.0' in text


async def test_the_access_log_names_request_model_tokens_and_user(rig, caplog):
    caplog.set_level("INFO")
    await rig.post(CHATS, {**CHAT, "user": "ann"}, **{"x-request-id": "r-7"})
    record = next(r for r in caplog.records if r.message == "request")
    assert (record.status, record.prompt_tokens, record.completion_tokens, record.user) == (
        200,
        8,
        6,
        "ann",
    )


async def test_an_address_that_is_taken_is_told():
    async with serving() as rig:
        port = int(rig.url.rsplit(":", 1)[1])
        with pytest.raises(ListenError, match=str(port)):
            async with serving(port=port):
                pass


def test_every_route_has_one_handler_and_one_audience():
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    assert all(route.access == "admin" for route in ROUTES if route.path.startswith("/admin"))
