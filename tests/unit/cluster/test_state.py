from dataclasses import replace
from random import Random

import msgspec
import pytest

from sllm_node.cluster.state import DeviceShare, NodeState, ReplicaId, ReplicaState, SessionState
from sllm_node.core.types import ModelId, SessionId
from tests.unit.cluster.clusters import crowded_cluster, random_cluster


@pytest.mark.parametrize("seed", range(20))
def test_a_state_survives_the_wire(seed):
    for make in (random_cluster, crowded_cluster):
        for state in make(Random(seed))[0]:
            assert msgspec.json.decode(msgspec.json.encode(state), type=NodeState) == state
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=NodeState) == state


def test_a_session_grows_with_the_age_of_its_state():
    assert SessionState(SessionId("s"), 10, 5, tokens_per_s=4.0).tokens(2.0) == 23


def test_a_replica_is_evictable_without_sessions_and_movable_with_them_but_neither_while_it_loads():
    session = SessionState(SessionId("s"), 1, 1)
    shares = (DeviceShare("d0", 3), DeviceShare("d1", 4))
    for sessions, ready_s, expected in [
        ((), 0.0, (True, False)), ((session,), 0.0, (False, True)),
        ((), 1.0, (False, False)), ((session,), 1.0, (False, False)),
    ]:  # fmt: skip
        replica = ReplicaState(ReplicaId("r"), ModelId("a"), shares, 2, sessions, ready_s)
        assert (replica.is_evictable, replica.is_movable) == expected
        assert replica.free_slots == 2 - len(sessions)
        assert [replica.size_on(d) for d in ("d0", "d1", "d2")] == [3, 4, 0]


def test_a_replica_that_others_wait_for_or_that_leaves_is_not_movable():
    waits = ReplicaState(
        ReplicaId("r"), ModelId("a"), (), 1, (SessionState(SessionId("s"), 1, 1),) * 2
    )
    assert not waits.is_movable
    assert replace(waits, slots=2).is_movable
    assert not replace(waits, slots=2, is_leaving=True).is_movable
