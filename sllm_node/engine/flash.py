"""Attention of prompts' pieces on a GPU by torch's flash kernel, long contexts cut into segments.

Theory of operation. A piece of n tokens that ends a context of m looks at all m. Torch's kernel gives
128 queries of a head to one thread block, which walks through the whole context: a short piece behind a
long context would keep a few multiprocessors busy and the rest idle. So the context is cut into segments
of equal length that are attended to side by side, the last of which holds the piece itself and is causal;
what they give is put together by the logarithms of their sums, as flash decoding does
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Two launches serve all pieces of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from sllm_node.engine.paged_attention import Scoring
from sllm_node.engine.upload import upload

_QUERIES: Final = 128
"""Of a head, that one thread block takes."""
_WAVES: Final = 2
"""Thread blocks for each multiprocessor that are enough."""
_SEGMENT_TOKENS: Final = 1024
"""Shorter segments do not pay."""
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """The last `count` of `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a piece's context is cut: `segments` of `size` tokens, then the rest with the piece."""

    segments: int
    size: int


def cuts_of(pieces: Sequence[Piece], heads: int, multiprocessors: int) -> list[Cut]:
    """Return how to cut each context so that all multiprocessors have something to do. Pure.

    Without multiprocessors nothing is cut, as it must be where a layer has a window.
    """
    blocks = heads * sum(-(-piece.count // _QUERIES) for piece in pieces)
    wanted = -(-_WAVES * multiprocessors // max(1, blocks))
    return [_cut(piece, wanted) for piece in pieces]


def _cut(piece: Piece, wanted: int) -> Cut:
    parts = min(wanted, piece.length // _SEGMENT_TOKENS)
    if parts < 2:
        return Cut(0, 0)
    size = piece.length // parts // _ALIGNMENT * _ALIGNMENT
    return Cut(min(parts - 1, (piece.length - piece.count) // size), size)


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Lengths", Scoring],
    tuple[torch.Tensor, torch.Tensor],
]
"""Attends to sequences, like `flash`."""


class FlashPieces:
    """The pieces of one step, on one device; the same for all layers."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        cuts: Sequence[Cut],
        slots: Sequence[torch.Tensor],
        device: torch.device,
        kernel: "Kernel | None" = None,
    ) -> None:
        """`slots`: of each piece, where all its context lies in the cache; `kernel` None: torch's."""
        self._kernel = kernel or flash
        ends = [one.segments * one.size for one in cuts]
        self._far = sum(ends)
        """Tokens in segments; they are gathered before the others."""
        order = [s[:end] for s, end in zip(slots, ends, strict=True)]
        order += [s[end:] for s, end in zip(slots, ends, strict=True)]
        self._slots = upload(torch.cat(order), device)
        near = [piece.length - end for piece, end in zip(pieces, ends, strict=True)]
        self._near = Lengths.of([piece.count for piece in pieces], near, device, is_causal=True)
        self._segments: Lengths | None = None
        self._joints: list[_Joint] = []
        if self._far:
            counts: list[int] = []
            sizes: list[int] = []
            rows: list[int] = []
            first = 0
            for piece, one in zip(pieces, cuts, strict=True):
                if one.segments:
                    self._joints.append(_Joint(first, piece.count, one.segments, len(rows)))
                counts += [piece.count] * one.segments
                sizes += [one.size] * one.segments
                rows += list(range(first, first + piece.count)) * one.segments
                first += piece.count
            self._segments = Lengths.of(counts, sizes, device, is_causal=False)
            self._rows = upload(rows, device)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        """Set `output` to the attention of all pieces' tokens, packed; (tokens, heads, size) both."""
        key, value = keys.index_select(0, self._slots), values.index_select(0, self._slots)
        if self._segments is None:
            output.copy_(self._kernel(query, key, value, self._near, scoring)[0])
            return
        assert scoring.window is None, "a window over segments"
        near, weight = self._kernel(
            query, key[self._far :], value[self._far :], self._near, scoring
        )
        far, weights = self._kernel(
            query.index_select(0, self._rows), key[: self._far], value[: self._far],
            self._segments, scoring,
        )  # fmt: skip
        output.copy_(near)
        for joint in self._joints:
            joint.put(output, (near, weight), (far, weights))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sequences for the kernel, of S of them."""

    queries: torch.Tensor  # (S + 1,) int32: where each begins, and the end
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    is_causal: bool
    """The last query of a sequence sees its last key, the one before it all but that."""

    @classmethod
    def of(
        cls, queries: list[int], keys: list[int], device: torch.device, *, is_causal: bool
    ) -> "Lengths":
        starts = torch.zeros(2, len(queries) + 1, dtype=torch.int32)
        starts[:, 1:] = torch.tensor([queries, keys], dtype=torch.int32).cumsum(1)
        both = upload(starts, device)
        return cls(both[0], both[1], max(queries), max(keys), is_causal)


@dataclass(frozen=True, slots=True)
class _Joint:
    """Where a piece's results lie that are put together."""

    first: int
    count: int
    segments: int
    far: int

    def put(
        self,
        output: torch.Tensor,
        near: tuple[torch.Tensor, torch.Tensor],
        far: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Write what they give together; of each: results and logarithms of sums."""
        here = slice(self.first, self.first + self.count)
        there = slice(self.far, self.far + self.segments * self.count)
        logs = far[1][:, there].view(-1, self.segments, self.count)
        logs = torch.cat((near[1][:, None, here], logs), 1)  # (heads, segments + 1, tokens)
        shares = torch.softmax(logs, 1).permute(1, 2, 0)[..., None]
        parts = far[0][there].view(self.segments, self.count, *far[0].shape[1:])
        joined = near[0][here] * shares[0] + (parts * shares[1:]).sum(0)
        output[here] = joined.to(output.dtype)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return results (tokens, heads, size) and logarithms of sums (heads, tokens).

    torch.nn.attention.varlen wraps the same operator; how it is asked for grouped heads and scales
    differs from version to version.
    """
    window: dict[str, Any] = {}
    if scoring.window is not None:
        window = {"window_size_left": scoring.window - 1, "window_size_right": 0}
    result: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        query, key, value, lengths.queries, lengths.keys, lengths.longest_query,
        lengths.longest_key, 0.0, lengths.is_causal, return_debug_mask=False, scale=scoring.scaling, **window,
    )  # fmt: skip
    return result[0], result[1]
