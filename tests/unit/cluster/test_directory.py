import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.cluster.directory import (
    BackAgain,
    BadRecord,
    CutOff,
    Directory,
    Farewell,
    IdTaken,
    Listed,
    NodeListed,
    NodeUnlisted,
    ReadAll,
    RecordDropped,
    RecordPut,
    Standing,
    Watch,
)
from sllm_node.cluster.directory_keys import Entry, Head, NodeRecord, decode, encode, key_of
from sllm_node.cluster.records import Desired, KnownPeer, Registration
from sllm_node.core.types import ModelId, NodeId

ME = NodeRecord(NodeId("me"), "10.0.0.1:1", 5)
A = NodeRecord(NodeId("a"), "10.0.0.2:1", 3)
B = NodeRecord(NodeId("b"), "10.0.0.3:1", 4)
MODEL = Registration(ModelId("m"), "s3://bucket/m")
WISH = Desired(ModelId("org/m"), 1, 2, 60.0)


def put(record, revision=1):
    return Entry(key_of(record), encode(record), revision)


def gone(record, revision):
    return Entry(key_of(record), None, revision)


def made(*records, known=(), revision=10):
    directory = Directory(ME, known, grace_s=30.0)
    directory.on_read(Head(revision, 2), [put(record) for record in records], 0.0)
    directory.news()
    return directory


def names(directory):
    return [peer.node for peer in directory.peers()]


def fresh(directory):
    return {peer.node for peer in directory.peers() if not peer.is_stale}


def test_all_is_read_once_and_then_followed_from_the_next_revision():
    directory = Directory(ME, (), 30.0)
    assert directory.step() == ReadAll()
    directory.on_read(Head(10, 2), [put(A), put(MODEL), put(WISH)], 0.0)
    assert directory.step() == Watch(11)
    assert directory.news() == (NodeListed(A), RecordPut(MODEL), RecordPut(WISH), BackAgain())
    assert (directory.registrations(), directory.desired()) == ((MODEL,), (WISH,))


def test_a_join_a_leave_and_an_expiry_are_told_apart():
    directory = made(A)
    leaving = NodeRecord(A.node, A.address, A.boot, is_leaving=True)
    directory.on_changes([put(B, 11), put(leaving, 12), gone(A, 13), gone(B, 14)])
    assert directory.news() == (
        NodeListed(B),
        NodeUnlisted(A.node, Farewell.LEFT),
        NodeUnlisted(B.node, Farewell.EXPIRED),
    )
    assert directory.step() == Watch(15)


def test_a_restarted_or_moved_node_is_news_and_the_same_again_is_none():
    directory = made(A)
    later = NodeRecord(A.node, A.address, 9)
    directory.on_changes([put(A, 11), put(later, 12)])
    assert directory.news() == (NodeListed(later),)


def test_changes_that_came_before_change_nothing():
    directory = made(A)
    directory.on_changes([gone(A, 9), gone(A, 10)])
    assert names(directory) == ["a"]


def test_all_changes_of_one_revision_count():
    directory = made(A)
    directory.on_changes([gone(A, 11), put(B, 11)])
    assert names(directory) == ["b"]


def test_an_ended_stream_is_taken_up_where_it_ended():
    directory = made(A)
    directory.on_changes([put(B, 17)])
    directory.on_ended()
    assert (directory.standing, directory.step()) == (Standing.RESUMING, Watch(18))
    assert fresh(directory) == {"a", "b"}
    directory.on_watching(Head(40, 2))
    assert (directory.standing, directory.step()) == (Standing.FOLLOWING, Watch(18))


def test_after_compaction_all_is_read_again_and_who_is_missing_goes_after_the_grace():
    directory = made(A, B)
    directory.on_ended()
    directory.on_compacted()
    assert directory.step() == ReadAll()
    directory.on_read(Head(90, 2), [put(B)], 100.0)
    assert fresh(directory) == {"b"}
    assert names(directory) == ["a", "b"]
    assert directory.next_timer() == 130.0
    directory.on_timer(129.0)
    assert directory.news() == ()
    directory.on_timer(130.0)
    assert directory.news() == (NodeUnlisted(A.node, Farewell.MISSING),)
    assert (names(directory), directory.next_timer()) == (["b"], None)


