from dataclasses import replace
from random import Random

import pytest

from sllm_node.cluster.candidate import Kind, PlacementRequest
from sllm_node.cluster.placement import (
    LoadThere,
    MigrateThenLoad,
    Reject,
    ServeHere,
    Wait,
    decide,
    explain,
)  # fmt: skip
from sllm_node.cluster.state import DeviceShare, ReplicaId, ReplicaState
from sllm_node.core.types import ModelId
from tests.unit.cluster.clusters import (
    Brute,
    busy,
    crowded_cluster,
    one_node,
    random_cluster,
    random_model_sizes,
    random_node,
    viewed,
)  # fmt: skip

ROUNDS, BATCHES = 1250, 8


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


@pytest.mark.parametrize("seed", range(40))
def test_in_a_larger_cluster_looking_at_few_nodes_finds_the_same_as_looking_at_all(seed):
    rng = Random(seed)
    sizes = random_model_sizes(rng)
    nodes = [random_node(rng, f"n{i:02}", sizes) for i in range(24)]
    view = viewed(nodes)
    for model, (size, shares, _) in sizes.items():
        decision = decide(view, PlacementRequest(model, size, shares), 1.0)
        every = explain(view, PlacementRequest(model, size, shares), 1.0)
        assert not isinstance(decision, Reject)
        assert decision.best.key == every[0].key
        assert decision.best in decision.seen


A = PlacementRequest(ModelId("a"), 16)


def reason(*nodes, request=A):
    decision = decide(viewed(nodes), request, 0.0)
    assert isinstance(decision, Reject)
    return decision.reason


def test_a_rejection_says_what_lacks():
    assert reason() == "no node has or can fetch model 'a'"
    assert "takes requests" in reason(one_node(free=32, is_draining=True))
    assert "1 devices with 16 bytes" in reason(one_node(total=8, free=8))
    assert "can't move" in reason(one_node(replicas=[busy("b", 32)]))


def test_sessions_move_away_where_the_model_lies_in_dram_and_the_victim_may_be_larger_than_the_shortage():
    nodes = one_node(replicas=[busy("b", 32)]), one_node(free=32, name="n1", dram=0)
    decision = decide(viewed(nodes), A, 0.0)
    assert isinstance(decision, MigrateThenLoad)
    (move,) = decision.best.moves
    assert (decision.best.node, move.replica, move.sessions) == ("n0", "r0", ("s",))
    assert (move.to.node, move.to.devices) == ("n1", ("d0",))
    assert decision.best.startup_s == pytest.approx(1 + 0.05 + 20 * 2e-4 + 1)
    assert "sessions have moved; starts in 2.054 s" in decision.best.reason
    loads = [c for c in decision.seen if c.kind is Kind.LOAD]
    assert [(c.node, c.startup_s) for c in loads] == [("n1", 8.0)]


def slow_to_evict(node):
    return replace(node, bandwidths=replace(node.bandwidths, evict_s=0.5))


def test_a_start_after_moves_waits_until_what_they_left_and_what_makes_room_for_them_is_evicted():
    idle = ReplicaState(ReplicaId("c"), ModelId("c"), (DeviceShare("d0", 32),), 1, idle_s=9.0)
    here = slow_to_evict(one_node(replicas=[busy("b", 32)]))
    free = slow_to_evict(one_node(free=32, name="n1", dram=0))
    taken = slow_to_evict(one_node(replicas=[idle], name="n1", dram=0))
    soon, late = (decide(viewed((here, there)), A, 0.0) for there in (free, taken))
    assert isinstance(soon, MigrateThenLoad)
    assert isinstance(late, MigrateThenLoad)
    assert late.best.moves[0].to.evicts == ("c",)
    move_s = 1 + 0.05 + 20 * 2e-4
    assert soon.best.startup_s == pytest.approx(move_s + 0.5 + 1)
    assert late.best.startup_s == pytest.approx(0.5 + move_s + 0.5 + 1)


