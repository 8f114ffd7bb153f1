from dataclasses import replace
from random import Random

import pytest

from sllm_node.cluster.placement import decide
from sllm_node.cluster.state import BootId, NodeId
from sllm_node.cluster.view import ClusterView
from tests.unit.cluster.clusters import (
    crowded_cluster,
    random_cluster,
    random_model_sizes,
    random_node,
    viewed,
)


def test_an_older_state_of_the_same_boot_is_passed_over_and_a_new_boot_is_not():
    node = random_cluster(Random(1))[0][0]
    view = ClusterView()
    assert view.update(replace(node, version=5), 1.0)
    assert not view.update(replace(node, version=5), 2.0)
    assert not view.update(replace(node, version=4), 2.0)
    assert view.update(replace(node, version=1, boot=BootId("c")), 3.0)
    assert view.nodes[node.node].seen_at == 3.0


@pytest.mark.parametrize("seed", range(60))
def test_a_view_brought_up_to_date_bit_by_bit_is_one_made_at_once(seed):
    rng = Random(seed)
    sizes = random_model_sizes(rng)
    view, current = ClusterView(), {}
    for version in range(1, 60):
        name = NodeId(f"n{rng.randint(0, 3)}")
        if rng.random() < 0.15:
            view.remove(name)
            current.pop(name, None)
        else:
            node = random_node(rng, name, sizes)
            if name in current and rng.random() < 0.6:
                node = replace(current[name], replicas=node.replicas, devices=node.devices)
            current[name] = replace(node, version=version)
            view.update(current[name], 0.0)
        fresh = viewed(current.values())
        model = rng.choice(list(sizes))
        assert list(view.paths(model)) == list(fresh.paths(model))
        assert view.resident(model) == fresh.resident(model)
        assert view.is_known(model) == fresh.is_known(model)
        for _, node_id in view.paths(model):
            assert view.path(model, node_id) == fresh.path(model, node_id)


@pytest.mark.parametrize("seed", range(30))
def test_decisions_on_a_view_brought_up_to_date_are_those_on_one_made_at_once(seed):
    rng = Random(seed)
    nodes, request = crowded_cluster(rng)
    current = {node.node: node for node in nodes}
    view = viewed(nodes)
    for version in range(2, 40):
        fresh_nodes = {node.node: node for node in crowded_cluster(rng)[0]}
        name = rng.choice(sorted(fresh_nodes))
        node = fresh_nodes[name]
        if name in current and rng.random() < 0.5:
            node = replace(current[name], replicas=node.replicas, devices=node.devices)
        current[name] = replace(node, version=version)
        view.update(current[name], 0.0)
        fresh = viewed(current.values())
        found = [decide(v, request, 1.0) for v in (view, fresh)]
        assert [getattr(d, "best", d) for d in found[:1]] == [
            getattr(d, "best", d) for d in found[1:]
        ]
        for known in current:
            floors = [
                v.floors.on_devices(v.nodes[known], 20, is_split=False) for v in (view, fresh)
            ]
            assert floors[0] == floors[1]
