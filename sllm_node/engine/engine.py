"""A replica: sessions in, chunks out. The asyncio shell around batch, runner and text.

One task steps as long as there is something to do: `turns` says when it is this model's turn on its
device, `batch.plan` what goes together, the step thread computes it, `_take` hands out the tokens. Where the device computes by itself, a step is
planned and launched while the one before it is under way, so that the device has work while tokens
are handed out; there are never more than two. All state lives on the event loop; a cancelled
session's blocks are free at once, or right after the steps that work on it. A step that fails ends
the sessions that were in it or in the one launched after it, and no other.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from sllm_node.core.clock import Clock
from sllm_node.core.config import EngineConfig
from sllm_node.core.errors import CancelledByOperatorError, EngineError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest
from sllm_node.engine.arriving import WeightsMissingError
from sllm_node.engine.batch import Batch, Part, becoming_due, prompt_tokens
from sllm_node.engine.generation import Generation, finish_of, logprob_of
from sllm_node.engine.interleave import Job
from sllm_node.engine.offloading import with_copies
from sllm_node.engine.parts import Parts
from sllm_node.engine.refusals import check_capacity, check_request, ended_by_room
from sllm_node.engine.runner import Runner, StepPart, step_parts
from sllm_node.engine.sampling import Drawn
from sllm_node.engine.session import Session
from sllm_node.engine.stall import StallWatch
from sllm_node.engine.steps import StepThread
from sllm_node.engine.turns import Need

log = logging.getLogger(__name__)


class Engine:
    """One model, ready to decode, or so far as its weights are there."""

    def __init__(
        self, parts: Parts, config: EngineConfig, steps: StepThread, clock: Clock, metrics: Metrics
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
        self._step_wait = metrics.step_wait_seconds.labels(parts.name)
        self._batch = Batch(
            parts.blocks, config.max_sessions, config.max_step_tokens, parts.window,
            config.prefill_beside_tokens, config.prefill_beside_ratio,
        )  # fmt: skip
        if parts.offloading is not None:
            self._batch.offload = parts.offloading.offload
        self._resume = config.resume
        # Only the module's forward pass knows how to wait for weights.
        decode = parts.decode if parts.arriving is None else None
        runner = Runner(parts.model, parts.cache, parts.blocks.block_tokens, decode)
        self._runner: Runner | None = runner
        ways = {"always": True, "never": False, "auto": runner.is_asynchronous}
        self._depth = 2 if ways[config.launch_ahead] else 1
        self._flight: deque[list[Part]] = deque()
        """The steps that are planned and not taken, oldest first."""
        self._generations: dict[int, Generation] = {}
        """By the number of their session."""
        self._last_number = 0
        self._broken: SllmError | None = None
        self._arriving = parts.arriving
        self._is_loaded = parts.arriving is None
        self._is_trusted = True
        """No step has failed: the module may serve again."""
        self.watch = StallWatch(
            parts.name, config.stall_after_s, clock, metrics.engine_stalled.labels(parts.name),
            sessions=lambda: (self.running, self.waiting),
            free_since=lambda: self._stepping.free_since(),  # noqa: PLW0108 - the thread changes
        )  # fmt: skip
        self._wake = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._live(runner), name=f"engine {parts.name}")

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

    @property
    def stalled_s(self) -> float | None:
        """For how long no step has ended although there is work, if that is too long."""
        return self.watch.stalled_s

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
        room = min(parts.context_tokens, parts.blocks.capacity_tokens)
        request = ended_by_room(request, room)
        self._last_number += 1
        session = Session(request, self._last_number, self._resume)
        text = parts.codec.text_state(request.stop, request.resumed, request.prompt)
        generation = Generation(session, text, self._on_cancel, self._on_work)
        if text.scanner.found is not None or self._ends_with_eos(request):
            generation.end_at_once()
            return generation
        self._generations[session.number] = generation
        self._batch.add(session)
        self._prompted.inc(len(request.prompt))
        self._on_work()
        return generation

    def _ends_with_eos(self, request: GenerationRequest) -> bool:
        last = request.resumed[-1:]
        return not request.ignore_eos and bool(last) and last[0] in self._parts.codec.eos_ids

    def loaded(self) -> None:
        """Take note that all weights are there: from the next step on nothing waits for them."""
        self._is_loaded = True
        self._wake.set()

    async def close(self) -> None:
        """End the sessions, wait for the steps under way, let go of weights and KV memory."""
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._close(self._runner), name=f"close {self._parts.name}"
            )
        await asyncio.shield(self._closing)

    async def _close(self, runner: Runner | None) -> None:
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
        self._batch.forget()
        assert runner is not None
        # On the step thread, where the last step's tensors were made and freed.
        await self._steps.run(self._let_go, runner)
        if self._parts.offloading is not None:
            self._parts.offloading.offload.close()
        if self._is_trusted:
            self._parts.keep()

    def _let_go(self, runner: Runner) -> None:
        runner.drop()
        self._parts.let_go(self._is_trusted)

    # --- stepping -----------------------------------------------------------------------------

    async def _live(self, runner: Runner) -> None:
        """Step until closed; a mistake of ours ends all sessions, and no later one hangs."""
        try:
            await self._run(runner)
        except Exception as error:
            log.exception("engine failed", extra={"model": self._parts.name})
            self._is_trusted = False
            self._broken = EngineError(self._parts.name, f"{type(error).__name__}: {error}")
            for generation in list(self._generations.values()):
                generation.fail(self._broken)
            self._generations.clear()
        finally:
            self.watch.rest()
            self._parts.seat.leave()

    async def _run(self, runner: Runner) -> None:
        while self._runner is not None or self._flight:
            if self._arriving is not None and (self._is_loaded or self._arriving.is_complete):
                self._arrived()
            job = await self._job(runner)
            if job is None:
                if self._is_idle:
                    self.watch.rest()
                if self._runner is not None:
                    await self._wake.wait()
                continue
            try:
                drawn = await job.future
            except WeightsMissingError as missing:
                await self._miss(runner, missing.error)
            except Exception as error:  # noqa: BLE001 - told to the sessions, and logged
                await self._fail(runner, error)
            else:
                self._take(self._flight.popleft(), drawn, job.began)
            self.watch.ended()

    async def _job(self, runner: Runner) -> Job | None:
        """Begin a job when it is our turn; None: there is nothing to do."""
        seat, asked = self._parts.seat, self._clock.now()
        if self._arriving is not None:
            return self._begin(runner)
        if self._is_idle:  # whose turn it is makes no difference, and others' steps may hang
            seat.rest()
            return self._begin(runner)
        generations = () if seat.is_alone else self._generations.values()
        times = [since for g in generations if (since := g.due_since) is not None]
        need = Need(len(times), min(times, default=0.0))
        # What a step takes of prompts, and of whose, shows when its turn begins.
        certain = lambda: self._depth == 1 and self._batch.is_decoding  # noqa: E731 - asked later
        job = await seat.turn(need, partial(self._begin, runner), certain)
        if job is not None:
            self._step_wait.observe(self._clock.now() - asked)
        return job

    def _begin(self, runner: Runner) -> Job | None:
        """Plan, and put on the thread what is to be launched and read; None: nothing is."""
        self._wake.clear()
        planned = self._plan()
        if not self._flight:
            return None
        oldest, began = self._flight[0], self._clock.now()
        self.watch.began(len(oldest), sum(part.count for part in oldest))
        try:
            advance = with_copies(self._parts.offloading, runner.advance, prompt_tokens(oldest))
            future = self._stepping.submit(advance, self._launches(planned))
        except Exception as error:  # noqa: BLE001 - told like one of the step itself
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        draws = 0 if self._parts.seat.is_alone else becoming_due(oldest)  # alone: nobody asks
        return Job(future, prompt_tokens(oldest), began, draws)

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to do: no step under way, and no session that doesn't rest."""
        return not self._flight and all(g.session.is_resting for g in self._generations.values())

    @property
    def _stepping(self) -> StepThread:
        """The thread that steps: while weights arrive one of our own, which may wait for them."""
        return self._steps if self._arriving is None else self._arriving.steps

    def _plan(self) -> int:
        """Plan as far ahead as is allowed; return how many steps there are to launch."""
        planned = 0
        runner, batch = self._runner, self._batch
        is_open = runner is not None and not runner.has_failed
        # A step that waits for weights has none behind it: who comes meanwhile is in the next.
        depth = self._depth if self._arriving is None else 1
        # While layers wait for their bytes, there is time for others between them.
        most = self._parts.seat.prompt_tokens() if self._arriving is None else None
        while is_open and len(self._flight) < depth:
            if most is not None and any(map(prompt_tokens, self._flight)):
                break  # others' readers wait for one piece of a prompt, and not for two
            if not (plan := batch.plan(most)):
                break
            self._flight.append(plan)
            planned += 1
        self._count()
        for generation in self._generations.values():
            if generation.session.is_holding:
                generation.look()
        return planned

    def _launches(self, count: int) -> list[list[StepPart]]:
        """Return what the last `count` planned steps are to compute."""
        size = self._parts.blocks.block_tokens
        steps = list(pairwise([[], *self._flight]))[len(self._flight) - count :]
        return [step_parts(before, plan, size) for before, plan in steps]

    def _take(self, plan: list[Part], drawn: Sequence[Drawn | None], began: float) -> None:
        now = self._clock.now()
        self._batch.stepped(plan, now - began)
        for part, token in zip(plan, drawn, strict=True):
            generation = self._generations.get(part.session.number)
            if generation is None or token is None:
                continue
            assert part.is_last
            self._take_token(generation, token, now)

    def _take_token(self, generation: Generation, drawn: Drawn, now: float) -> None:
        session, name = generation.session, self._parts.name
        if drawn.token < 0:
            error = EngineError(name, "the model's logits are not numbers for this request")
            self._is_trusted = False
            self._batch.forget()  # its keys and values may be no numbers either
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
        finish = finish_of(generation, self._parts.context_tokens, is_eos=is_eos)
        if finish is not None:
            if generation.text.scanner.found is None:
                text += generation.text.flush()
            if generation.text.scanner.found is not None:
                finish = "stop"
            self._end(generation)
        logprob = logprob_of(session.request, drawn, offset, self._parts.codec.token_text)
        generation.give(text, drawn.token, logprob, finish)

    # --- ends ---------------------------------------------------------------------------------

    def _on_work(self) -> None:
        self.watch.work()
        self._wake.set()

    def _on_cancel(self, generation: Generation) -> None:
        self._end(generation)
        self._wake.set()  # blocks are free, somebody may be waiting for them
        if self._is_idle:
            self.watch.rest()

    def _end(self, generation: Generation) -> None:
        self._batch.end(generation.session)
        self._generations.pop(generation.session.number, None)

    async def _fail(self, runner: Runner, error: Exception) -> None:
        """End the sessions of all steps under way: those after one that failed follow from it."""
        name, count = self._parts.name, sum(map(len, self._flight))
        log.error("step failed", exc_info=error, extra={"model": name, "parts": count})
        self._is_trusted = False
        await self._let_end(runner)
        self._lose(EngineError(name, f"{type(error).__name__}: {error}"))

    async def _miss(self, runner: Runner, error: SllmError) -> None:
        """End the sessions of a step whose weights don't come: the load failed, or we close."""
        await self._let_end(runner)  # what was launched may read weights that go away next
        if self._runner is not None:
            self._broken = error
        self._lose(None if self._runner is None else error)

    async def _let_end(self, runner: Runner) -> None:
        """Wait for all that was launched; this ends the process if the device is lost."""
        await self._steps.run(self._parts.check)
        await self._steps.run(runner.drop)

    def _lose(self, told: SllmError | None) -> None:
        """Give up all steps under way and their sessions; None: `close` tells these."""
        plans = list(self._flight)
        self._flight.clear()
        for plan in plans:
            self._batch.failed(plan)
        if told is None:
            return
        for part in (part for plan in plans for part in plan):
            generation = self._generations.get(part.session.number)
            if generation is not None:
                self._end(generation)
                generation.fail(told)

    def _arrived(self) -> None:
        """Let no later step wait for weights; none is under way."""
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            return
        assert not self._flight
        arriving.end()
        if self._runner is not None:
            self._runner.decode = self._parts.decode

    def _count(self) -> None:
        batch = self._batch
        if batch.preemptions:
            self._preempted.inc(batch.preemptions)
            batch.preemptions = 0
        if batch.asked_tokens and batch.blocks.is_caching:
            self._asked.inc(batch.asked_tokens)
            self._found.inc(batch.found_tokens)
        batch.asked_tokens = batch.found_tokens = 0
