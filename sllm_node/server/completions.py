"""POST /v1/chat/completions and /v1/completions: from a body to sessions, from chunks to an answer."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson
from aiohttp import web

from sllm_node.core import log as logs
from sllm_node.core.clock import Clock
from sllm_node.core.config import ServerConfig
from sllm_node.core.errors import PromptTooLongError, SllmError
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelId,
    ModelStatus,
    SessionId,
    TokenIds,
)
from sllm_node.server.faults import body_of
from sllm_node.server.openai import (
    ChatRequest,
    CompletionRequest,
    Wish,
    parse_chat,
    parse_completion,
    prompts_of,
    wish_of,
)
from sllm_node.server.responses import ChatShape, Choice, CompletionShape, Reply, Usage
from sllm_node.server.service import GenerationService, Stream, TextCodec
from sllm_node.server.stream import HEADERS, EventWriter, abort, items, merged, progress_text

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
TOKENIZER_THREADS: Final = 2
"""Prompts that are made into tokens at once; others wait."""


@dataclass(slots=True)
class Job:
    """A request on its way: what is asked, how it is answered, what came so far."""

    request: ChatRequest | CompletionRequest
    shape: ChatShape | CompletionShape
    reply: Reply
    choices: list[Choice]
    usage: Usage

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Take a chunk of choice `index` in."""
        self.choices[index].add(chunk)
        self.usage.completion += len(chunk.tokens)


current_job: Final[ContextVar[Job | None]] = ContextVar("current_job", default=None)
"""The job of the request under way: for the access log."""


