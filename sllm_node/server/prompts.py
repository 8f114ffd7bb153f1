"""From a request's prompts to tokens, and every check that needs no model on the device.

Texts become tokens in worker threads. Long texts have a thread of their own: one can take seconds,
also when its client is gone, and short ones must not wait for it. A request of a few words doesn't go to a thread:
they take less than the way there and back, on which a request waits twice for whoever holds the interpreter.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from sllm_node.core.errors import PROMPT_LIMIT, InvalidRequestError, PromptTooLongError
from sllm_node.core.types import TokenIds
from sllm_node.server.openai import ChatRequest, CompletionRequest, Message, prompts_of
from sllm_node.server.service import TextCodec

ResultT = TypeVar("ResultT")
SHORT_THREADS: Final = 2
"""Short texts that are made into tokens at once; others wait."""
FEW_CHARACTERS: Final = 256
"""Up to here the texts of a request are a few words: about 0.1 ms of work."""
FEW_PROMPTS: Final = 8
"""Short as they may be, each takes some microseconds."""
LARGE_BODY: Final = 1 << 18
"""Bytes; up to here a body is parsed within milliseconds, whatever is in it."""
LONG_CHARACTERS: Final = 1 << 17
"""From here on a text is long: some 50 ms of work."""
MESSAGE_CHARACTERS: Final = 32
"""What each message is worth beside its text: a template takes 2 to 5 us for it, and adds about 25 characters."""


class Prompts:
    """Makes tokens of prompts."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "sllm-tokenize")
        self._long = ThreadPoolExecutor(1, "sllm-tokenize-long")

    def close(self) -> None:
        """Stop the threads."""
        for workers in (self._short, self._long):
            workers.shutdown(wait=False, cancel_futures=True)

    async def of(
        self, request: ChatRequest | CompletionRequest, codec: TextCodec, limit: int
    ) -> list[TokenIds]:
        """Return the tokens of each prompt.

        Raises:
            InvalidRequestError: a prompt is empty, or has tokens that the model doesn't know.
            PromptTooLongError: a prompt and one token more exceed `limit`.
        """
        if isinstance(request, ChatRequest):
            render = partial(_rendered, codec, request.messages, limit)
            prompt = await self._in_worker(characters_of(request), render)
            return [_checked(prompt, codec.vocabulary_size, limit, "messages")]
        prompts, found = prompts_of(request), []
        is_few = len(prompts) <= FEW_PROMPTS and characters_of(request) <= FEW_CHARACTERS
        for given in prompts:
            tokens = await self._tokens(codec, given, limit, is_few=is_few)
            found.append(_checked(tokens, codec.vocabulary_size, limit, "prompt"))
        return found

    async def parsed(self, parse: Callable[[bytes], ResultT], body: bytes) -> ResultT:
        """Return what `parse` makes of a body; of a large one away from the event loop."""
        if len(body) < LARGE_BODY:
            return parse(body)
        return await self._in_worker(0, partial(parse, body))  # never seconds, as long texts take

    async def text(self, codec: TextCodec, prompt: str | list[int]) -> str:
        """Return a prompt as text: as it came, or what its tokens stand for, special ones too."""
        if isinstance(prompt, str):
            return prompt
        decode = partial(codec.decode, tuple(prompt), with_special=True)
        return await self._in_worker(len(prompt), decode)

    async def _tokens(
        self, codec: TextCodec, prompt: str | list[int], limit: int, *, is_few: bool
    ) -> TokenIds:
        if isinstance(prompt, str) and is_few:
            return codec.encode(prompt, limit=limit)
        if isinstance(prompt, str):
            return await self._in_worker(len(prompt), partial(codec.encode, prompt, limit=limit))
        _check_length(prompt, limit, "prompt")  # before it is copied
        return tuple(prompt)

    async def _in_worker(self, size: int, work: Callable[[], ResultT]) -> ResultT:
        workers = self._short if size < LONG_CHARACTERS else self._long
        return await asyncio.get_running_loop().run_in_executor(workers, work)


def characters_of(request: ChatRequest | CompletionRequest) -> int:
    """Return the characters of a request that are to become tokens, those of a chat template about."""
    if isinstance(request, ChatRequest):
        return request.characters + MESSAGE_CHARACTERS * len(request.messages)
    return sum(len(given) for given in prompts_of(request) if isinstance(given, str))


def _rendered(codec: TextCodec, messages: Sequence[Message], limit: int) -> TokenIds:
    inputs = [message.as_template_input() for message in messages]
    return codec.render_chat(inputs, limit=limit)


def _checked(prompt: TokenIds, vocabulary: int, limit: int, param: str) -> TokenIds:
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens", param=param)
    _check_length(prompt, limit, param)
    if max(prompt) >= vocabulary:
        raise InvalidRequestError(
            f"{param} has the token id {max(prompt)}; this model's are 0 to {vocabulary - 1}",
            param=param,
        )
    return prompt


def _check_length(prompt: Sequence[int], limit: int, param: str) -> None:
    if len(prompt) >= limit:
        raise PromptTooLongError(len(prompt) + 1, limit, PROMPT_LIMIT, param=param)
