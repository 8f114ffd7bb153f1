"""Attention of prompts' pieces on a GPU by torch's flash kernel, long contexts cut into segments.

Theory of operation. A piece of n tokens that ends a context of m looks at all m. Torch's kernel gives
128 queries of a head to one thread block, which walks through the whole context: a short piece behind a
long context would keep a few multiprocessors busy and the rest idle. So the context is cut into segments
of equal length that are attended to side by side, and the rest, which holds the piece itself and is causal;
what they give is put together by the logarithms of their sums (`segments`), as flash decoding does
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Two launches serve all pieces of a step. For
segments, heads that share keys become queries one after another of one head: 32 tokens with 4 such heads fill
the 128 queries that a thread block takes, so that a short piece costs what it should.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch

from sllm_node.engine.gathered import GatherLayer
from sllm_node.engine.paged_attention import Scoring
from sllm_node.engine.segments import JoinLayer, Look
from sllm_node.engine.upload import Numbers as Array
from sllm_node.engine.upload import upload_all

_QUERIES: Final = 128
"""Of a head, that one thread block takes."""
_WAVES: Final = 2
"""Thread blocks for each multiprocessor that are enough."""
_SEGMENT_TOKENS: Final = 1024
"""Shorter segments do not pay."""


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


@dataclass(frozen=True, slots=True)
class Cuts:
    """How all pieces of a step are cut."""

    group: int
    """Heads that share keys."""
    each: tuple[Cut, ...]


def cuts_of(pieces: Sequence[Piece], kv_heads: int, group: int, multiprocessors: int) -> Cuts:
    """Return how to cut each context so that all multiprocessors have something to do. Pure.

    `group`: heads that share each of the `kv_heads`. Without multiprocessors nothing is cut, as it must
    be where a layer has a window.
    """
    blocks = kv_heads * sum(-(-piece.count * group // _QUERIES) for piece in pieces)
    wanted = _WAVES * multiprocessors // max(1, blocks)
    return Cuts(group, tuple(_cut(piece, wanted) for piece in pieces))


def _cut(piece: Piece, wanted: int) -> Cut:
    before = piece.length - piece.count
    parts = min(wanted, before // _SEGMENT_TOKENS)
    return Cut(0, 0) if parts < 2 else Cut(parts, before // parts)


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Lengths", Scoring],
    tuple[torch.Tensor, torch.Tensor],
]
"""Attends to sequences, like `flash`."""


class PieceOps(Protocol):
    """What stands around the kernel; `decode_ops.DecodeOps` are such."""

    def gathering(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        rows: torch.Tensor,
    ) -> GatherLayer:
        """Return what brings together keys, values and queries of layers like these (`gathered.prepared`)."""

    def joining(
        self, near: Look, far: Look, places: torch.Tensor, output: torch.Tensor
    ) -> JoinLayer:
        """Return what puts together looks like these (`segments.prepared`)."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the pieces of a step tell the device: of `FlashPieces`, each where it looks, and in what order."""

    slots: Array
    """Where keys and values lie that are looked at: those in segments, then the others."""
    near: Array  # (2, pieces + 1)
    """Where queries and keys of each piece begin that are in no segment, and the end."""
    far: Array  # (2, segments + 1)
    """The same of segments."""
    rows: Array
    """Of the queries of segments, among all; their heads that share keys become rows of their own."""
    places: Array  # (3, tokens): where results of segments lie, as `segments` wants to know

    @classmethod
    def of(cls, pieces: Sequence[Piece], cuts: Cuts, slots: Sequence[Array]) -> "Numbers":
        """Return them; `slots`: of each piece, where all its context lies in the cache. Pure."""
        group = cuts.group
        ends = [one.segments * one.size for one in cuts.each]
        order = [s[:end] for s, end in zip(slots, ends, strict=True)]
        order += [s[end:] for s, end in zip(slots, ends, strict=True)]
        counts = [piece.count for piece in pieces]
        near = [piece.length - end for piece, end in zip(pieces, ends, strict=True)]
        firsts = np.cumsum([0, *counts[:-1]])
        times = [one.segments for one in cuts.each]
        rows = [
            np.tile(np.arange(first, first + count), one.segments)
            for first, count, one in zip(firsts, counts, cuts.each, strict=True)
        ]
        return cls(
            np.concatenate(order).astype(np.int32),
            _starts(counts, near),
            _starts(
                group * np.repeat(counts, times), np.repeat([one.size for one in cuts.each], times)
            ),
            np.concatenate(rows).astype(np.int32),
            _places(counts, times, group),
        )

    def arrays(self) -> list[Array]:
        """Return them in the order in which `FlashPieces` wants them on the device."""
        return [self.slots, self.near, self.far, self.rows, self.places]