def test_sessions_of_a_higher_priority_stay():
    nodes = one_node(replicas=[busy("b", 32, priority=1)]), one_node(free=32, name="n1", dram=0)
    assert isinstance(decide(viewed(nodes), A, 0.0), LoadThere)
    urgent = PlacementRequest(ModelId("a"), 16, priority=1)
    assert isinstance(decide(viewed(nodes), urgent, 0.0), MigrateThenLoad)


def test_sessions_that_are_to_be_left_alone_stay():
    there = busy("b", 32)
    sessions = (replace(there.sessions[0], stays=True),)
    nodes = (
        one_node(replicas=[replace(there, sessions=sessions)]),
        one_node(free=32, name="n1", dram=0),
    )
    assert isinstance(decide(viewed(nodes), A, 0.0), LoadThere)


def test_a_pinned_replica_stays():
    nodes = one_node(replicas=[busy("b", 32, is_pinned=True)]), one_node(free=32, name="n1", dram=0)
    assert isinstance(decide(viewed(nodes), A, 0.0), LoadThere)


def test_of_replicas_with_a_place_the_emptiest_serves():
    full = ReplicaState(ReplicaId("x"), A.model, (DeviceShare("d0", 16),), 4, busy("a", 1).sessions)
    idle = ReplicaState(ReplicaId("y"), A.model, (DeviceShare("d0", 16),), 4)
    decision = decide(
        viewed([one_node(replicas=[full]), one_node(name="n1", replicas=[idle])]), A, 0.0
    )
    assert isinstance(decision, ServeHere)
    assert decision.best.node == "n1"


def test_time_that_passes_shortens_a_wait():
    view = viewed([one_node(replicas=[busy("a", 32, next_free_s=5.0)])])
    decision = decide(view, A, 2.0)
    assert isinstance(decision, Wait)
    assert decision.best.startup_s == 3.0


def test_a_load_waits_for_the_disk_that_all_devices_of_a_node_share():
    disk_is_busy = replace(one_node(free=32, dram=0), nvme_done_s=100.0)
    best = explain(viewed([disk_is_busy]), PlacementRequest(ModelId("a"), 16), 0.0)[0]
    assert (best.wait_s, best.load_s) == (100.0, 8.0)


def test_a_load_from_dram_does_not_wait_for_the_disk():
    disk_is_busy = replace(one_node(free=32), nvme_done_s=100.0)
    best = explain(viewed([disk_is_busy]), PlacementRequest(ModelId("a"), 16), 0.0)[0]
    assert best.wait_s == 0


def test_of_loads_that_are_equally_soon_the_one_that_evicts_nothing_wins_at_any_time():
    rates = replace(one_node().bandwidths, dram=9.7, nvme=9.7)
    evicting = one_node(name="n0", replicas=[replace(busy("b", 32), sessions=())])
    nodes = [replace(node, bandwidths=rates) for node in (evicting, one_node(name="n1", free=32))]
    for now in (0.0, 0.1, 100.0, 12345.678):
        decision = decide(viewed(nodes, now), A, now)
        assert isinstance(decision, LoadThere)
        assert (decision.best.node, decision.best.kind) == ("n1", Kind.LOAD)


def coming(ready_s):
    return ReplicaState(ReplicaId("y"), A.model, (DeviceShare("d0", 16),), 4, ready_s=ready_s)


def test_a_replica_whose_load_is_overdue_serves_nobody_and_is_late_for_as_long_again():
    view = viewed([one_node(replicas=[coming(0.5)])])
    decision = decide(view, A, 2.0)
    assert isinstance(decision, Wait)
    assert decision.best.startup_s == 1.5
    assert isinstance(decide(view, A, 0.5), Wait)  # until its node says that it is there


def test_a_load_elsewhere_wins_over_one_that_is_overdue_by_more():
    free = one_node(free=32, name="n1")  # which loads it in 1 s
    view = viewed([one_node(replicas=[coming(0.5)]), free])
    assert [type(decide(view, A, now)) for now in (0.7, 2.0)] == [Wait, LoadThere]
