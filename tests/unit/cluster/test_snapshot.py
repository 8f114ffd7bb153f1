from typing import Any

import pytest

from sllm_node.cluster.snapshot import Snapshot
from sllm_node.cluster.state import BootId
from sllm_node.core.types import ModelId, ModelState, NodeId, Tier
from sllm_node.schedule.actions import ReplicaView
from sllm_node.schedule.outlook import ModelFacts


class Outlook:
    slots = 4
    keeps_remotes = False
    evict_s = 0.0
    is_draining = False

    def __init__(self, replicas, by_tier):
        self._replicas, self._by_tier = replicas, by_tier

    def replicas(self):
        return self._replicas

    def models(self):
        return [
            ModelFacts(ModelId(name), 100, 100, tiers, (100,), 512, 7, waiting=2)
            for name, tiers in self._by_tier.items()
        ]

    def capacities(self):
        return {"d": 400}

    def beside_s(self, *, is_kept):
        return 0.0

    def bandwidth(self, tier, *, is_encoded=False):
        return 1.0

    def session(self, ticket):
        return None


def replica(model, ready_at, state=ModelState.LOADING, *, is_leaving=False):
    return ReplicaView(
        ModelId(model), state, ("d",), (100,), (), (), pinned=False, is_leaving=is_leaving,
        ready_at=ready_at, last_used=0.0, service_s=1.0,
    )  # fmt: skip


def state(replicas, by_tier):
    outlook: Any = Outlook(tuple(replicas), by_tier)
    snapshot = Snapshot(NodeId("a"), BootId("1"), outlook)
    snapshot.look()
    return snapshot.state(10.0)


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ({Tier.NVME: 100}, (5.0, 0.0)),
        ({Tier.NVME: 100, Tier.DRAM: 100}, (0.0, 0.0)),
        ({Tier.NVME: 40}, (5.0, 5.0)),
        ({}, (0.0, 5.0)),
    ],
)
def test_loads_under_way_say_when_what_they_read_from_is_free(tiers, expected):
    made = state([replica("m", 12.0), replica("n", 15.0)], {"m": tiers, "n": tiers})
    assert (made.nvme_done_s, made.link_done_s) == expected


def test_what_is_loaded_or_overdue_keeps_nothing_busy():
    replicas = [replica("m", 15.0, ModelState.READY), replica("n", 9.0)]
    made = state(replicas, {"m": {Tier.NVME: 100}, "n": {Tier.NVME: 100}})
    assert (made.nvme_done_s, made.link_done_s) == (0.0, 0.0)


def test_nobody_is_to_wait_for_a_replica_that_leaves():
    leaving = replica("m", 0.0, ModelState.READY, is_leaving=True)
    assert state([leaving], {"m": {}}).replicas[0].next_free_s is None


def test_who_leaves_and_who_waits_is_told():
    made = state([replica("m", 0.0, ModelState.READY, is_leaving=True)], {"m": {}})
    assert made.replicas[0].is_leaving
    assert made.models[0].waiting == 2
