"""Decode steps with fixed shapes: a few sizes of batches, each with tensors that stay where they are.

Theory of operation. A step of R sessions takes the smallest *bucket* of at least R rows; rows without a
session have length 0 and write nothing. What changes from step to step goes to the device in one copy
of int32 numbers and one of the sampling plan. Everything after these copies reads and writes the same
addresses every time, so on a GPU it is captured in a CUDA graph when a bucket and a variant of drawing
are used for the second time (the first compiles kernels and sizes libraries' memory), and replayed from
then on. All graphs of a device share one pool of memory.

A step is launched and not waited for, so the next may be launched while it runs. All that both write to
is written in the order of the stream. Host memory that a copy reads is new in each step; what is drawn
leaves the graphs' memory right behind the replay, because any later one may write there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch

from sllm_node.engine.draw import draw
from sllm_node.engine.fused import DecodeInputs, FusedDecoder, Scratch
from sllm_node.engine.kv import KvCache, KvPart
from sllm_node.engine.mixed import MixedSteps
from sllm_node.engine.sampling import SamplingRow
from sllm_node.engine.sampling_plan import SamplingPlan, Variant
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.step_graphs import StepGraphs
from sllm_node.engine.upload import upload

BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROW_NUMBERS: Final = 4
"""int32 of each row besides its block table: token, position, slot, length."""
_TABLE_STEP: Final = 16
"""Tables are sent in multiples of so many blocks."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One session in a step: its last token, where it goes, how the next one is drawn."""

    token: int
    place: KvPart
    draw: SamplingRow


@dataclass(frozen=True, slots=True)
class Following:
    """Tokens that the step before draws for this one."""

    rows: Sequence[int]
    """Which rows of this step go on with them."""
    tokens: torch.Tensor
    """On the device, one of each, int64."""


def bucket_of(rows: int) -> int | None:
    """Return the rows of a step for so many sessions; None: more than there are graphs for."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def row_numbers(
    rows: Sequence[DecodeRow], bucket: int, block_tokens: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Return (4, bucket): tokens, positions, slots and lengths."""
    numbers = np.zeros((_ROW_NUMBERS, bucket), np.int32)
    numbers[2] = -1
    for i, row in enumerate(rows):
        start, table = row.place.start, row.place.table
        slot = table[start // block_tokens] * block_tokens + start % block_tokens
        numbers[:, i] = row.token, row.place.passed + start, slot, start + 1
    return numbers


def block_tables(
    rows: Sequence[DecodeRow], bucket: int, block_tokens: int, most: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Return (bucket, blocks): tables as wide as the longest needs, in steps, up to `most`."""
    used = max(-(-(row.place.start + 1) // block_tokens) for row in rows)
    width = min(most, -(-used // _TABLE_STEP) * _TABLE_STEP)
    tables = np.zeros((bucket, width), np.int32)
    for i, row in enumerate(rows):
        blocks = -(-(row.place.start + 1) // block_tokens)
        tables[i, :blocks] = row.place.table[:blocks]
    return tables


@dataclass(slots=True)
class _Bucket:
    """What steps of one size use."""

    inputs: DecodeInputs
    numbers: torch.Tensor  # (4, R) int32, of which `inputs` are views
    scratch: Scratch
    plans: dict[Variant, torch.Tensor] = field(default_factory=dict)
    """Sampling plans on the device."""


class DecodeBatch:
    """Decode steps of one replica."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        block_tokens: int,
        blocks: int,
        memory: ScratchMemory,
        graphs: StepGraphs | None = None,
    ) -> None:
        """`blocks`: that the longest session may have; `graphs` None: nothing is captured."""
        self._decoder = decoder
        self._cache = cache
        self._block_tokens = block_tokens
        self._blocks = blocks
        self._device = cache.keys[0].device
        self._buckets: dict[int, _Bucket] = {}
        self._memory = memory
        self._graphs = graphs
        self._mixed = MixedSteps(decoder, cache, block_tokens, BUCKETS, memory, graphs)

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        own = 0 if self._graphs is None else self._graphs.count(self)
        return own + self._mixed.graphs

    @torch.inference_mode()
    def launch(
        self, rows: Sequence[DecodeRow], following: Following | None = None
    ) -> tuple[SamplingPlan, torch.Tensor]:
        """Launch one token of each row, at most the last bucket's; return how and what it draws."""
        size = bucket_of(len(rows))
        assert size is not None
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = self._make(size)
        plan = SamplingPlan([row.draw for row in rows], self._decoder.vocabulary, size)
        self._send(bucket, rows, plan)
        if following is not None:
            which = upload(following.rows, self._device)
            bucket.inputs.ids.index_copy_(0, which, following.tokens.to(torch.int32))
        return plan, self._run(bucket, plan.variant)

    @torch.inference_mode()
    def forward(
        self,
        parts: Sequence[KvPart],
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits of some `rows` of a step that has pieces of prompts, too."""
        return self._mixed.compute(parts, ids, positions, rows)

    def close(self) -> None:
        """Drop graphs and memory."""
        self._mixed.close()
        if self._graphs is not None:
            self._graphs.drop(self)
        self._buckets.clear()

    def _make(self, rows: int) -> _Bucket:
        decoder = self._decoder
        widths, dtype = decoder.widths(), decoder.dtype
        sizes = [4 * _ROW_NUMBERS * rows, 4 * rows * self._blocks]
        sizes += [rows * width * dtype.itemsize for width in widths]
        first, second, *rest = self._memory.take(sizes)
        numbers = first.view(torch.int32).view(_ROW_NUMBERS, rows)
        tables = second.view(torch.int32).view(rows, self._blocks)
        ids, positions, slots, lengths = numbers
        scratch = Scratch(*(one.view(dtype).view(rows, -1) for one in rest))
        return _Bucket(DecodeInputs(ids, positions, slots, tables, lengths), numbers, scratch)

    def _send(self, bucket: _Bucket, rows: Sequence[DecodeRow], plan: SamplingPlan) -> None:
        """Bring to the device what is new in this step."""
        size = bucket.numbers.shape[1]
        numbers = row_numbers(rows, size, self._block_tokens)
        tables = block_tables(rows, size, self._block_tokens, self._blocks)
        joined = upload(
            torch.from_numpy(np.concatenate((numbers.ravel(), tables.ravel()))), self._device
        )
        bucket.numbers.copy_(joined[: numbers.size].view(numbers.shape))
        width = tables.shape[1]
        bucket.inputs.tables[:, :width].copy_(joined[numbers.size :].view(size, width))
        sent = upload(torch.from_numpy(plan.buffer()), self._device)
        known = bucket.plans.get(plan.variant)
        if known is None:
            bucket.plans[plan.variant] = sent
        else:
            known.copy_(sent)

    def _run(self, bucket: _Bucket, variant: Variant) -> torch.Tensor:
        compute = partial(self._compute, bucket, variant)
        if self._graphs is None:
            return compute()
        kind = ("decode", bucket.numbers.shape[1], variant)
        (step,) = self._graphs.of(self, kind, [compute])
        return compute() if step is compute else step().clone()

    def _compute(self, bucket: _Bucket, variant: Variant) -> torch.Tensor:
        logits = self._decoder.step(bucket.inputs, self._cache, self._block_tokens, bucket.scratch)
        return draw(logits, bucket.plans[variant], variant)
