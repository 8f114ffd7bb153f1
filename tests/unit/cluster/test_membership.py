import pytest

from sllm_node.cluster.membership import (
    BootRaised,
    Membership,
    Paused,
    PeerAlive,
    PeerDead,
    PeerDraining,
    PeerGone,
    PeerSuspect,
    StateChanged,
    Timing,
)
from sllm_node.cluster.messages import PROTOCOL, Edition, Heartbeat, Phase
from sllm_node.cluster.peer import PeerState
from sllm_node.core.errors import DocumentTooLargeError
from sllm_node.core.types import NodeId

A, B, C, D = (NodeId(name) for name in "abcd")
TIMING = Timing(heartbeat_s=1.0, suspect_s=3.0, dead_s=10.0, publish_gap_s=0.1)


def node(peers=(B,), boot=5):
    return Membership(A, boot, (A, *peers), TIMING, 100, now=0.0)


def heard(sequence=1, boot=1, version=0, **changes):
    fields = {
        "protocol": PROTOCOL, "sender": B, "receiver": A, "sequence": sequence,
        "edition": Edition(boot, version), "phase": Phase.SERVING, "seen": Edition(), "heard": 0,
    }  # fmt: skip
    return Heartbeat(**{**fields, **changes})


def beat(a, now):
    a.on_timer(now)
    return a.to_send()


def run_until(a, now):
    while a.next_timer() <= now:
        beat(a, a.next_timer())


def test_each_peer_gets_a_heartbeat_at_each_timer_and_none_between():
    a = node(peers=(B, C))
    assert [m.receiver for m in beat(a, 0.0)] == [B, C]
    assert a.to_send() == ()
    assert beat(a, 0.5) == ()
    assert a.next_timer() == 1.0


def test_silence_makes_a_peer_suspect_then_dead():
    a = node()
    a.receive(heard(), 0.0)
    run_until(a, 12.0)
    assert a.events() == (PeerAlive(B, 1), PeerSuspect(B, 1), PeerDead(B, 1))


def test_who_was_never_heard_dies_with_boot_0():
    a = node()
    run_until(a, 12.0)
    assert a.events() == (PeerDead(B, 0),)


def test_copies_and_late_messages_are_no_signs_of_life():
    a = node()
    a.receive(heard(sequence=7), 0.0)
    for second in range(1, 12):
        a.receive(heard(sequence=7), float(second))
        a.receive(heard(sequence=3), float(second))
        beat(a, float(second))
    assert a.peers()[0].state is PeerState.DEAD


def test_a_document_goes_along_until_the_peer_has_it():
    a = node()
    a.publish(b"one")
    assert [m.document for m in beat(a, 0.0)] == [None], "nobody is known to listen"
    a.receive(heard(1), 0.1)
    assert [m.document for m in beat(a, 1.0)] == [b"one"]
    assert [m.document for m in beat(a, 2.0)] == [b"one"], "the first may be lost"
    a.receive(heard(2, seen=a.edition), 2.1)
    assert [m.document for m in beat(a, 3.0)] == [None]
    a.receive(heard(1, boot=2), 3.1)
    assert [m.document for m in beat(a, 4.0)] == [b"one"], "the peer began anew"


def test_a_change_is_told_at_once_but_not_more_often_than_the_gap():
    a = node()
    beat(a, 0.0)
    a.publish(b"one")
    assert a.next_timer() == 0.1
    beat(a, 0.1)
    a.publish(b"two")
    assert a.next_timer() == pytest.approx(0.2)
    a.publish(b"two")
    assert a.edition == Edition(5, 2), "the same document is no change"


def test_a_document_above_the_limit_is_refused_and_the_old_one_stays():
    a = node()
    a.publish(b"one")
    with pytest.raises(DocumentTooLargeError, match="101 bytes"):
        a.publish(bytes(101))
    a.receive(heard(), 0.0)
    assert beat(a, 0.1)[0].document == b"one"


