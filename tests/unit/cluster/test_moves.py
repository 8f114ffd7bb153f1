from collections import Counter
from random import Random

import pytest

from sllm_node.cluster.move_search import cheapest_moves
from sllm_node.cluster.moves import Streams, evictions
from sllm_node.cluster.node_view import NodeView
from sllm_node.cluster.placement import MigrateThenLoad, Reject, decide
from sllm_node.cluster.state import DeviceShare, ReplicaId, ReplicaState
from sllm_node.core.types import ModelId
from tests.unit.cluster.clusters import crowded_cluster, one_node, tight_cluster, viewed
from tests.unit.cluster.plain_moves import plain_best


def idle(name, size, idle_s):
    return ReplicaState(
        ReplicaId(name), ModelId(name), (DeviceShare("d0", size),), 1, idle_s=idle_s
    )


@pytest.mark.parametrize(
    ("needs", "leaving", "expected"),
    [(2, (), ()), (4, (), ("x",)), (12, (), ("y",)), (16, (), ("x", "y")), (12, ("y",), ())],
)
def test_idle_replicas_are_evicted_longest_idle_first_and_no_more_than_needed(
    needs, leaving, expected
):
    node = NodeView(one_node(free=2, replicas=[idle("x", 6, 9.0), idle("y", 10, 1.0)]), 0.0)
    assert evictions(node, {"d0": needs}, leaving=leaving) == expected


@pytest.mark.parametrize("seed", range(100))
def test_destinations_come_cheapest_first_and_each_once(seed):
    nodes, _ = crowded_cluster(Random(seed))
    view = viewed(nodes)
    streams = Streams(view, 1.0)
    home = view.nodes[nodes[0].node]
    for victim in home.state.replicas:
        found = list(streams.of(home, victim).all)
        assert found == sorted(set(found))
        assert list(streams.of(home, victim).all) == found
        if victim.is_movable:
            assert view.floors.least_s(home.node, victim) <= streams.least_s(home, victim)


def test_a_search_stops_at_its_limit_of_steps():
    found = []
    for seed in range(50):
        nodes, request = crowded_cluster(Random(seed))
        view = viewed(nodes)
        home = view.nodes[nodes[0].node]
        needs = {home.devices[0].name: request.share_bytes}
        found.append(cheapest_moves(Streams(view, 0.0, steps_max=0), home, needs, 1, 1e9))
    assert all(result is None or result[1] == () for result in found)


def is_as_plain(seed):
    """Compare with the plain search where that one came to its end; tell whether moves were best."""
    nodes, request = tight_cluster(Random(seed))
    view = viewed(nodes)
    decision = decide(view, request, 1.0)
    expected, is_whole = plain_best(view, request, 1.0, steps_max=20_000)
    if not is_whole:
        return None
    assert decision.is_exact
    assert (None if isinstance(decision, Reject) else decision.best.key) == expected, seed
    return isinstance(decision, MigrateThenLoad)


@pytest.mark.parametrize("batch", range(4))
def test_where_room_is_tight_the_moves_are_those_that_a_plain_search_finds(batch):
    outcomes = Counter(is_as_plain(seed) for seed in range(batch * 150, (batch + 1) * 150))
    assert outcomes[True] >= 90
