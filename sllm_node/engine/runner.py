"""Steps: packs sessions into a forward pass, draws their tokens. Runs on the step thread.

A step is launched and read. Between, a device that computes by itself goes on alone, and the step
after it can be launched already: what it needs of the drawn tokens, it takes from where they were
drawn. What comes to the host is copied there right behind the step, so reading one does not wait
for the next.

A step in which every session has one token goes through a `DecodeBatch`, where there is one; parts
of a replay too, whatever is drawn for those is dropped.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from sllm_node.core.types import SamplingParameters, TokenIds
from sllm_node.engine.attention import attention_step
from sllm_node.engine.batch import Part
from sllm_node.engine.decode_batch import DecodeBatch, DecodeRow, Following, bucket_of
from sllm_node.engine.draw import draw
from sllm_node.engine.kv import KvCache, KvPart, PagedStep
from sllm_node.engine.sampling import Drawn, SamplingRow
from sllm_node.engine.sampling_plan import SamplingPlan
from sllm_node.engine.upload import upload

_DROPPED: Final = SamplingRow(SamplingParameters(temperature=0.0), 0)
"""How a row is drawn whose token is known."""


@dataclass(frozen=True, slots=True)
class StepPart:
    """One session's share of a step."""

    tokens: TokenIds
    place: KvPart
    draw: SamplingRow | None
    """How to draw the next token; None: more of the prompt follows."""
    follows: int | None = None
    """Which part of the step before draws its token; `tokens` then only holds a place for it."""


