from dataclasses import replace
from typing import Any, ClassVar

import pytest

from sllm_node.cluster.snapshot import Snapshot
from sllm_node.cluster.state import BootId
from sllm_node.core.types import ModelId, ModelState, NodeId, SessionId, Tier
from sllm_node.schedule.actions import ReplicaView, TicketId
from sllm_node.schedule.outlook import ModelFacts, SessionFacts


class Outlook:
    slots = 4
    keeps_remotes = False
    evict_s = 0.0
    is_draining = False
    facts: ClassVar[dict[TicketId, SessionFacts]] = {}

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
        return self.facts.get(ticket)


def replica(model, ready_at, state=ModelState.LOADING, *, is_leaving=False):
    return ReplicaView(
        ModelId(model), state, ("d",), (100,), (), (), pinned=False, is_leaving=is_leaving,
        ready_at=ready_at, last_used=0.0, service_s=1.0,
    )  # fmt: skip


def state(replicas, by_tier, evict_s=0.0):
    outlook: Any = Outlook(tuple(replicas), by_tier)
    outlook.evict_s = evict_s
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


def test_others_wait_for_the_bytes_of_a_load_and_not_for_what_it_takes_beside_them():
    coming = replace(replica("m", 15.0), load_s=5.0, beside_s=2.0)
    made = state([coming], {"m": {Tier.NVME: 100}})
    assert made.nvme_done_s == made.devices[0].loads_done_s[0] == 3.0
    assert made.replicas[0].ready_s == 5.0
    late = state([replace(coming, ready_at=11.0)], {"m": {Tier.NVME: 100}})
    assert late.nvme_done_s == 0.0


def test_what_is_loaded_or_overdue_keeps_nothing_busy():
    replicas = [replica("m", 15.0, ModelState.READY), replica("n", 9.0)]
    made = state(replicas, {"m": {Tier.NVME: 100}, "n": {Tier.NVME: 100}})
    assert (made.nvme_done_s, made.link_done_s) == (0.0, 0.0)


def test_a_load_that_is_overdue_by_more_than_a_moment_is_told_to_take_as_long_again():
    told = [state([replica("m", at)], {}).replicas[0].ready_s for at in (12.0, 10.0, 9.5, 4.0)]
    assert told == [2.0, 0.001, 0.001, 6.0]


def test_a_model_that_waits_for_evictions_is_told_as_a_replica_that_comes():
    leaving = replica("m", 0.0, ModelState.EVICTING)
    coming = replace(replica("n", 13.0, ModelState.QUEUED), load_s=2.5, sizes=(150,))
    made = state([leaving, coming], {"m": {}, "n": {Tier.NVME: 100}}, evict_s=0.5)
    assert [(r.model, r.ready_s, r.free_slots) for r in made.replicas] == [("n", 3.5, 4)]
    (device,) = made.devices
    assert (device.bytes_free, device.loads_done_s) == (
        250,
        (3.5,),
    )  # 400 less 150, and m's are n's
    assert made.nvme_done_s == 3.5


def test_what_leaves_for_a_smaller_model_is_free_when_it_has_left():
    leaving, coming = replica("m", 0.0, ModelState.EVICTING), replica("n", 13.0, ModelState.QUEUED)
    told = [state(views, {}).devices[0].bytes_free for views in (
        [replica("m", 0.0, ModelState.READY)], [leaving, replace(coming, sizes=(60,))],
        [replace(coming, sizes=(60,), state=ModelState.LOADING)],
    )]  # fmt: skip
    assert told == [300, 300, 340]


def test_a_model_that_waits_for_evictions_is_away_for_its_load_at_least():
    coming = replace(replica("n", 8.0, ModelState.QUEUED), load_s=2.5)
    assert state([coming], {}).replicas[0].ready_s == 2.5


def test_nobody_is_to_wait_for_a_replica_that_leaves():
    leaving = replica("m", 0.0, ModelState.READY, is_leaving=True)
    assert state([leaving], {"m": {}}).replicas[0].next_free_s is None


def test_who_leaves_and_who_waits_is_told():
    made = state([replica("m", 0.0, ModelState.READY, is_leaving=True)], {"m": {}})
    assert made.replicas[0].is_leaving
    assert made.models[0].waiting == 2


def test_what_loads_from_peers_are_reckoned_with_is_told():
    outlook: Any = Outlook((), {})
    snapshot = Snapshot(NodeId("a"), BootId("1"), outlook, lambda: (7.0, 0.25))
    rates = snapshot.state(10.0).bandwidths
    assert (rates.peer, rates.peer_s) == (7.0, 0.25)


def test_a_session_that_moved_here_is_said_to_stay_until_it_has_settled():
    running = replace(replica("m", 0.0, ModelState.READY), running=(TicketId(1), TicketId(2)))
    outlook: Any = Outlook((running,), {"m": {}})
    outlook.facts = {
        TicketId(1): SessionFacts(SessionId("moved"), 1, 1, 0, moved_at=10.0),
        TicketId(2): SessionFacts(SessionId("begun"), 1, 1, 0),
    }
    snapshot = Snapshot(NodeId("a"), BootId("1"), outlook)
    snapshot.settle_s = 5.0
    told = [snapshot.state(now).replicas[0].sessions for now in (11.0, 15.0)]
    assert [[one.stays for one in sessions] for sessions in told] == [[True, False], [False, False]]


def test_a_state_is_told_as_it_is_to_be_shown():
    outlook: Any = Outlook((), {})
    snapshot = Snapshot(NodeId("a"), BootId("1"), outlook)
    snapshot.shown = lambda state, now: replace(state, nvme_done_s=now)
    versions = [(made.version, made.nvme_done_s) for made in map(snapshot.state, (1.0, 1.0, 2.0))]
    assert versions == [(1, 1.0), (1, 1.0), (2, 2.0)]
