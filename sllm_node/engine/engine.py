"""A replica: sessions in, chunks out. The asyncio shell around batch, runner and text.

One task steps as long as there is something to do: `batch.plan` says what goes together, the step
thread computes it, `_take` hands out the tokens. All state lives on the event loop; a cancelled
session's blocks are free at once, or right after the step that works on it. A step that fails ends
the sessions that were in it, and no other.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sllm_node.core.clock import Clock
from sllm_node.core.config import EngineConfig
from sllm_node.core.errors import (
    CancelledByOperatorError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import FinishReason, GenerationRequest, ModelId, TokenLogprob
from sllm_node.device.base import DeviceBuffer
from sllm_node.engine.arriving import Arriving, WeightsMissingError
from sllm_node.engine.batch import Batch, Part
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.generation import Generation
from sllm_node.engine.kv import KvCache, KvPart
from sllm_node.engine.runner import Runner, StepPart
from sllm_node.engine.sampling import Drawn, SamplingRow, check_parameters
from sllm_node.engine.session import Session
from sllm_node.engine.skeleton import Model
from sllm_node.engine.steps import StepThread
from sllm_node.engine.text import TextCodec, TextState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of; it owns model, cache and buffers and gives them up in `close`."""

    name: ModelId
    model: Model
    cache: KvCache
    buffers: tuple[DeviceBuffer, ...]
    blocks: Blocks
    context_tokens: int
    window: int | None
    """How far back any layer looks, in tokens; None: to the beginning."""
    codec: TextCodec
    check: Callable[[], None]
    """Makes sure that the devices still work."""
    keep: Callable[[], None]
    """Called when the module is free for the next replica."""
    arriving: Arriving | None = None
    """What steps wait through while the weights are on their way; None: they are all there."""


