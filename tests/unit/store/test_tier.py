"""A device as the top tier: in which steps it maps memory."""

from types import SimpleNamespace

import pytest

from sllm_node.core.types import ModelId, Part
from sllm_node.core.units import GIB, MIB
from sllm_node.store.tier import STEP_BYTES, DeviceTier

A = ModelId("a")


class Mapped:
    """A range that remembers in which steps it was mapped."""

    def __init__(self, piece_bytes):
        self.piece_bytes = piece_bytes
        self.steps = []

    def map(self, pieces):
        self.steps.append(tuple(pieces))
        return f"event {len(self.steps)}"


def tier_of(place):
    device = SimpleNamespace(
        name="cuda:0", granularity=2 * MIB, memory_total=140 * GIB, memory_used=0,
        stream=lambda: None, reserve=lambda size, piece_bytes: place,
    )  # fmt: skip
    return DeviceTier(device, place.piece_bytes)


@pytest.mark.parametrize("piece", [2 * MIB, 256 * MIB, 3 * GIB])
def test_memory_is_mapped_piece_by_piece_first_and_never_much_at_once(piece):
    place, size = Mapped(piece), 64 * GIB + 256
    tier = tier_of(place)
    tier.prepare(A, Part("cuda:0", 0, size))
    tier.arena.hold(A)
    mappings = tier.map(A)
    assert place.steps[0] == (0,)
    assert [p for step in place.steps for p in step] == list(range(-(-size // piece)))
    assert all(len(step) * piece <= max(STEP_BYTES, piece) for step in place.steps)
    ends = [min((step[-1] + 1) * piece, size) for step in place.steps]
    assert mappings == tuple((end, f"event {n}") for n, end in enumerate(ends, 1))
