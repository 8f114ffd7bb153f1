import json
import threading

import pytest

from sllm_node.core.errors import PromptTooLongError
from sllm_node.server.openai import CompletionRequest, Message, parse_chat
from sllm_node.server.prompts import LARGE_BODY, LONG_CHARACTERS, MESSAGE_CHARACTERS, Prompts
from tests.unit.server.fake_service import FakeCodec


@pytest.fixture
def prompts():
    made = Prompts()
    yield made
    made.close()


def current_thread(_):
    return threading.current_thread()


async def test_a_large_body_is_parsed_away_from_the_event_loop(prompts):
    here = threading.current_thread()
    assert await prompts.parsed(current_thread, bytes(LARGE_BODY)) is not here
    assert await prompts.parsed(current_thread, bytes(LARGE_BODY - 1)) is here


class Uncopied(list):
    """Fails who goes through all of it."""

    def __iter__(self):
        raise AssertionError("copied")


async def test_tokens_that_are_too_many_are_refused_before_they_are_copied(prompts):
    request = CompletionRequest(model="m", prompt=[Uncopied(range(100))])
    with pytest.raises(PromptTooLongError) as caught:
        await prompts.of(request, FakeCodec(), limit=100)
    assert caught.value.param == "prompt"


async def test_the_messages_of_a_conversation_are_read_where_its_text_becomes_tokens(prompts):
    request = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}')
    threads = []

    class Watched(Message):
        def as_template_input(self):
            threads.append(threading.current_thread())
            return super().as_template_input()

    request.messages = [Watched(role="user", content="Hi")]
    codec = FakeCodec()
    assert await prompts.of(request, codec, limit=100) == [tuple(map(ord, "user:Hi;"))]
    assert threads == codec.threads
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(("missing", "is_long"), [(0, True), (1, False)])
async def test_very_many_messages_are_long_however_short_they_are(prompts, missing, is_long):
    message = {"role": "user", "content": ""}
    count = LONG_CHARACTERS // MESSAGE_CHARACTERS - missing
    request = parse_chat(json.dumps({"model": "m", "messages": [message] * count}).encode())
    codec = FakeCodec()
    await prompts.of(request, codec, limit=1 << 30)
    (thread,) = codec.threads
    assert ("long" in thread.name) is is_long
