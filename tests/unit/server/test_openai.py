import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.errors import InvalidRequestError
from sllm_node.server.openai import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
    parse_keep_alive,
    prompts_of,
    wish_of,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}


def refused(parse, body):
    with pytest.raises(InvalidRequestError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value.param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 3}, "model"), ({"model": ""}, "model"),
        ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": 2.1}, "temperature"), ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1 << 63}, "top_k"),
        ({"min_p": 2}, "min_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"), ({"seed": 1 << 63}, "seed"), ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"), ({"max_tokens": 0}, "max_tokens"),
        ({"cache_salt": ""}, "cache_salt"), ({"cache_salt": "x" * 1025}, "cache_salt"), ({"cache_salt": 3}, "cache_salt"),
        ({"user": "x" * 1025}, "user"), ({"safety_identifier": "x" * 1025}, "safety_identifier"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": 5}, "stop"), ({"stop": [5]}, "stop[0]"),
        ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"logprobs": 3}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {}}, "audio"), ({"modalities": ["audio"]}, "modalities"),
        ({"prediction": {}}, "prediction"), ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"), ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"a": "b"}}, "metadata"), ({"web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
        (
            {"messages": [{"role": "assistant", "content": "x", "provider_specific_fields": {"a": 1}}]},
            "messages[0].provider_specific_fields",
        ),
        ({"messages": [None]}, "messages[0]"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"banana": None}, "banana"), ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_request_is_named(change, param):
    assert refused(parse_chat, {**CHAT, **change}) == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [[1], "a", 2]}, "prompt[2]"), ({"prompt": 3}, "prompt"), ({"prompt": {}}, "prompt"),
        ({"prompt": None}, "prompt"), ({"prompt": [[-1]]}, "prompt[0][0]"),
        ({"prompt": [[]] * 129}, "prompt"), ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"), ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_completion_request_is_named(change, param):
    assert refused(parse_completion, {**COMPLETION, **change}) == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff", b"[" * 5000])
def test_a_body_that_is_no_object_is_refused(body):
    assert refused(parse_chat, body) is None


NEUTRAL = {
    "tools": [], "tool_choice": "auto", "functions": [], "response_format": {"type": "text"},
    "modalities": ["text"], "store": False, "service_tier": "auto", "parallel_tool_calls": True,
    "metadata": {}, "audio": None, "reasoning_effort": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_taken():
    known = dict.fromkeys(("temperature", "seed", "stop", "stream_options", "logprobs"))
    assert parse_chat(json.dumps({**CHAT, **NEUTRAL, **known}).encode()) == parse_chat(
        json.dumps(CHAT).encode()
    )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
)  # fmt: skip
def test_any_body_is_parsed_or_refused_with_a_type(change):
    for parse, base in ((parse_chat, CHAT), (parse_completion, COMPLETION)):
        with contextlib.suppress(InvalidRequestError):
            request = parse(json.dumps({**base, **change}).encode())
            wish = wish_of(request, random_seed=1, max_choices=4, vocabulary=10)
            assert 0 <= wish.sampling.seed < 1 << 64


def wish(**change):
    request = parse_chat(json.dumps({**CHAT, **change}).encode())
    return wish_of(request, random_seed=77, max_choices=4, vocabulary=10)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 5}, "n"), ({"stop": ["x"] * 17}, "stop"), ({"stop": ""}, "stop"),
        ({"logit_bias": {"10": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"keep_alive": "soon"}, "keep_alive"), ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ],
)  # fmt: skip
def test_what_types_cannot_say_is_refused_by_name(change, param):
    with pytest.raises(InvalidRequestError) as caught:
        wish(**change)
    assert caught.value.param == param