class Completions:
    """The two endpoints of generation."""

    def __init__(
        self,
        service: GenerationService,
        config: ServerConfig,
        clock: Clock,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        self._service = service
        self._config = config
        self._clock = clock
        self._draw_seed = draw_seed
        self._workers = ThreadPoolExecutor(TOKENIZER_THREADS, "sllm-tokenize")

    def close(self) -> None:
        """Stop the worker threads."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """Answer a chat request."""
        request = parse_chat(await http.read())
        codec = await self._prepare(request.model)
        messages = [message.as_template_input() for message in request.messages]
        prompt = await self._in_worker(codec.render_chat, messages)
        return await self._answer(http, request, ChatShape(), codec, [prompt])

    async def complete(self, http: web.Request) -> web.StreamResponse:
        """Answer a completion request."""
        request = parse_completion(await http.read())
        codec = await self._prepare(request.model)
        prompts = [await self._tokens(codec, prompt) for prompt in prompts_of(request)]
        return await self._answer(http, request, CompletionShape(), codec, prompts)

    # --- what both do -------------------------------------------------------------------------

    async def _prepare(self, model: str) -> TextCodec:
        logs.model_id.set(model)
        return await self._service.prepare(model)

    async def _tokens(self, codec: TextCodec, prompt: str | list[int]) -> TokenIds:
        if isinstance(prompt, str):
            return await self._in_worker(codec.encode, prompt)
        return tuple(prompt)

    async def _in_worker(self, work: Callable[..., ResultT], *values: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *values)

    async def _answer(
        self,
        http: web.Request,
        request: ChatRequest | CompletionRequest,
        shape: ChatShape | CompletionShape,
        codec: TextCodec,
        prompts: Sequence[TokenIds],
    ) -> web.StreamResponse:
        wish = wish_of(
            request,
            random_seed=self._draw_seed(),
            max_choices=self._config.max_choices,
            vocabulary=codec.vocabulary_size,
        )
        request_id = logs.request_id.get() or ""
        reply = Reply(
            f"{shape.prefix}{request_id}", request.model, int(self._clock.wall()),
            wish.logprobs is not None,
        )  # fmt: skip
        choices = [
            Choice(i * request.n + j, await self._echo(request, codec, prompt))
            for i, prompt in enumerate(prompts)
            for j in range(request.n)
        ]
        usage = Usage(prompt=sum(len(prompt) for prompt in prompts))
        job = Job(request, shape, reply, choices, usage)
        current_job.set(job)
        streams = self._open(request, wish, prompts, request_id)
        if request.stream:
            return await self._stream(http, job, streams)
        return await self._collect(job, streams)

    async def _echo(
        self, request: ChatRequest | CompletionRequest, codec: TextCodec, prompt: TokenIds
    ) -> str:
        if isinstance(request, CompletionRequest) and request.echo:
            return await self._in_worker(codec.decode, prompt)
        return ""

    def _open(
        self,
        request: ChatRequest | CompletionRequest,
        wish: Wish,
        prompts: Sequence[TokenIds],
        request_id: str,
    ) -> list[Stream]:
        """Open a session for each choice; if one is refused, none is left."""
        limit = self._service.context_limit(request.model)
        streams: list[Stream] = []
        try:
            for i, prompt in enumerate(prompts):
                for j in range(request.n):
                    session = SessionId(f"{request_id}-{i * request.n + j}")
                    asked = _generation(request, wish, prompt, session, j, limit)
                    streams.append(self._service.open(asked, keep_alive_s=wish.keep_alive_s))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    async def _collect(self, job: Job, streams: Sequence[Stream]) -> web.Response:
        """Wait for all choices and answer with one object."""
        async with merged(streams) as queue:
            async for item in items(queue, streams, self._config.progress_interval_s):
                if not isinstance(item, ModelStatus):
                    job.add(*item)
        whole = job.shape.whole(job.reply, job.choices, job.usage)
        return web.Response(body=orjson.dumps(whole), content_type="application/json")

    # --- streaming ----------------------------------------------------------------------------

    async def _stream(
        self, http: web.Request, job: Job, streams: Sequence[Stream]
    ) -> web.StreamResponse:
        """Send chunks as they come.

        Headers go out with the first chunk, or the first comment while the model loads: a failure
        before that is answered with its own status, one after it as an event.
        """
        response = web.StreamResponse(headers=HEADERS)
        writer = EventWriter(response, self._config.write_timeout_s)
        try:
            async with merged(streams) as queue:
                async for item in items(queue, streams, self._config.progress_interval_s):
                    if not response.prepared:
                        await self._begin(http, response, writer, job)
                    if isinstance(item, ModelStatus):
                        await writer.comment(progress_text(item))
                    else:
                        await self._piece(writer, job, *item)
            await self._end(writer, job)
        except SllmError as error:
            if not response.prepared:
                raise
            await writer.data(body_of(error))
        except TimeoutError:
            log.warning("client takes no bytes, dropped", extra={"limit_s": writer.timeout_s})
            abort(http)
        return response

    async def _begin(
        self, http: web.Request, response: web.StreamResponse, writer: EventWriter, job: Job
    ) -> None:
        response.headers["x-request-id"] = logs.request_id.get() or ""
        await response.prepare(http)
        for choice in job.choices:
            opening = job.shape.opening(job.reply, choice)
            if opening is not None:
                await writer.data(_with_usage_slot(job, opening))

    async def _piece(
        self, writer: EventWriter, job: Job, index: int, chunk: GenerationChunk
    ) -> None:
        job.add(index, chunk)
        if chunk.text or chunk.finish is not None or (chunk.logprobs and job.reply.with_logprobs):
            piece = job.shape.piece(job.reply, job.choices[index], chunk.text, chunk)
            await writer.data(_with_usage_slot(job, piece))

    async def _end(self, writer: EventWriter, job: Job) -> None:
        if _wants_usage(job):
            await writer.data(job.shape.usage(job.reply, job.usage))
        await writer.done()


def _wants_usage(job: Job) -> bool:
    options = job.request.stream_options
    return options is not None and options.include_usage


def _with_usage_slot(job: Job, event: dict[str, Any]) -> dict[str, Any]:
    """Add OpenAI's `usage: null` to a chunk of a stream that ends with usage."""
    return {**event, "usage": None} if _wants_usage(job) else event


def _generation(
    request: ChatRequest | CompletionRequest,
    wish: Wish,
    prompt: TokenIds,
    session: SessionId,
    choice: int,
    limit: int,
) -> GenerationRequest:  # fmt: skip
    left = limit - len(prompt)
    if left < 1:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise PromptTooLongError(len(prompt) + 1, limit, "this node", param=param)
    if wish.max_tokens is not None and wish.max_tokens > left:
        raise PromptTooLongError(
            len(prompt) + wish.max_tokens, limit, "this node", param="max_tokens"
        )
    return GenerationRequest(
        session=session,
        model=ModelId(request.model),
        prompt=prompt,
        sampling=wish.for_choice(choice),
        max_tokens=wish.max_tokens or left,
        stop=wish.stop,
        ignore_eos=request.ignore_eos,
        logprobs=wish.logprobs,
    )
