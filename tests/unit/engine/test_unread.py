"""What a reader that lags gets."""

import asyncio

import pytest

from sllm_node.core.errors import InternalError
from sllm_node.core.types import GenerationChunk
from sllm_node.engine.unread import Unread


def chunk(*tokens, finish=None):
    return GenerationChunk("".join(map(str, tokens)), tokens, (), finish, None, len(tokens))


async def test_what_came_since_the_last_look_is_one_chunk():
    unread = Unread()
    unread.add(chunk(1))
    unread.add(chunk(2, 3, finish="stop"))
    unread.end()
    assert [one async for one in unread] == [
        GenerationChunk("123", (1, 2, 3), (), "stop", None, 2)
    ]  # fmt: skip


async def test_a_reader_waits_for_the_next_chunk():
    unread = Unread()
    reading = asyncio.create_task(anext(unread))
    await asyncio.sleep(0)
    unread.add(chunk(1))
    assert (await reading).tokens == (1,)
    assert not unread


async def test_an_error_comes_after_what_is_unread():
    unread = Unread()
    unread.add(chunk(1))
    unread.end(InternalError("s"))
    assert (await anext(unread)).tokens == (1,)
    with pytest.raises(InternalError):
        await anext(unread)