class Engine:
    """One model, ready to decode, or so far as its weights are there."""

    def __init__(
        self,
        parts: Parts,
        config: EngineConfig,
        steps: StepThread,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._parts = parts
        self._steps = steps
        self._clock = clock
        self._generated = metrics.generated_tokens.labels(parts.name)
        self._prompted = metrics.prompt_tokens.labels(parts.name)
        self._between_tokens = metrics.inter_token_seconds.labels(parts.name)
        self._asked = metrics.prefix_cache_queries.labels(parts.name)
        self._found = metrics.prefix_cache_hits.labels(parts.name)
        self._preempted = metrics.preemptions.labels(parts.name)
        self._batch = Batch(parts.blocks, config.max_sessions, config.max_step_tokens, parts.window)
        self._runner: Runner | None = Runner(parts.model, parts.cache, parts.blocks.block_tokens)
        self._generations: dict[int, Generation] = {}
        """By the number of their session."""
        self._last_number = 0
        self._broken: SllmError | None = None
        self._arriving = parts.arriving
        self._is_loaded = parts.arriving is None
        self._is_trusted = True
        """No step has failed: the module may serve again."""
        self._wake = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._live(), name=f"engine {parts.name}")

    # --- from outside -------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sessions that are being computed."""
        return self._batch.running

    @property
    def waiting(self) -> int:
        """Sessions that wait for KV blocks."""
        return self._batch.waiting

    @property
    def kv_usage(self) -> float:
        """Part of the KV blocks in use, 0 to 1."""
        return self._parts.blocks.usage

    def submit(self, request: GenerationRequest) -> Generation:
        """Take a request.

        Raises:
            InvalidRequestError: tokens or parameters that the model can't be given.
            PromptTooLongError: it can never fit the context or the KV memory.
            EngineError: the engine is closed.
        """
        parts = self._parts
        if self._broken is not None:
            raise self._broken
        if self._runner is None:
            raise EngineError(parts.name, "it is closed")
        check_request(request, parts.context_tokens, parts.codec.vocabulary_size)
        check_capacity(request, parts.blocks.capacity_tokens)
        self._last_number += 1
        session = Session(request, self._last_number)
        text = TextState.begin(parts.codec.decode, request.stop, request.resumed, request.prompt)
        generation = Generation(session, text, self._on_cancel)
        if text.scanner.found is not None or self._ends_with_eos(request):
            generation.end_at_once()
            return generation
        self._generations[session.number] = generation
        self._batch.add(session)
        self._prompted.inc(len(request.prompt))
        self._wake.set()
        return generation

    def _ends_with_eos(self, request: GenerationRequest) -> bool:
        last = request.resumed[-1:]
        return not request.ignore_eos and bool(last) and last[0] in self._parts.codec.eos_ids

    def loaded(self) -> None:
        """Take note that all weights are there: from the next step on nothing waits for them."""
        self._is_loaded = True
        self._wake.set()

    async def close(self) -> None:
        """End the sessions, wait for the step under way, let go of weights and KV memory."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self._parts.name}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._runner = None
        self._wake.set()
        if self._arriving is not None:
            self._arriving.stop()
        await self._task
        self._arrived()
        error = CancelledByOperatorError("the model left the device")
        for generation in list(self._generations.values()):
            self._end(generation)
            generation.fail(error)
        self._parts.blocks.forget()
        # On the step thread, where the last step's tensors were made and freed.
        await self._steps.run(self._let_go)
        if self._is_trusted:
            self._parts.keep()

    def _let_go(self) -> None:
        self._parts.cache.close()
        for buffer in self._parts.buffers:
            buffer.close()

    # --- stepping -----------------------------------------------------------------------------

    async def _live(self) -> None:
        """Step until closed; a mistake of ours ends all sessions, and no later one hangs."""
        try:
            await self._run()
        except Exception as error:
            log.exception("engine failed", extra={"model": self._parts.name})
            self._is_trusted = False
            self._broken = EngineError(self._parts.name, f"{type(error).__name__}: {error}")
            for generation in list(self._generations.values()):
                generation.fail(self._broken)
            self._generations.clear()

    async def _run(self) -> None:
        while (runner := self._runner) is not None:
            if self._is_loaded:
                self._arrived()
            plan = self._batch.plan()
            self._count()
            if not plan:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                size = self._parts.blocks.block_tokens
                parts = [_step_part(part, size) for part in plan]
                steps = self._steps if self._arriving is None else self._arriving.steps
                drawn = await steps.run(runner.step, parts)
            except WeightsMissingError as missing:
                self._miss(plan, missing.error)
            except Exception as error:
                log.exception("step failed", extra={"model": self._parts.name, "parts": len(plan)})
                self._is_trusted = False
                await self._steps.run(self._parts.check)  # ends the process if the device is lost
                self._fail(plan, EngineError(self._parts.name, f"{type(error).__name__}: {error}"))
            else:
                self._take(plan, drawn)

    def _take(self, plan: Sequence[Part], drawn: Sequence[Drawn | None]) -> None:
        is_last = [part.is_last for part in plan]
        self._batch.stepped(list(plan))
        now = self._clock.now()
        for part, token, was_last in zip(plan, drawn, is_last, strict=True):
            generation = self._generations.get(part.session.number)
            if generation is None or token is None:
                continue
            assert was_last
            self._take_token(generation, token, now)

    def _take_token(self, generation: Generation, drawn: Drawn, now: float) -> None:
        session, name = generation.session, self._parts.name
        if drawn.token < 0:
            error = EngineError(name, "the model's logits are not numbers for this request")
            self._is_trusted = False
            self._parts.blocks.forget()  # its keys and values may be no numbers either
            self._end(generation)
            generation.fail(error)
            return
        session.output.append(drawn.token)
        self._generated.inc()
        if generation.last_token_at is not None:
            seconds = now - generation.last_token_at
            self._between_tokens.observe(seconds)
        generation.last_token_at = now
        is_eos = drawn.token in self._parts.codec.eos_ids and not session.request.ignore_eos
        offset = generation.text.detokenizer.characters
        text = "" if is_eos else generation.text.add(drawn.token)
        finish = self._finish(generation, is_eos=is_eos)
        if finish is not None:
            if generation.text.scanner.found is None:
                text += generation.text.flush()
            if generation.text.scanner.found is not None:
                finish = "stop"
            self._end(generation)
        generation.give(text, drawn.token, self._logprob(session.request, drawn, offset), finish)

    def _finish(self, generation: Generation, *, is_eos: bool) -> FinishReason | None:
        session = generation.session
        if is_eos or generation.text.scanner.found is not None:
            return "stop"
        is_full = session.length >= self._parts.context_tokens
        if is_full or len(session.output) >= session.request.max_tokens:
            return "length"
        return None

    def _logprob(
        self, request: GenerationRequest, drawn: Drawn, offset: int
    ) -> TokenLogprob | None:
        if request.logprobs is None:
            return None
        name = self._parts.codec.token_text
        top = tuple((token, name(token), value) for token, value in drawn.top)
        return TokenLogprob(drawn.token, name(drawn.token), drawn.logprob, top, offset)

    # --- ends ---------------------------------------------------------------------------------

    def _on_cancel(self, generation: Generation) -> None:
        self._end(generation)
        self._wake.set()  # blocks are free, somebody may be waiting for them

    def _end(self, generation: Generation) -> None:
        self._batch.end(generation.session)
        self._generations.pop(generation.session.number, None)

    def _fail(self, plan: Sequence[Part], error: SllmError) -> None:
        self._batch.failed(list(plan))
        for part in plan:
            generation = self._generations.get(part.session.number)
            if generation is not None:
                self._end(generation)
                generation.fail(error)

    def _miss(self, plan: Sequence[Part], error: SllmError) -> None:
        """End the sessions of a step whose weights don't come: the load failed, or we close."""
        if self._runner is None:
            self._batch.failed(list(plan))
            return
        self._broken = error
        self._fail(plan, error)

    def _arrived(self) -> None:
        """Let no later step wait for weights; none is under way."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            arriving.end()

    def _count(self) -> None:
        batch = self._batch
        if batch.preemptions:
            self._preempted.inc(batch.preemptions)
            batch.preemptions = 0
        if batch.asked_tokens and batch.blocks.is_caching:
            self._asked.inc(batch.asked_tokens)
            self._found.inc(batch.found_tokens)
        batch.asked_tokens = batch.found_tokens = 0


def check_request(request: GenerationRequest, context_tokens: int, vocabulary: int | None) -> None:
    """Refuse what can never be served.

    Raises:
        InvalidRequestError: no prompt, tokens outside the vocabulary, parameters out of range.
        PromptTooLongError: prompt and output exceed the model's context.
    """
    if not request.prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    check_parameters(request.sampling, vocabulary)
    if request.logprobs is not None and request.logprobs < 0:
        raise InvalidRequestError(f"logprobs = {request.logprobs} is negative", param="logprobs")
    if not all(request.stop):
        raise InvalidRequestError("a stop string is empty", param="stop")
    if len(request.resumed) >= request.max_tokens:
        raise InvalidRequestError("nothing is left to generate", param="max_tokens")
    wanted = len(request.prompt) + request.max_tokens
    if wanted > context_tokens:
        raise PromptTooLongError(wanted, context_tokens, "the model's context")
    if vocabulary is not None:
        tokens = (*request.prompt, *request.resumed)
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise InvalidRequestError(
                f"the prompt has token ids outside 0 to {vocabulary - 1}", param="prompt"
            )


def check_capacity(request: GenerationRequest, capacity_tokens: int) -> None:
    """Refuse what all blocks together can't hold.

    Raises:
        PromptTooLongError: prompt and output exceed them.
    """
    wanted = len(request.prompt) + request.max_tokens
    if wanted > capacity_tokens:
        raise PromptTooLongError(wanted, capacity_tokens, "KV memory (engine.kv_cache_bytes)")


def _step_part(part: Part, block_tokens: int) -> StepPart:
    session = part.session
    row = None
    if part.is_last:
        request = session.request
        row = SamplingRow(
            request.sampling, len(session.output), request.logprobs, session.adjustments()
        )
    passed = session.passed_blocks * block_tokens
    place = KvPart(part.start - passed, part.count, tuple(session.table), passed)
    return StepPart(session.tokens(part.start, part.count), place, row)
