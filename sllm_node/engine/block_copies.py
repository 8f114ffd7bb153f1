"""Copies KV blocks to chunks of the pinned pool and back; runs on the step thread, before a step.

A chunk holds as many blocks as fit: of each device of the model, tensor by tensor, the rows of these
blocks. So what lies scattered in KV memory is gathered in device memory, one operation a tensor, and
goes to the host in one copy a chunk; on the way back it is spread in the same way.

All of it is on the stream of the steps. What a copy reads was written by steps before it, and
what it writes is there for those after it. Copies to the pool are waited for: the blocks are somebody
else's then. Copies back are not: they have ended when the step behind them has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from sllm_node.engine.kv import KvCache
from sllm_node.engine.offload import Transfer
from sllm_node.engine.upload import upload


def block_bytes(cache: KvCache, block_tokens: int) -> int:
    """Return what a block takes in all layers together."""
    tensors = (*cache.keys, *cache.values)
    return sum(tensor[0].numel() * tensor.itemsize for tensor in tensors) * block_tokens


@dataclass(frozen=True, slots=True)
class _Piece:
    """The part of a transfer that is in one chunk."""

    view: memoryview
    count: int
    """Blocks in the chunk."""
    first: int
    """Of these, the first one that is copied."""
    blocks: tuple[int, ...]


class BlockCopies:
    """The ways between one KV cache and chunks of `chunk_blocks` blocks."""

    def __init__(self, cache: KvCache, block_tokens: int, chunk_blocks: int) -> None:
        self._cache = cache
        self._block_tokens = block_tokens
        self._chunk_blocks = chunk_blocks

    def run(self, transfers: Sequence[Transfer]) -> None:
        """Carry out `transfers` in order; those to the pool have ended then, however it went."""
        with torch.inference_mode():
            parts = self._parts()
            try:
                for transfer in transfers:
                    for piece in self._pieces(transfer):
                        _copy(parts, piece, is_back=transfer.is_back)
            finally:  # after a failure, too: chunks go back to the pool then
                if any(not transfer.is_back for transfer in transfers):
                    for rows in parts:
                        _wait(rows[0].device)

    def _parts(self) -> list[list[torch.Tensor]]:
        """Return the tensors of each device, as (blocks, elements)."""
        both = zip(self._cache.keys, self._cache.values, strict=True)
        tensors = [
            tensor.view(tensor.shape[0] // self._block_tokens, -1)
            for pair in both
            for tensor in pair
        ]
        return [list(rows) for _, rows in groupby(tensors, lambda rows: rows.device)]

    def _pieces(self, transfer: Transfer) -> Iterator[_Piece]:
        size, last = self._chunk_blocks, transfer.first + len(transfer.blocks)
        for number, view in enumerate(transfer.loan.views):
            start = number * size
            count = min(size, transfer.total - start)
            first, end = max(transfer.first - start, 0), min(last - start, count)
            if first < end:
                at = start + first - transfer.first
                yield _Piece(view, count, first, transfer.blocks[at : at + end - first])


def _copy(parts: Sequence[Sequence[torch.Tensor]], piece: _Piece, *, is_back: bool) -> None:
    place = 0
    for rows in parts:
        size = sum(piece.count * tensor.shape[1] * tensor.itemsize for tensor in rows)
        host = torch.frombuffer(piece.view[place : place + size], dtype=torch.uint8)
        staged = torch.empty(size, dtype=torch.uint8, device=rows[0].device)
        index = upload(piece.blocks, staged.device)
        chosen = slice(piece.first, piece.first + len(piece.blocks))
        if is_back:
            staged.copy_(host, non_blocking=True)
        for tensor, region in zip(rows, _regions(staged, rows, piece.count), strict=True):
            if is_back:
                tensor.index_copy_(0, index, region[chosen])
            else:
                region[chosen] = tensor.index_select(0, index)
        if not is_back:
            host.copy_(staged, non_blocking=True)
        place += size


def _regions(
    staged: torch.Tensor, rows: Sequence[torch.Tensor], count: int
) -> Iterator[torch.Tensor]:
    """Yield where in `staged` the `count` rows of each tensor lie."""
    offset = 0
    for tensor in rows:
        size = count * tensor.shape[1] * tensor.itemsize
        yield staged[offset : offset + size].view(tensor.dtype).view(count, -1)
        offset += size


def _wait(device: torch.device) -> None:
    """Wait until what was enqueued on `device` has ended."""
    if device.type == "cpu":
        return
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    event.synchronize()