def _starts(queries: Sequence[int] | Array, keys: Sequence[int] | Array) -> Array:
    starts = np.zeros((2, len(queries) + 1), np.int32)
    starts[0, 1:], starts[1, 1:] = np.cumsum(queries), np.cumsum(keys)
    return starts


def _places(counts: Sequence[int], segments: Sequence[int], group: int) -> Array:
    """Return where the results of each token's segments lie: the first, how many, how far apart."""
    rows = [group * count for count in counts]
    each = np.array([(0, *np.cumsum(np.multiply(rows, segments))[:-1]), segments, rows], np.int32)
    places = np.repeat(each, counts, axis=1)
    within = [group * np.arange(count, dtype=np.int32) for count in counts]
    places[0] += np.concatenate(within)
    return places


class FlashPieces:
    """The pieces of one step, on one device; the same for all layers."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        cuts: Cuts,
        numbers: Sequence[torch.Tensor],
        ops: PieceOps,
        kernel: Kernel | None = None,
    ) -> None:
        """`numbers`: `Numbers.arrays` on the device; `kernel` None: torch's."""
        self._kernel = kernel or flash
        self._ops = ops
        self._slots, near, far, self._rows, self._places = numbers
        ends = [one.segments * one.size for one in cuts.each]
        self._far = sum(ends)
        """Tokens in segments; they are gathered before the others."""
        longest = max(piece.count for piece in pieces)
        rest = max(piece.length - end for piece, end in zip(pieces, ends, strict=True))
        self._near = Lengths(near[0], near[1], longest, rest, is_causal=True)
        cut = [piece.count for piece, one in zip(pieces, cuts.each, strict=True) if one.segments]
        size = max(one.size for one in cuts.each)
        most = cuts.group * max(cut, default=0)
        self._segments = Lengths(far[0], far[1], most, size, is_causal=False)
        self._gather: GatherLayer | None = None
        self._join: JoinLayer | None = None

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        cuts: Cuts,
        slots: Sequence[Array],
        device: torch.device,
        ops: PieceOps,
        kernel: Kernel | None = None,
    ) -> "FlashPieces":
        """Return pieces whose context lies in `slots` of the cache, all of each."""
        numbers = upload_all(Numbers.of(pieces, cuts, slots).arrays(), device)
        return cls(pieces, cuts, numbers, ops, kernel)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        """Set `output` to the attention of all pieces' tokens, packed; (tokens, heads, size) both."""
        if self._gather is None:  # what all layers share is checked and put together once
            cached = keys, values
            self._gather = self._ops.gathering(query, cached, self._slots, self._rows)
        key, value, queries = self._gather(query, keys, values)
        if not self._far:
            output.copy_(self._kernel(query, key, value, self._near, scoring)[0])
            return
        assert scoring.window is None, "a window over segments"
        near = self._kernel(query, key[self._far :], value[self._far :], self._near, scoring)
        far = self._kernel(queries, key[: self._far], value[: self._far], self._segments, scoring)
        if self._join is None:
            self._join = self._ops.joining(near, far, self._places, output)
        self._join(near, far, output)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sequences for the kernel, of S of them."""

    queries: torch.Tensor  # (S + 1,) int32: where each begins, and the end
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    is_causal: bool
    """The last query of a sequence sees its last key, the one before it all but that."""


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
