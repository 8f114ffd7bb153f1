import pytest

from sllm_node.cluster.peer import TRANSITIONS, News, Peer, PeerState
from sllm_node.core.types import NodeId


def after(state, *news):
    peer = Peer(id=NodeId("b"), heard_at=0.0, state=state)
    for item in news:
        peer.apply(item)
    return peer.state


def test_every_state_has_a_row():
    assert set(TRANSITIONS) == set(PeerState)


@pytest.mark.parametrize("state", set(PeerState) - {PeerState.GONE})
def test_whoever_is_heard_serving_is_alive(state):
    assert after(state, News.SERVING) is PeerState.ALIVE


def test_who_is_gone_stays_so_until_it_starts_anew():
    assert after(PeerState.GONE, News.SERVING, News.SILENT, News.LOST) is PeerState.GONE
    assert after(PeerState.GONE, News.RESTARTED, News.SERVING) is PeerState.ALIVE


def test_a_restart_kills_the_old_incarnation():
    for state in (PeerState.ALIVE, PeerState.DRAINING, PeerState.SUSPECT):
        assert after(state, News.RESTARTED) is PeerState.DEAD


def test_who_was_never_heard_is_not_suspected_but_dies():
    assert after(PeerState.UNKNOWN, News.SILENT) is PeerState.UNKNOWN
    assert after(PeerState.UNKNOWN, News.LOST) is PeerState.DEAD


def test_silence_is_judged_by_its_length():
    peer = Peer(id=NodeId("b"), heard_at=100.0)
    assert peer.silence(102.9, 3.0, 10.0) is None
    assert peer.silence(103.0, 3.0, 10.0) is News.SILENT
    assert peer.silence(110.0, 3.0, 10.0) is News.LOST
