"""Steps with pieces of prompts, also beside sessions that decode, without the module's forward pass.

Theory of operation. The same few operations a layer as in decode steps (`fused`), with as many rows as
there are tokens. Sessions that decode come first; they attend by the kernel of decode steps, pieces of
prompts by torch's flash kernel where it can, and otherwise as `kv` does it. How attention is launched
depends on how long contexts are, so a step can't be captured as a whole. What lies between two
attentions does not: with up to 512 tokens, filled up to a multiple of 64, each such stretch is captured
as a graph when a size comes for the second time. Without, the host would need longer to launch a short
step than the device to compute it. Larger steps are launched as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Protocol

import numpy as np
import torch

from sllm_node.engine.attention import AttentionCall
from sllm_node.engine.decode_ops import FusedLayer
from sllm_node.engine.flash import FlashPieces, Numbers, Piece, cuts_of
from sllm_node.engine.fused import FusedDecoder, Scratch, Tokens
from sllm_node.engine.kv import KvCache, KvPart, PagedStep, slot_numbers
from sllm_node.engine.paged_attention import AttendLayer, KvTables, Scoring
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.step_graphs import StepGraphs
from sllm_node.engine.upload import Numbers as Array
from sllm_node.engine.upload import upload_all

_CAPTURED_STEP: Final = 64
_CAPTURED_MAX: Final = 512
"""Tokens: steps of up to so many are filled up to multiples, and captured."""
_TABLE_STEP: Final = 16
"""Tables are sent in multiples of so many blocks."""


class Pieces(Protocol):
    """Attends for pieces of prompts."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        """Set `output` to the attention of all pieces' tokens, packed; (tokens, heads, size) both."""


