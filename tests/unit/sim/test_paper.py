"""The knapsack of the paper's policy against trying every set."""

from itertools import chain, combinations
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_node.core.units import MIB
from sllm_node.sim.paper import _knapsack
from sllm_node.sim.policy import Go

UNIT = 256 * MIB


def victim(size) -> Any:
    return SimpleNamespace(model=SimpleNamespace(share=size))


@pytest.mark.parametrize("seed", range(200))
def test_the_knapsack_costs_what_the_cheapest_set_costs(seed):
    rng = Random(seed)
    moves = [
        (float(rng.randint(1, 9)), Go(victim(rng.randint(1, 9) * UNIT)))
        for _ in range(rng.randint(0, 6))
    ]  # fmt: skip
    short = rng.randint(1, 20) * UNIT
    sets = chain.from_iterable(combinations(moves, n) for n in range(len(moves) + 1))
    costs = [sum(c for c, _ in s) for s in sets if sum(g.victim.model.share for _, g in s) >= short]
    found = _knapsack(moves, short)
    assert (None if found is None else sum(c for c, _ in found)) == min(costs, default=None)
