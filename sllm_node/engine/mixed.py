"""Steps with pieces of prompts, also beside sessions that decode, without the module's forward pass.

The same few operations a layer as in decode steps (`fused`), with as many rows as there are tokens.
Sessions that decode come first; they attend by the kernel of decode steps, pieces of prompts by torch's
flash kernel where it can, and otherwise as `kv` does it. Shapes are different each time, so nothing is
captured; what a step needs is allocated by torch.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import torch

from sllm_node.engine.attention import AttentionCall
from sllm_node.engine.decode_ops import FusedLayer
from sllm_node.engine.flash import FlashPieces, Piece, cuts_of
from sllm_node.engine.fused import FusedDecoder
from sllm_node.engine.kv import KvCache, KvPart, PagedStep, slots_of
from sllm_node.engine.paged_attention import KvTables, Scoring
from sllm_node.engine.upload import upload

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


class MixedStep:
    """One step: which rows decode, and which are pieces of prompts."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KvCache,
        parts: Sequence[KvPart],
        block_tokens: int,
        rows_of: Sequence[int],
    ) -> None:
        """`rows_of`: numbers of decoding sessions that there are kernels' splits for, rising."""
        self._decoder = decoder
        self._cache = cache
        self._block_tokens = block_tokens
        self._device = cache.keys[0].device
        self._tokens = sum(part.count for part in parts)
        self._decoding = _leading(parts, rows_of[-1])
        rows = next(size for size in rows_of if size >= self._decoding) if self._decoding else 0
        self._rows = rows
        slots = [slots_of(part, block_tokens) for part in parts]
        written = torch.cat([s[part.start :] for s, part in zip(slots, parts, strict=True)])
        self._written = upload(written.to(torch.int32), self._device)
        self._tables, self._lengths = self._make_tables(parts[: self._decoding], rows)
        rest, places = parts[self._decoding :], slots[self._decoding :]
        self._pieces = self._make_pieces(rest, places) if rest else None

    def compute(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of some `rows`; ids and positions are (tokens,)."""
        memory = self._decoder.scratch(self._tokens, max(self._tokens, self._rows), self._device)
        inputs = (ids, positions, self._written)
        return self._decoder.forward(inputs, self._cache, memory, rows, self._attend)

    def _attend(
        self, number: int, layer: FusedLayer, query: torch.Tensor, attended: torch.Tensor
    ) -> None:
        keys, values = self._cache.keys[number], self._cache.values[number]
        if self._decoding:
            # Rows of sessions that are not there may be those of prompts: these come after.
            tables = KvTables(keys, values, self._tables, self._lengths, self._block_tokens)
            some = slice(0, self._rows)
            self._decoder.ops.attend(query[some], tables, layer.scoring, attended[some])
        if self._pieces is not None:
            some = slice(self._decoding, self._tokens)
            self._pieces.attend(query[some], keys, values, layer.scoring, attended[some])

    def _make_tables(self, parts: Sequence[KvPart], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = [-(-(part.start + 1) // self._block_tokens) for part in parts]
        width = -(-max(blocks, default=1) // _TABLE_STEP) * _TABLE_STEP
        numbers = torch.zeros(rows, width + 1, dtype=torch.int32)
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


def _leading(parts: Sequence[KvPart], most: int) -> int:
    """Return how many parts at the beginning have one token."""
    count = 0
    while count < min(len(parts), most) and parts[count].count == 1:
        count += 1
    return count
