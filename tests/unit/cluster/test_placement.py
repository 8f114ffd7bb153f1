from random import Random

import pytest

from sllm_node.cluster.placement import (
    Kind,
    Reject,
    decide,
    explain,
)  # fmt: skip
from sllm_node.cluster.view import ClusterView
from tests.unit.cluster.clusters import Brute, crowded_cluster, random_cluster

ROUNDS, BATCHES = 1250, 8


def viewed(nodes, now=0.0):
    view = ClusterView()
    for node in nodes:
        view.update(node, now)
    return view


def check_is_sound(view, request, best):
    """Check that what a decision wants can be done: enough is freed, no device is promised twice."""
    node = view.nodes[best.node]
    gone = {*best.evicts, *(move.replica for move in best.moves)}
    replicas = {r.replica: r for r in node.state.replicas}
    for name in best.devices if best.kind >= Kind.LOAD else ():
        room = node.by_name[name].free + sum(replicas[r].size_on(name) for r in gone)
        assert room >= request.share_bytes
    assert all(replicas[name].is_evictable for name in best.evicts)
    promised = [(best.node, device) for device in best.devices]
    for move in best.moves:
        victim, to = replicas[move.replica], move.to
        assert victim.is_movable
        assert all(s.priority <= request.priority for s in victim.sessions)
        there = view.nodes[to.node]
        others = {r.replica: r for r in there.state.replicas}
        promised += [(to.node, device) for device in to.devices]
        if to.joins:
            assert others[to.joins].model == victim.model
            assert others[to.joins].free_slots >= len(victim.sessions)
            continue
        for name in to.devices:
            room = there.by_name[name].free + sum(others[r].size_on(name) for r in to.evicts)
            assert room >= max(share.size for share in victim.shares)
    assert len(set(promised)) == len(promised)


def check_one(seed):
    rng = Random(seed)
    nodes, request = (crowded_cluster if seed % 4 == 0 else random_cluster)(rng)
    age = rng.choice([0.0, 0.5, 4.0])
    view = viewed(nodes, 100.0)
    decision = decide(view, request, 100.0 + age)
    brute = Brute(nodes, age)
    expected = brute.best(request)
    if expected is None:
        assert isinstance(decision, Reject), seed
        return "REJECT"
    assert not isinstance(decision, Reject), seed
    assert decision.best.key == expected, seed
    every = explain(view, request, 100.0 + age)
    assert every[0].key == decision.best.key, seed
    found = {(c.node, int(c.kind)): c.key for c in every if c.kind >= Kind.LOAD}
    expected_each = brute.best_of_each(request)
    # Beside a load without evictions, one with them is told only where its devices are free sooner.
    assert {k: v for k, v in expected_each.items() if k in found or k[1] != Kind.EVICT} == found, (
        seed
    )
    for candidate in every:
        check_is_sound(view, request, candidate)
    return decision.best.kind.name


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_decision_is_what_trying_everything_finds(batch):
    seen = {check_one(seed) for seed in range(batch * ROUNDS, (batch + 1) * ROUNDS)}
    assert seen == {"REJECT", *(kind.name for kind in Kind)}
