"""POST /v1/chat/completions and /v1/completions: from a body to sessions, from chunks to an answer."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import HttpVersion11, web

from sllm_node.core import log as logs
from sllm_node.core.clock import Clock
from sllm_node.core.config import ServerConfig
from sllm_node.core.errors import (
    PROMPT_LIMIT,
    InternalError,
    InvalidRequestError,
    PromptTooLongError,
    SllmError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    ModelId,
    ModelStatus,
    SamplingParameters,
    SessionId,
    TokenIds,
)
from sllm_node.server import explaining
from sllm_node.server.faults import body_of
from sllm_node.server.openai import (
    ChatRequest,
    CompletionRequest,
    Wish,
    limit_name,
    parse_chat,
    parse_completion,
    prompts_of,
    wish_of,
)
from sllm_node.server.prompts import Prompts, characters_of
from sllm_node.server.responses import ChatShape, Choice, CompletionShape, Reply, Usage
from sllm_node.server.service import GenerationService, Stream, TextCodec
from sllm_node.server.stream import (
    HEADERS,
    EventWriter,
    items,
    merged,
    progress_text,
)

log = logging.getLogger(__name__)


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
        if chunk.finish is not None and index % self.request.n == 0:
            self.usage.cached += chunk.cached_tokens  # a prompt counts once, as it was first met


_HELD_INTERVALS: Final = 5
"""So long a stream's status stays open while its model's tokenizer is read, then comments begin."""

current_job: Final[ContextVar[Job | None]] = ContextVar("current_job", default=None)
"""The job of the request under way: for the access log."""


class Completions:
    """The two endpoints of generation."""

    def __init__(
        self,
        service: GenerationService,
        resolve: Callable[[str], str],
        config: ServerConfig,
        clock: Clock,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        self._service = service
        self._resolve = resolve
        """From a client's name of a model to the model."""
        self._config = config
        self._clock = clock
        self._draw_seed = draw_seed
        self._prompts = Prompts()

    def close(self) -> None:
        """Stop the worker threads."""
        self._prompts.close()

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """Answer a chat request."""
        request = await self._prompts.parsed(parse_chat, await http.read())
        return await self._answer(http, request, ChatShape())

    async def complete(self, http: web.Request) -> web.StreamResponse:
        """Answer a completion request."""
        request = await self._prompts.parsed(parse_completion, await http.read())
        return await self._answer(http, request, CompletionShape())

    # --- what both do -------------------------------------------------------------------------

    async def _answer(
        self,
        http: web.Request,
        request: ChatRequest | CompletionRequest,
        shape: ChatShape | CompletionShape,
    ) -> web.StreamResponse:
        request.model = self._resolve(request.model)
        logs.model_id.set(request.model)
        if request.stream:
            return await self._stream(http, request, shape)
        codec = await self._prepare(request)
        return await self._collect(http, *await self._begun(request, shape, codec))

    async def _prepare(self, request: ChatRequest | CompletionRequest) -> TextCodec:
        self._service.expect(request.model, characters_of(request))
        return await self._service.prepare(request.model)

    async def _begun(
        self,
        request: ChatRequest | CompletionRequest,
        shape: ChatShape | CompletionShape,
        codec: TextCodec,
    ) -> tuple[Job, list[Stream]]:
        """Check the request and open its sessions."""
        wish = wish_of(
            request,
            random_seed=self._draw_seed(),
            max_choices=self._config.max_choices,
            vocabulary=codec.vocabulary_size,
        )
        self._check_choices(request)
        limit = self._service.context_limit(request.model)
        prompts = await self._prompts.of(request, codec, limit)
        job = await self._job(request, wish, shape, codec, prompts)
        current_job.set(job)
        return job, self._open(request, wish, prompts, limit)

    def _check_choices(self, request: ChatRequest | CompletionRequest) -> None:
        """Refuse a request whose sessions would never be taken all together."""
        prompts = 1 if isinstance(request, ChatRequest) else len(prompts_of(request))
        sessions, limit = request.n * prompts, self._service.session_limit
        if sessions > limit:
            raise InvalidRequestError(
                f"the request asks for {sessions} choices and this node takes {limit} of a model "
                "at once (schedule.max_queue and engine.max_sessions); send fewer in a request",
                param="n" if request.n > 1 else "prompt",
            )

    async def _job(
        self,
        request: ChatRequest | CompletionRequest,
        wish: Wish,
        shape: ChatShape | CompletionShape,
        codec: TextCodec,
        prompts: Sequence[TokenIds],
    ) -> Job:
        reply = Reply(
            f"{shape.prefix}{_request_id()}", request.model, int(self._clock.wall()),
            wish.logprobs is not None,
        )  # fmt: skip
        texts = [""] * len(prompts)
        if isinstance(request, CompletionRequest) and request.echo:
            texts = [await self._prompts.text(codec, given) for given in prompts_of(request)]
        choices = [
            Choice(i * request.n + j, text)
            for i, text in enumerate(texts)
            for j in range(request.n)
        ]
        usage = Usage(prompt=sum(len(prompt) for prompt in prompts))
        return Job(request, shape, reply, choices, usage)

    def _open(
        self,
        request: ChatRequest | CompletionRequest,
        wish: Wish,
        prompts: Sequence[TokenIds],
        limit: int,
    ) -> list[Stream]:
        """Open a session for each choice; if one is refused, none is left."""
        streams: list[Stream] = []
        if (sessions := request.n * len(prompts)) > 1:
            self._service.check_room(request.model, sessions)
        try:
            for i, prompt in enumerate(prompts):
                for j in range(request.n):
                    session = SessionId(f"{_request_id()}-{i * request.n + j}")
                    sampling = wish.for_choice(i, j, request.n)
                    asked = _generation(request, wish, prompt, session, sampling, limit)
                    streams.append(self._service.open(asked, keep_alive_s=wish.keep_alive_s))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    async def _collect(
        self, http: web.Request, job: Job, streams: Sequence[Stream]
    ) -> web.Response:
        """Wait for all choices and answer with one object."""
        async with merged(streams, self._config.progress_interval_s) as queue:
            async for item in items(queue, streams, self._config.progress_interval_s):
                if not isinstance(item, ModelStatus):
                    for index, chunk in item:
                        job.add(index, chunk)
        whole = job.shape.whole(job.reply, job.choices, job.usage)
        told = explaining.headers(streams) if explaining.is_wished(http) else {}
        return web.Response(body=orjson.dumps(whole), content_type="application/json", headers=told)

    # --- streaming ----------------------------------------------------------------------------

    async def _stream(
        self,
        http: web.Request,
        request: ChatRequest | CompletionRequest,
        shape: ChatShape | CompletionShape,
    ) -> web.StreamResponse:
        """Send chunks as they come.

        Headers go out with the first chunk, or the first comment while the model loads or nobody gives
        its tokenizer: a failure before that is answered with its own status, one after it as an event.
        """
        response = web.StreamResponse(headers=HEADERS)
        if http.version < HttpVersion11:
            response.force_close()  # it has no chunks: only the connection's end tells the stream's
        writer = EventWriter(response)
        try:
            codec = await self._prepare_audibly(http, response, writer, request)
            job, streams = await self._begun(request, shape, codec)
            await self._send(http, response, writer, job, streams)
        except ConnectionError:
            raise
        except Exception as error:
            if not response.prepared:
                raise
            await writer.data(body_of(_told(error, http)))
        return response

    async def _prepare_audibly(
        self,
        http: web.Request,
        response: web.StreamResponse,
        writer: EventWriter,
        request: ChatRequest | CompletionRequest,
    ) -> TextCodec:
        """Return the model's codec; if that takes long, comments say so meanwhile."""
        task = asyncio.create_task(self._prepare(request), name="codec")
        interval_s = self._config.progress_interval_s
        wait_s = _HELD_INTERVALS * interval_s
        try:
            while not task.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await asyncio.shield(task)
                if task.done():
                    break
                if not response.prepared:
                    await response.prepare(http)
                await writer.comment(f"{request.model} waits for a node that gives its tokenizer")
                wait_s = interval_s
            return await task
        finally:
            task.cancel()

    async def _send(
        self,
        http: web.Request,
        response: web.StreamResponse,
        writer: EventWriter,
        job: Job,
        streams: Sequence[Stream],
    ) -> None:
        async with merged(streams, self._config.progress_interval_s) as queue:
            is_begun = False
            async for item in items(queue, streams, self._config.progress_interval_s):
                if not is_begun:
                    is_begun = True
                    if explaining.is_wished(http) and not response.prepared:
                        response.headers.update(explaining.headers(streams))
                    await self._begin(http, response, writer, job)
                if isinstance(item, ModelStatus):
                    await writer.comment(progress_text(item))
                else:
                    await writer.data(*_pieces(job, item))
                    for index, _ in item:
                        streams[index].passed_on()
        if explaining.is_wished(http):
            await writer.comment(explaining.comment(streams))
        await self._end(writer, job)

    async def _begin(
        self, http: web.Request, response: web.StreamResponse, writer: EventWriter, job: Job
    ) -> None:
        if not response.prepared:
            await response.prepare(http)
        for choice in job.choices:
            opening = job.shape.opening(job.reply, choice)
            if opening is not None:
                await writer.data(_with_usage_slot(job, opening))

    async def _end(self, writer: EventWriter, job: Job) -> None:
        if _wants_usage(job):
            await writer.data(job.shape.usage(job.reply, job.usage))
        await writer.done()