def test_the_newest_document_wins():
    a = node()
    a.receive(heard(1, version=2, document=b"two"), 0.0)
    a.receive(heard(2, version=1, document=b"one"), 0.1)
    assert a.peers()[0].document == b"two"
    a.receive(heard(1, boot=2, version=1, document=b"new"), 0.2)
    assert a.peers()[0].document == b"new"
    changed = [e.document for e in a.events() if isinstance(e, StateChanged)]
    assert changed == [b"two", b"new"]


def test_a_restart_is_a_death_and_a_new_life():
    a = node()
    a.receive(heard(9, boot=1), 0.0)
    a.receive(heard(1, boot=2), 0.1)
    assert a.events() == (PeerAlive(B, 1), PeerDead(B, 1), PeerAlive(B, 2))
    a.receive(heard(10, boot=1), 0.2)
    assert a.events() == ()


def test_a_late_timer_is_a_pause_and_nobody_dies_of_it():
    a = node()
    a.receive(heard(), 0.0)
    beat(a, 0.0)
    beat(a, 500.0)
    assert a.events() == (PeerAlive(B, 1), Paused(499.0))
    run_until(a, 512.0)
    assert a.events() == (PeerSuspect(B, 1), PeerDead(B, 1))


def test_pauses_again_and_again_don_t_keep_the_dead_alive():
    a = node()
    a.receive(heard(), 0.0)
    beat(a, 0.0)
    for i in range(1, 13):
        beat(a, 20.0 * i)
    assert a.peers()[0].state is PeerState.DEAD


def test_a_boot_below_the_one_that_peers_know_is_raised_above_it():
    a = node(boot=5)
    a.receive(heard(seen=Edition(9, 3)), 0.0)
    assert a.edition.boot > 9
    assert BootRaised(B, a.edition.boot) in a.events()


def test_a_boot_used_before_is_raised_when_peers_heard_more_of_it():
    a = node(boot=5)
    beat(a, 0.0)
    a.receive(heard(seen=Edition(5, 0), heard=1), 0.1)
    assert a.edition.boot == 5
    a.receive(heard(2, seen=Edition(5, 0), heard=2), 0.1)
    assert a.edition.boot > 5


def test_drain_and_leave_are_told_and_acknowledged():
    a = node()
    a.receive(heard(), 0.0)
    a.drain()
    assert beat(a, 0.1)[0].phase is Phase.DRAINING
    a.resume()
    a.leave()
    a.resume()
    assert beat(a, 1.2)[0].phase is Phase.GONE
    assert not a.has_left()
    a.receive(heard(2, seen=a.edition), 1.3)
    assert a.has_left()


def test_a_peer_that_drains_and_leaves_is_never_dead():
    a = node()
    a.receive(heard(1, phase=Phase.DRAINING), 0.0)
    a.receive(heard(2, phase=Phase.GONE), 0.1)
    run_until(a, 30.0)
    assert a.events() == (PeerDraining(B, 1), PeerGone(B, 1))


def test_messages_of_strangers_change_nothing():
    a = node()
    a.receive(heard(sender="x"), 0.0)
    a.receive(heard(receiver=C), 0.0)
    assert a.events() == ()


def test_a_changed_cluster_file_keeps_who_stays():
    a = node(peers=(B, C))
    a.receive(heard(version=1, document=b"b"), 0.0)
    a.set_peers((A, B, D), 1.0)
    assert [(p.id, p.document) for p in a.peers()] == [(B, b"b"), (D, None)]
    assert a.events()[-1] == PeerGone(C, 0)


def test_who_is_named_again_hears_greater_sequences():
    a = node()
    first = beat(a, 0.0)[0].sequence
    a.set_peers((), 0.5)
    a.set_peers((B,), 0.6)
    assert beat(a, 1.0)[0].sequence > first


def test_who_leaves_waits_for_nobody_that_is_dead():
    a = node()
    run_until(a, 12.0)
    a.leave()
    assert a.has_left()


def test_a_boot_is_told_back_before_its_document_has_come():
    a = node()
    a.receive(heard(boot=7), 0.0)
    assert beat(a, 0.0)[0].seen == Edition(7, 0)
