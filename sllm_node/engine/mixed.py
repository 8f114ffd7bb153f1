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
from typing import Final, Protocol

import torch

from sllm_node.engine.attention import AttentionCall
from sllm_node.engine.decode_ops import FusedLayer
from sllm_node.engine.flash import FlashPieces, Piece, cuts_of
from sllm_node.engine.fused import FusedDecoder, Scratch, Tokens
from sllm_node.engine.kv import KvCache, KvPart, PagedStep, slots_of
from sllm_node.engine.paged_attention import KvTables, Scoring
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.upload import upload

_CAPTURED_STEP: Final = 64
_CAPTURED_MAX: Final = 512
"""Tokens: steps of up to so many are filled up to multiples, and captured."""
_TABLE_STEP: Final = 16
"""Tables are sent in multiples of so many blocks."""


class Graphs(Protocol):
    """What captures steps: `graphs.CudaGraphs`."""

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return a function that does what `compute` does."""


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


class _Attention:
    """The attention of one step: which rows decode, and which are pieces of prompts."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        parts: Sequence[KvPart],
        block_tokens: int,
        sizes: Sequence[int],
    ) -> None:
        """`sizes`: numbers of decoding sessions that there is memory for splits for, rising."""
        self._decoder = decoder
        self._cache = cache
        self._block_tokens = block_tokens
        self._device = cache.keys[0].device
        self.tokens = sum(part.count for part in parts)
        self._decoding = _leading(parts, sizes[-1])
        self.rows = next(n for n in sizes if n >= self._decoding) if self._decoding else 0
        slots = [slots_of(part, block_tokens) for part in parts]
        self.written = torch.cat([s[part.start :] for s, part in zip(slots, parts, strict=True)])
        self._tables, self._lengths = self._make_tables(parts[: self._decoding])
        rest, places = parts[self._decoding :], slots[self._decoding :]
        self._pieces = self._make_pieces(rest, places) if rest else None

    def attend(
        self, number: int, layer: FusedLayer, query: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """Set `attended` for the layer of that number."""
        keys, values = self._cache.keys[number], self._cache.values[number]
        if self._decoding:
            # Rows of sessions that are not there may be those of prompts: these come after.
            tables = KvTables(keys, values, self._tables, self._lengths, self._block_tokens)
            some = slice(0, self.rows)
            self._decoder.ops.attend(query[some], tables, layer.scoring, attended[some])
        if self._pieces is not None:
            some = slice(self._decoding, self.tokens)
            self._pieces.attend(query[some], keys, values, layer.scoring, attended[some])

    def _make_tables(self, parts: Sequence[KvPart]) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = [-(-(part.start + 1) // self._block_tokens) for part in parts]
        width = -(-max(blocks, default=1) // _TABLE_STEP) * _TABLE_STEP
        numbers = torch.zeros(self.rows, width + 1, dtype=torch.int32)
        for row, (part, count) in enumerate(zip(parts, blocks, strict=True)):
            numbers[row, :count] = torch.tensor(part.table[:count], dtype=torch.int32)
            numbers[row, width] = part.start + 1
        sent = upload(numbers, self._device)
        return sent[:, :width].contiguous(), sent[:, width].contiguous()

    def _make_pieces(self, parts: Sequence[KvPart], slots: Sequence[torch.Tensor]) -> Pieces:
        decoder = self._decoder
        multiprocessors = decoder.ops.flash_multiprocessors
        if multiprocessors is None:
            return PlainPieces(self._cache, parts, self._block_tokens)
        pieces = [Piece(part.count, part.start + part.count) for part in parts]
        cuts = cuts_of(pieces, decoder.heads, 0 if decoder.has_windows else multiprocessors)
        return FlashPieces(pieces, cuts, slots, self._device)


@dataclass(slots=True)
class _Size:
    """What steps of one number of tokens use."""

    numbers: torch.Tensor  # (3, T) int32: ids, positions, slots
    memory: Scratch
    pieces: list[Callable[[], object]]
    is_used: bool = False
    is_captured: bool = False


class MixedSteps:
    """The steps with prompts of one replica."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        block_tokens: int,
        sizes: Sequence[int],
        memory: ScratchMemory,
        graphs: Graphs | None,
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
        attention = _Attention(self._decoder, self._cache, parts, self._block_tokens, self._sizes)
        size = self._size_for(attention)
        numbers, here = size.numbers, slice(0, attention.tokens)
        numbers[:2].zero_()  # tokens that are not there: some token, at some place
        numbers[2].fill_(-1)  # and kept nowhere
        numbers[0, here], numbers[1, here] = ids, positions
        numbers[2, here] = upload(attention.written.int(), self._device)
        self._decoder.run(self._pieces_of(size), size.memory, attention.attend)
        return self._decoder.logits_of(size.memory, rows)

    def close(self) -> None:
        """Drop graphs and memory."""
        self._kept.clear()

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return sum(len(size.pieces) for size in self._kept.values() if size.is_captured)

    def _size_for(self, attention: _Attention) -> _Size:
        tokens = -(-attention.tokens // _CAPTURED_STEP) * _CAPTURED_STEP
        if max(tokens, attention.rows) > _CAPTURED_MAX:
            tokens = attention.tokens
            numbers = torch.empty(3, tokens, dtype=torch.int32, device=self._device)
            memory = self._decoder.scratch(tokens, max(tokens, attention.rows), self._device)
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

    def _pieces_of(self, size: _Size) -> list[Callable[[], object]]:
        if self._graphs is not None and size.is_used and not size.is_captured:
            size.pieces = [self._captured(self._graphs, piece, size) for piece in size.pieces]
            size.is_captured = True
        size.is_used = True
        return size.pieces

    @staticmethod
    def _captured(graphs: Graphs, piece: Callable[[], object], size: _Size) -> Callable[[], object]:
        def compute() -> torch.Tensor:
            piece()
            return size.memory.hidden

        return graphs.capture(compute)


def _leading(parts: Sequence[KvPart], most: int) -> int:
    """Return how many parts at the beginning have one token."""
    count = 0
    while count < min(len(parts), most) and parts[count].count == 1:
        count += 1
    return count