@dataclass(frozen=True, slots=True)
class _Landing:
    """What a step leaves on the host, once the device has come so far."""

    packed: torch.Tensor | None
    event: Any

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way."""

    rows: Sequence[int | None]
    """Of each part, the row of `tokens` that is drawn for it; None: nothing is."""
    plan: SamplingPlan | None
    tokens: torch.Tensor | None
    """What its rows have drawn, on the device, in memory that no other step writes to."""
    landing: _Landing

    def read(self) -> list[Drawn | None]:
        """Wait for it and return what each part has drawn."""
        self.landing.wait()
        drawn: list[Drawn] = []
        if self.plan is not None and self.landing.packed is not None:
            drawn = self.plan.read(self.landing.packed.numpy())
        return [None if row is None else drawn[row] for row in self.rows]


class Runner:
    """A module with weights and KV memory, and the steps that are under way on it."""

    def __init__(
        self, model: Any, cache: KvCache, block_tokens: int, decode: DecodeBatch | None = None
    ) -> None:
        self._model = model
        self._cache = cache
        self._block_tokens = block_tokens
        self.decode = decode
        """For steps in which every session has one token; None: the module does them. May be set
        while no step is under way."""
        self._first, self._last = cache.keys[0].device, cache.keys[-1].device
        self._under_way: deque[_Launched | Exception] = deque()

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes while the step thread does something else."""
        return self._last.type != "cpu"

    @property
    def has_failed(self) -> bool:
        """Whether a step under way could not be launched; nothing should follow it."""
        return any(isinstance(step, Exception) for step in self._under_way)

    def advance(self, steps: Sequence[Sequence[StepPart]]) -> list[Drawn | None]:
        """Launch `steps`, wait for the oldest under way and return what each part of it has drawn.

        A step that could not be launched tells so when it is the oldest.
        """
        for parts in steps:
            self._under_way.append(self._launched(parts))
        oldest = self._under_way.popleft()
        if isinstance(oldest, Exception):
            raise oldest
        return oldest.read()

    def drop(self) -> None:
        """Wait for all steps under way, whatever they bring."""
        while self._under_way:
            step = self._under_way.popleft()
            if isinstance(step, _Launched):
                step.landing.wait()

    def _launched(self, parts: Sequence[StepPart]) -> _Launched | Exception:
        before = self._under_way[-1] if self._under_way else None
        try:
            with torch.inference_mode():
                return self._launch(parts, before)
        except Exception as error:  # noqa: BLE001 - raised when the step is read
            return error

    def _launch(self, parts: Sequence[StepPart], before: _Launched | Exception | None) -> _Launched:
        following = self._following(parts, before)
        rows = _decode_rows(parts)
        if self.decode is None or rows is None or bucket_of(len(rows)) is None:
            return self._forward(parts, following)
        plan, packed = self.decode.launch(rows, following)
        numbers = [None if part.draw is None else row for row, part in enumerate(parts)]
        return _Launched(numbers, plan, packed[: len(rows)], self._land(packed))

    def _following(
        self, parts: Sequence[StepPart], before: _Launched | Exception | None
    ) -> Following | None:
        """Return what the step before draws for this one; None: nothing."""
        follows = [part.follows for part in parts if part.follows is not None]
        if not follows:
            return None
        if isinstance(before, Exception):
            raise before
        assert before is not None
        assert before.tokens is not None
        rows = [row for row in (before.rows[part] for part in follows) if row is not None]
        assert len(rows) == len(follows), "a part follows one that draws nothing"
        # -1, of logits that are no numbers, is no input: whatever follows it is thrown away.
        drawn = before.tokens.index_select(0, upload(rows, self._last)).clamp(min=0)
        followers = [i for i, part in enumerate(parts) if part.follows is not None]
        return Following(followers, drawn.to(self._first, non_blocking=True))

    def _forward(self, parts: Sequence[StepPart], following: Following | None) -> _Launched:
        """Launch a forward pass of any parts, and the draw."""
        ids, positions = self._inputs(parts, following)
        ends, end = [], -1
        for part in parts:
            end += part.place.count
            if part.draw is not None:
                ends.append(end)
        # An index keeps only the rows that draw; a step without any keeps one, unused.
        # Split over devices, what follows the last layer is where that layer is.
        logits = self._logits(parts, ids, positions, upload(ends or [end], self._last))
        rows = [part.draw for part in parts if part.draw is not None]
        if not rows:
            return _Launched([None] * len(parts), None, None, self._land(None))
        plan = SamplingPlan(rows, logits.shape[-1])
        buffer = upload(torch.from_numpy(plan.buffer()), logits.device)
        packed = draw(logits, buffer, plan.variant)
        count = iter(range(len(rows)))
        numbers = [None if part.draw is None else next(count) for part in parts]
        return _Launched(numbers, plan, packed[: len(rows)], self._land(packed))

    def _logits(
        self,
        parts: Sequence[StepPart],
        ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits of the rows `kept`."""
        places = [part.place for part in parts]
        if self.decode is not None:
            return self.decode.forward(places, ids, positions, kept)
        with attention_step(PagedStep(self._cache, places, self._block_tokens)):
            output = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=kept,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _inputs(
        self, parts: Sequence[StepPart], following: Following | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and positions of all tokens."""
        ids: list[int] = []
        positions: list[int] = []
        firsts: list[int] = []
        for part in parts:
            firsts.append(len(ids))
            begin = part.place.passed + part.place.start
            ids += part.tokens
            positions += range(begin, begin + part.place.count)
        places = [] if following is None else [firsts[row] for row in following.rows]
        sent, count = upload(ids + positions + places, self._first), len(ids)
        made, at, place = sent[:count], sent[count : 2 * count], sent[2 * count :]
        if following is not None:
            made = made.index_copy(0, place, following.tokens)
        return made, at

    def _land(self, packed: torch.Tensor | None) -> _Landing:
        """Let `packed` come to the host behind the step."""
        if not self.is_asynchronous:
            return _Landing(packed, None)
        host = None
        if packed is not None:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
        event = torch.Event(self._last)
        event.record(torch.accelerator.current_stream(self._last))
        return _Landing(host, event)


def step_parts(before: Sequence[Part], plan: Sequence[Part], size: int) -> list[StepPart]:
    """Return what a step computes that is launched right behind the step `before`."""
    places = {part.session.number: place for place, part in enumerate(before)}
    return [_step_part(part, places, size) for part in plan]


def _step_part(part: Part, places: Mapping[int, int], block_tokens: int) -> StepPart:
    session, request = part.session, part.session.request
    row = None
    if part.is_last:
        index = part.start + part.count - len(request.prompt)
        row = SamplingRow(request.sampling, index, request.logprobs, session.adjustments())
    passed = session.passed_blocks * block_tokens
    place = KvPart(part.start - passed, part.count, tuple(session.table), passed)
    if part.is_ahead:
        return StepPart((0,), place, row, places[session.number])
    return StepPart(session.tokens(part.start, part.count), place, row)


def _decode_rows(parts: Sequence[StepPart]) -> list[DecodeRow] | None:
    """Return the rows of a step in which every session has one token; None: it is none."""
    if any(part.place.count != 1 for part in parts):
        return None
    return [DecodeRow(part.tokens[0], part.place, part.draw or _DROPPED) for part in parts]