def test_while_nobody_answers_the_last_known_peers_stay_and_are_stale():
    directory = made(A, B, MODEL)
    directory.on_unreachable("connection refused")
    directory.on_unreachable("connection refused")
    directory.on_timer(1e9)
    assert directory.peers() == (
        Listed(A.node, A.address, A.boot, is_stale=True),
        Listed(B.node, B.address, B.boot, is_stale=True),
    )
    assert directory.registrations() == (MODEL,)
    assert directory.news() == (CutOff("connection refused"),)
    assert directory.step() == ReadAll()


def test_back_again_it_is_reconciled_with_what_changed_meanwhile():
    directory = made(A, B, MODEL, WISH)
    directory.on_unreachable("gone")
    directory.news()
    moved = NodeRecord(A.node, "10.0.0.9:1", 8)
    directory.on_read(Head(50, 2), [put(moved), put(WISH)], 0.0)
    assert directory.news() == (NodeListed(moved), RecordDropped(Registration, "m"), BackAgain())
    assert fresh(directory) == {"a"}
    assert directory.restores() == {}


def test_who_registers_again_within_the_grace_never_left():
    directory = made(A)
    directory.on_unreachable("gone")
    directory.on_read(Head(50, 2), [], 0.0)
    directory.on_changes([put(A, 51)])
    directory.on_timer(1e9)
    assert fresh(directory) == {"a"}
    assert all(not isinstance(news, NodeUnlisted) for news in directory.news())


def test_a_directory_that_is_gone_again_takes_nobody_along():
    directory = made(A)
    directory.on_unreachable("gone")
    directory.on_read(Head(50, 2), [], 0.0)
    directory.on_unreachable("gone")
    directory.on_timer(1e9)
    assert names(directory) == ["a"]


@pytest.mark.parametrize("head", [Head(3, 2), Head(20, 1)])
def test_what_an_emptied_directory_lacks_is_put_back(head):
    directory = made(A, MODEL, WISH)
    directory.on_ended()
    directory.on_watching(head)
    assert directory.step() == ReadAll()
    directory.on_read(head, [], 0.0)
    assert directory.restores() == {key_of(r): encode(r) for r in (MODEL, WISH)}
    directory.on_restored(key_of(MODEL))
    assert directory.restores() == {key_of(WISH): encode(WISH)}
    assert (directory.registrations(), names(directory)) == ((MODEL,), ["a"])
    assert directory.needs_registration


def emptied(*records):
    """Return a directory that came back empty, and has nothing put back yet."""
    directory = made(*records)
    directory.on_ended()
    directory.on_watching(Head(3, 2))
    directory.on_read(Head(3, 2), [], 0.0)
    directory.news()
    return directory


def test_what_is_to_be_put_back_outlasts_a_directory_that_is_cut_off_again():
    directory = emptied(MODEL, WISH)
    directory.on_restored(key_of(MODEL))
    directory.on_unreachable("reset by peer")
    directory.on_read(Head(4, 2), [put(MODEL, 4)], 0.0)
    assert (directory.registrations(), directory.desired()) == ((MODEL,), (WISH,))
    assert directory.restores() == {key_of(WISH): encode(WISH)}
    directory.on_restored(key_of(WISH))
    directory.on_unreachable("gone")
    directory.on_read(Head(5, 2), [put(MODEL, 4)], 0.0)  # and then somebody dropped it
    assert (directory.desired(), directory.restores()) == ((), {})


@pytest.mark.parametrize("way", ["put by another", "dropped by another", "dropped here"])
def test_what_others_put_back_or_anybody_dropped_is_not_put_back(way):
    directory = emptied(MODEL)
    if way == "put by another":
        directory.on_changes([put(MODEL, 4)])
    elif way == "dropped by another":
        directory.on_changes([gone(MODEL, 5)])
    else:
        directory.on_dropped(MODEL)
    assert directory.restores() == {}
    assert directory.registrations() == ((MODEL,) if way == "put by another" else ())
    assert directory.news() == (
        () if way == "put by another" else (RecordDropped(Registration, "m"),)
    )