def _request_id() -> str:
    return logs.request_id.get() or ""


def _told(error: Exception, http: web.Request) -> SllmError:
    """Return what the client is told of a failure in the middle of a stream."""
    if isinstance(error, SllmError):
        return error
    log.error("request failed", exc_info=error, extra={"path": http.path})
    return InternalError(_request_id())


def _pieces(job: Job, chunks: Sequence[tuple[int, GenerationChunk]]) -> Iterator[dict[str, Any]]:
    """Take chunks in and yield the event of each that has something to show."""
    for index, chunk in chunks:
        job.add(index, chunk)
        if chunk.text or chunk.finish is not None or (chunk.logprobs and job.reply.with_logprobs):
            piece = job.shape.piece(job.reply, job.choices[index], chunk.text, chunk)
            yield _with_usage_slot(job, piece)


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
    sampling: SamplingParameters,
    limit: int,
) -> GenerationRequest:  # fmt: skip
    left = limit - len(prompt)
    if wish.max_tokens is not None and wish.max_tokens > left:
        raise PromptTooLongError(
            len(prompt) + wish.max_tokens, limit, PROMPT_LIMIT, param=limit_name(request)
        )
    return GenerationRequest(
        session=session,
        model=ModelId(request.model),
        prompt=prompt,
        sampling=sampling,
        max_tokens=wish.max_tokens or left,
        open_ended=wish.max_tokens is None,
        stop=wish.stop,
        ignore_eos=request.ignore_eos,
        logprobs=wish.logprobs,
        cache_salt=request.cache_salt or "",
    )
