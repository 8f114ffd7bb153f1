"""Long contexts cut into segments give what they give in one piece."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.engine.decode_ops import ReferenceOps
from sllm_node.engine.flash import FlashPieces, Piece, cuts_of
from sllm_node.engine.paged_attention import Scoring
from tests.unit.engine.flash_oracle import ends_of, oracle

HEADS, KV_HEADS, SIZE = 4, 2, 8
CPU = torch.device("cpu")


def attend(pieces, multiprocessors, window=None):
    torch.manual_seed(1)
    room = sum(piece.length for piece in pieces)
    slots = np.split(torch.randperm(room).int().numpy(), ends_of(pieces))
    keys, values = torch.randn(2, room, KV_HEADS, SIZE, dtype=torch.float64)
    query = torch.randn(sum(p.count for p in pieces), HEADS, SIZE, dtype=torch.float64)
    output = torch.empty_like(query)
    cuts = cuts_of(pieces, HEADS, multiprocessors)
    step = FlashPieces.of(pieces, cuts, slots, CPU, ReferenceOps(), oracle)
    step.attend(query, keys, values, Scoring(0.3, window), output)
    return cuts, output


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(5, 4100)],
        [Piece(3, 3), Piece(100, 5000), Piece(1, 2), Piece(7, 3000)],
        [Piece(3000, 3000), Piece(1, 9000)],
    ],
)
def test_segments_change_nothing(pieces):
    cuts, found = attend(pieces, 132)
    _, wanted = attend(pieces, 0)
    assert any(one.segments for one in cuts)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_window_is_passed_on():
    _, found = attend([Piece(4, 40)], 0, window=6)
    _, wanted = attend([Piece(4, 40)], 0)
    assert not torch.allclose(found, wanted)


@given(
    pieces=st.lists(
        st.tuples(st.integers(1, 3000), st.integers(0, 200_000)).map(
            lambda drawn: Piece(drawn[0], sum(drawn))
        ),
        min_size=1,
        max_size=8,
    ),
    heads=st.integers(1, 64),
    multiprocessors=st.integers(0, 200),
)
def test_the_piece_itself_is_never_cut(pieces, heads, multiprocessors):
    for piece, one in zip(pieces, cuts_of(pieces, heads, multiprocessors), strict=True):
        assert one.segments * one.size <= piece.length - piece.count
        assert one.segments == 0 or one.size >= 512
        assert multiprocessors or one.segments == 0


def test_a_short_piece_behind_a_long_context_keeps_all_multiprocessors_busy():
    (one,) = cuts_of([Piece(128, 32768)], 32, 132)
    assert 32 * (one.segments + 1) >= 2 * 132