def test_without_a_directory_from_the_start_the_remembered_peers_are_there():
    known = (KnownPeer(A.node, A.address), KnownPeer(ME.node, ME.address))
    directory = Directory(ME, known, 30.0)
    directory.on_unreachable("refused")
    assert directory.peers() == (Listed(A.node, A.address, 0, is_stale=True),)
    directory.on_read(Head(4, 2), [put(B)], 10.0)
    directory.on_timer(40.0)
    assert names(directory) == ["b"]


def test_this_node_registers_until_it_is_and_again_when_its_key_or_lease_is_gone():
    directory = made()
    assert directory.needs_registration
    directory.on_registered()
    directory.on_changes([put(ME, 11)])
    assert not directory.needs_registration
    directory.on_changes([gone(ME, 12)])
    assert directory.needs_registration
    directory.on_registered()
    directory.on_lease_lost()
    assert directory.needs_registration
    assert directory.peers() == ()


def test_an_earlier_life_of_this_node_is_replaced_and_a_later_one_is_told():
    directory = made(NodeRecord(ME.node, "x:1", 4))
    assert directory.needs_registration
    directory.on_changes([put(NodeRecord(ME.node, "x:1", 6), 11)])
    assert not directory.needs_registration
    assert directory.news() == (IdTaken(6),)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b'{"format":2}',
        b'{"format":1,"node":"a"}',
        encode(B),
        encode(NodeRecord(A.node, "", 1)),
        b'{"format":1,"node":"a","address":"x","boot":"1"}',
    ],
)
def test_a_value_that_is_none_of_ours_is_told_and_what_was_known_stays(value):
    directory = made(A)
    directory.on_changes([Entry("nodes/a", value, 11)])
    (news,) = directory.news()
    assert isinstance(news, BadRecord)
    assert names(directory) == ["a"]


def test_keys_of_another_release_are_passed_over():
    directory = made(A)
    directory.on_changes([Entry("future/x", b"?", 11), Entry("future/x", None, 12)])
    assert directory.news() == ()


@pytest.mark.parametrize("record", [A, MODEL, WISH])
def test_a_record_comes_back_as_it_was_put(record):
    assert decode(key_of(record), encode(record)) == record


class Server:
    """A directory's history: what an always faithful reader knows."""

    def __init__(self):
        self.log = []
        self.compacted = 0

    @property
    def revision(self):
        return len(self.log)

    def now(self):
        rows = {}
        for entry in self.log:
            rows[entry.key] = entry
        return [entry for entry in rows.values() if entry.value is not None]


acts = st.sampled_from(["put", "delete", "follow", "end", "compact", "unreachable"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(acts, st.sampled_from([A, B, MODEL, WISH])), max_size=60))
def test_whatever_happened_following_again_ends_with_what_the_directory_has(script):
    server, directory, is_watching = Server(), Directory(ME, (), 30.0), False
    now = 0.0

    def follow():
        nonlocal is_watching
        match directory.step():
            case ReadAll():
                directory.on_read(Head(server.revision, 1), server.now(), now)
                is_watching = False
            case Watch(revision) if not is_watching and revision <= server.compacted:
                directory.on_compacted()
            case Watch(revision):
                if not is_watching:
                    directory.on_watching(Head(server.revision, 1))
                is_watching = True
                directory.on_changes(server.log[revision - 1 :])

    for act, record in script:
        now += 1.0
        if act == "put":
            server.log.append(put(record, server.revision + 1))
        elif act == "delete":
            server.log.append(gone(record, server.revision + 1))
        elif act == "follow":
            follow()
        elif act == "end" and is_watching:
            directory.on_ended()
            is_watching = False
        elif act == "compact" and not is_watching:
            server.compacted = server.revision
        elif act == "unreachable":
            directory.on_unreachable("x")
            is_watching = False
    for _ in range(4):
        follow()
    directory.on_timer(now + 1000.0)
    keys = {f"nodes/{peer.node}" for peer in directory.peers()}
    keys |= {key_of(record) for record in directory.registrations()}
    keys |= {key_of(record) for record in directory.desired()}
    assert keys == {entry.key for entry in server.now()}
    assert all(not peer.is_stale for peer in directory.peers())