def test_a_wish_carries_every_field():
    made = wish(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"3": 2}, seed=-1, stop="x", logprobs=True, top_logprobs=4,
        max_completion_tokens=9, keep_alive="5m",
    )  # fmt: skip
    s = made.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 5, 0.1)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.1, 1, -1)
    assert (s.logit_bias, s.seed) == (((3, 2.0),), (1 << 64) - 1)
    assert (made.stop, made.logprobs, made.max_tokens, made.keep_alive_s) == (("x",), 4, 9, 300.0)


def test_choices_have_seeds_of_their_own_and_the_first_has_the_requests():
    made = wish(seed=5)
    seeds = [made.for_choice(0, choice, 4).seed for choice in range(4)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert wish().sampling.seed == 77


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0), (90, 90), (-1, -1), ("-1", -1), ("90", 90), ("5m", 300), ("1.5h", 5400), ("250ms", 0.25)],
)  # fmt: skip
def test_keep_alive_is_read_in_seconds_or_with_a_unit(value, seconds):
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "", "m5", "5 parsecs"])
def test_what_is_no_duration_is_refused(value):
    with pytest.raises(InvalidRequestError):
        parse_keep_alive(value)


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)  # fmt: skip
def test_prompts_are_texts_or_tokens(prompt, expected):
    assert (
        prompts_of(parse_completion(json.dumps({**COMPLETION, "prompt": prompt}).encode()))
        == expected
    )


def test_the_prompts_of_a_request_are_made_once():
    request = parse_completion(json.dumps({**COMPLETION, "prompt": [1, 2]}).encode())
    assert prompts_of(request) is prompts_of(request)


@pytest.mark.parametrize("space", [" ", " " * 100, "\n\t"])
def test_prompts_may_be_written_with_spaces(space):
    for prompt in ("[1]", '["a"]', "[[1]]"):
        spaced = prompt.replace("[", "[" + space)
        assert parse_completion(b'{"model": "m", "prompt": %b}' % spaced.encode()) == (
            parse_completion(b'{"model": "m", "prompt": %b}' % prompt.encode())
        )


@pytest.mark.parametrize("name", ["stop", "user", "logit_bias", "model"])
def test_only_prompts_may_be_long(name):
    with pytest.raises(InvalidRequestError, match=f"{name} has 400001 bytes") as caught:
        parse_chat(json.dumps({**CHAT, name: "x" * 399_999}).encode())
    assert caught.value.param == name
    long = [{"role": "user", "content": "x" * 399_999}]
    assert parse_chat(json.dumps({**CHAT, "messages": long}).encode()).characters == 399_999


def test_the_characters_of_a_conversation_are_counted_while_it_is_parsed():
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    request = parse_chat(json.dumps({**CHAT, "messages": [*messages, *CHAT["messages"]]}).encode())
    request.messages = []
    assert request.characters == 5


def test_message_parts_are_joined_and_developers_are_systems():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {**CHAT, "messages": [{"role": "developer", "content": parts, "name": "n"}]}
    message = parse_chat(json.dumps(body).encode()).messages[0]
    assert message.as_template_input() == {"role": "system", "content": "ab", "name": "n"}


def test_our_own_answers_can_be_sent_back_as_they_are():
    nothing = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations"))
    answers = [
        {"role": "assistant", "content": "Hello", **nothing},
        {"role": "assistant", "content": None, "tool_calls": [], "annotations": []},
        {"role": "assistant", "content": "Hi", "parsed": None, "thinking_blocks": None},
        {
            "role": "assistant",
            "content": "Hi",
            "provider_specific_fields": {"refusal": None, "x": [], "y": {}},
        },
    ]
    messages = parse_chat(json.dumps({**CHAT, "messages": answers}).encode()).messages
    assert [message.as_template_input() for message in messages] == [
        {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi"},
    ]  # fmt: skip


def test_obfuscation_can_be_declined():
    options = {"include_usage": True, "include_obfuscation": False}
    body = {**CHAT, "stream": True, "stream_options": options}
    found = parse_chat(json.dumps(body).encode()).stream_options
    assert found is not None
    assert found.include_usage