class PlainPieces:
    """By torch's scaled_dot_product_attention, one piece after another; the oracle."""

    def __init__(self, cache: KvCache, parts: Sequence[KvPart], block_tokens: int) -> None:
        self._cache = cache
        self._step = PagedStep(cache, parts, block_tokens)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        layer = next(i for i, one in enumerate(self._cache.keys) if one is keys)
        call = AttentionCall(
            layer, query, keys, values, scoring.scaling, scoring.window, scoring.softcap
        )
        output.copy_(self._step.look(call))


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much a step has of what."""

    tokens: int
    decoding: int
    """Sessions; they come first, one token each."""
    rows: int
    """Of the attention of those; some may be of no session."""

    @classmethod
    def of(cls, parts: Sequence[KvPart], sizes: Sequence[int]) -> "_Extent":
        """Return it; `sizes`: numbers of decoding sessions that there is memory for splits for."""
        decoding = _leading(parts, sizes[-1])
        rows = next(n for n in sizes if n >= decoding) if decoding else 0
        return cls(sum(part.count for part in parts), decoding, rows)


class _Attention:
    """The attention of one step: which rows decode, and which are pieces of prompts."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        parts: Sequence[KvPart],
        block_tokens: int,
        extent: _Extent,
        room: int,
    ) -> None:
        """`room`: tokens that the step is filled up to."""
        self._ops = decoder.ops
        self._cache = cache
        self._block_tokens = block_tokens
        self._extent = extent
        self._launches: dict[Scoring, AttendLayer] = {}
        rest = parts[extent.decoding :]
        pieces = [Piece(part.count, part.start + part.count) for part in rest]
        multiprocessors = decoder.ops.flash_multiprocessors
        is_flash = bool(rest) and multiprocessors is not None
        cuts = cuts_of(pieces, decoder.heads, 0 if decoder.has_windows else multiprocessors or 0)
        numbers = [
            _written(parts, block_tokens, room),
            *_tables(parts[: extent.decoding], extent.rows, block_tokens),
        ]
        if is_flash:
            slots = [slot_numbers(part, block_tokens) for part in rest]
            numbers += Numbers.of(pieces, cuts, slots).arrays()
        sent = upload_all(numbers, cache.keys[0].device)
        self.written, self._tables, self._lengths, *others = sent
        self._pieces: Pieces | None = None
        if rest:
            plain = PlainPieces(cache, rest, block_tokens)
            self._pieces = FlashPieces(pieces, cuts, others, self._ops) if is_flash else plain

    def attend(
        self, number: int, layer: FusedLayer, query: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """Set `attended` for the layer of that number."""
        keys, values = self._cache.keys[number], self._cache.values[number]
        decoding, tokens = self._extent.decoding, self._extent.tokens
        if decoding:
            # Rows of sessions that are not there may be those of prompts: these come after.
            launch = self._launches.get(layer.scoring)
            if launch is None:  # what all such layers share is checked and put together once
                some = slice(0, self._extent.rows)
                tables = KvTables(keys, values, self._tables, self._lengths, self._block_tokens)
                launch = self._ops.prepared(query[some], tables, layer.scoring, attended[some])
                self._launches[layer.scoring] = launch
            launch(keys, values)
        if self._pieces is not None:
            some = slice(decoding, tokens)
            self._pieces.attend(query[some], keys, values, layer.scoring, attended[some])


def _written(parts: Sequence[KvPart], block_tokens: int, room: int) -> Array:
    """Return the slots of a step's tokens; -1, kept nowhere, for those that fill it up."""
    slots = np.full(room, -1, np.int32)
    row = 0
    for part in parts:
        start, count = part.start, part.count
        if count == 1:
            slots[row] = part.table[start // block_tokens] * block_tokens + start % block_tokens
        else:
            slots[row : row + count] = slot_numbers(part, block_tokens, start)
        row += count
    return slots


def _tables(parts: Sequence[KvPart], rows: int, block_tokens: int) -> tuple[Array, Array]:
    """Return the tables of sessions that decode, (rows, blocks), and lengths; 0: not there."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(parts)] = [part.start + 1 for part in parts]
    blocks = -(-lengths // block_tokens)
    width = -(-int(blocks.max(initial=1)) // _TABLE_STEP) * _TABLE_STEP
    tables = np.zeros((rows, width), np.int32)
    used = (part.table[:count] for part, count in zip(parts, blocks.tolist(), strict=False))
    tables[np.arange(width) < blocks[:, None]] = [*chain.from_iterable(used)]
    return tables, lengths


@dataclass(slots=True)
class _Size:
    """What steps of one number of tokens use."""

    numbers: torch.Tensor  # (3, T) int32: ids, positions, slots
    memory: Scratch
    pieces: list[Callable[[], object]]
    """They keep the rotary angles, which graphs of them read."""


class MixedSteps:
    """The steps with prompts of one replica."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        block_tokens: int,
        sizes: Sequence[int],
        memory: ScratchMemory,
        graphs: StepGraphs | None,
    ) -> None:
        """`sizes`: numbers of decoding sessions, rising; `graphs` None: nothing is captured."""
        self._decoder = decoder
        self._cache = cache
        self._block_tokens = block_tokens
        self._sizes = sizes
        self._memory = memory
        self._graphs = graphs
        self._device = cache.keys[0].device
        self._kept: dict[int, _Size] = {}

    def compute(
        self,
        parts: Sequence[KvPart],
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits of some `rows`; ids and positions are (tokens,)."""
        extent = _Extent.of(parts, self._sizes)
        size = self._size_for(extent)
        numbers, tokens = size.numbers, extent.tokens
        room = numbers.shape[1]
        decoder, cache = self._decoder, self._cache
        attention = _Attention(decoder, cache, parts, self._block_tokens, extent, room)
        if room > tokens:  # tokens that are not there: some token, at some place
            numbers[:2, tokens:].zero_()
        numbers[0, :tokens], numbers[1, :tokens], numbers[2] = ids, positions, attention.written
        decoder.run(self._pieces_of(size), size.memory, attention.attend)
        return decoder.logits_of(size.memory, rows)

    def close(self) -> None:
        """Drop graphs and memory."""
        if self._graphs is not None:
            self._graphs.drop(self)
        self._kept.clear()

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return 0 if self._graphs is None else self._graphs.count(self)

    def _size_for(self, extent: _Extent) -> _Size:
        tokens = -(-extent.tokens // _CAPTURED_STEP) * _CAPTURED_STEP
        if max(tokens, extent.rows) > _CAPTURED_MAX:
            tokens = extent.tokens
            numbers = torch.empty(3, tokens, dtype=torch.int32, device=self._device)
            memory = self._decoder.scratch(tokens, max(tokens, extent.rows), self._device)
            return self._make(numbers, memory)
        if tokens not in self._kept:
            self._kept[tokens] = self._make(*self._take(tokens))
        return self._kept[tokens]

    def _make(self, numbers: torch.Tensor, memory: Scratch) -> _Size:
        ids, positions, slots = numbers
        inputs: Tokens = (ids, positions, slots)
        return _Size(numbers, memory, [*self._decoder.pieces(inputs, self._cache, memory)])

    def _take(self, tokens: int) -> tuple[torch.Tensor, Scratch]:
        """Return memory that other steps use in turn."""
        widths, dtype = self._decoder.widths(), self._decoder.dtype
        rows = (tokens, _CAPTURED_MAX, _CAPTURED_MAX, tokens, 0)
        sizes = [n * width * dtype.itemsize for n, width in zip(rows, widths, strict=True)]
        first, *rest = self._memory.take([3 * 4 * tokens, *sizes])
        views = (
            one.view(dtype).view(n, width) for one, n, width in zip(rest, rows, widths, strict=True)
        )
        return first.view(torch.int32).view(3, tokens), Scratch(*views)

    def _pieces_of(self, size: _Size) -> Sequence[Callable[[], object]]:
        tokens = size.numbers.shape[1]
        if self._graphs is None or self._kept.get(tokens) is not size:
            return size.pieces
        return self._graphs.of(self, ("mixed", tokens), size.pieces)


def _leading(parts: Sequence[KvPart], most: int) -> int:
    """Return how many parts at the beginning have one token."""
    count = 0
    while count < min(len(parts), most) and parts[count].count == 1:
        count += 1
    return count
