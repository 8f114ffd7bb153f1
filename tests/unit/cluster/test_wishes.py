import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_node.cluster.directory_keys import SharedRecord
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.packing import pack
from sllm_node.cluster.records import Alias, Desired, Records, Registration
from sllm_node.cluster.wire import Failed
from sllm_node.cluster.wish_messages import WISH, Kept, Wish, unpack_kept
from sllm_node.cluster.wishes import Reach, Wishes
from sllm_node.core.errors import (
    InvalidRequestError,
    MessageFormatError,
    ModelNotFoundError,
    PeerUnreachableError,
    SllmError,
    WishConflictError,
)
from sllm_node.core.types import ModelId, NodeId

MODELS = {"m", "n"}
WISHED = Desired(ModelId("m"), 1, 3, 60.0)


def find(model):
    if model not in MODELS:
        raise ModelNotFoundError(model, tuple(MODELS))


class Peers:
    """One peer that takes what it is told, and one that is gone."""

    def __init__(self):
        self.wishes: Any = None
        self.file: tuple[Desired, ...] = ()

    def desired(self):
        return self.file

    def known(self):
        return (NodeId("b"), NodeId("c"))

    async def tell(self, peer, what, payload):
        assert what == WISH
        if peer == "c":
            raise PeerUnreachableError(peer, "gone")
        frames: list[bytes] = []

        async def send(frame):
            frames.append(frame)

        await self.wishes.take(NodeId("a"), payload, SimpleNamespace(send=send))
        (frame,) = frames
        return frame


@pytest.fixture
async def cluster(tmp_path):
    """Wishes of two nodes: what is wished for at the first is told to the second."""
    journals = [await Journal.open(tmp_path / name) for name in ("a", "b")]
    peers = Peers()
    here = Wishes(journals[0], find, Reach(peers))
    there = peers.wishes = Wishes(journals[1], find)
    yield SimpleNamespace(here=here, there=there, peers=peers, journals=journals)
    for journal in journals:
        await journal.close()


async def test_an_alias_holds_on_all_nodes_that_were_reached(cluster):
    assert await cluster.here.set_alias("gpt", "m") == ["c"]
    for wishes in (cluster.here, cluster.there):
        assert (wishes.resolve("gpt"), wishes.resolve("m"), wishes.resolve("x")) == ("m", "m", "x")
    assert await cluster.here.set_alias("gpt", "n") == ["c"]
    assert cluster.there.aliases() == {"gpt": "n"}
    assert await cluster.here.drop_alias("gpt") == ["c"]
    assert cluster.here.resolve("gpt") == "gpt"


async def test_desired_replicas_hold_on_all_nodes_that_were_reached(cluster):
    assert await cluster.here.scale(WISHED) == ["c"]
    assert cluster.here.desired() == cluster.there.desired() == (WISHED,)
    assert await cluster.here.unscale("m") == ["c"]
    assert cluster.here.desired() == cluster.there.desired() == ()


async def test_wishes_outlive_a_restart(tmp_path):
    journal = await Journal.open(tmp_path / "j")
    await Wishes(journal, find).set_alias("gpt", "m")
    await journal.close()
    journal = await Journal.open(tmp_path / "j")
    assert Wishes(journal, find).aliases() == {"gpt": "m"}
    await journal.close()


@pytest.mark.parametrize(
    ("name", "model", "error", "says"),
    [
        ("n", "m", WishConflictError, "a model is called 'n'"),
        ("new", "gpt", WishConflictError, "'gpt' is an alias of 'm'"),
        ("new", "none", ModelNotFoundError, "none"),
        ("m", "m", InvalidRequestError, "alias of itself"),
        ("-", "m", InvalidRequestError, "no name of an alias"),
    ],
)
async def test_an_alias_that_makes_no_sense_is_refused(cluster, name, model, error, says):
    await cluster.here.set_alias("gpt", "m")
    with pytest.raises(error, match=says):
        await cluster.here.set_alias(name, model)
    assert cluster.here.aliases() == {"gpt": "m"}


async def test_what_the_cluster_file_desires_is_not_changed(cluster):
    cluster.peers.file = (WISHED,)
    with pytest.raises(WishConflictError, match="file desires 1 to 3 replicas of 'm'"):
        await cluster.here.scale(Desired(ModelId("m"), 2, 2))
    with pytest.raises(WishConflictError):
        await cluster.here.unscale("m")


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        (Desired(ModelId("m"), 3, 1), InvalidRequestError),
        (Desired(ModelId("none"), 0, 1), ModelNotFoundError),
        (Desired(ModelId("gpt"), 0, 1), WishConflictError),
    ],
)
async def test_replicas_that_make_no_sense_are_refused(cluster, wish, error):
    await cluster.here.set_alias("gpt", "m")
    with pytest.raises(error):
        await cluster.here.scale(wish)


async def test_no_replicas_of_an_alias_are_taken_back(cluster):
    await cluster.here.set_alias("gpt", "m")
    with pytest.raises(WishConflictError, match="'gpt' is an alias of 'm'; name the model"):
        await cluster.here.unscale("gpt")


async def test_what_nobody_wished_for_can_not_be_taken_back(net):
    a = net.nodes["a"]
    with pytest.raises(InvalidRequestError, match="no alias 'x'"):
        await a.drop_alias("x")
    with pytest.raises(InvalidRequestError, match="no replicas of 'm'"):
        await a.unscale("m")


async def test_a_node_in_no_cluster_has_aliases_and_no_replicas(tmp_path):
    journal = await Journal.open(tmp_path / "j")
    alone = Wishes(journal, find)
    assert await alone.set_alias("gpt", "m") == []
    with pytest.raises(InvalidRequestError, match="in no cluster"):
        await alone.scale(WISHED)
    with pytest.raises(InvalidRequestError, match="no alias 'x'"):
        await alone.drop_alias("x")
    await journal.close()


class Directory:
    def __init__(self):
        self.kept: list[SharedRecord] = []

    def desired(self):
        return tuple(record for record in self.kept if isinstance(record, Desired))

    def registrations(self):
        return tuple(record for record in self.kept if isinstance(record, Registration))

    async def put(self, record):
        self.kept.append(record)

    async def drop(self, record):
        self.kept.remove(record)


async def test_models_are_registered_in_the_directory(cluster):
    wishes = Wishes(cluster.journals[0], find, Reach(cluster.peers, directory := Directory()))
    new = Registration(ModelId("new"), "s3://bucket/models")
    await wishes.register(new)
    assert directory.registrations() == (new,)
    with pytest.raises(InvalidRequestError, match="no address"):
        await wishes.register(Registration(ModelId("new"), "here"))
    await wishes.set_alias("gpt", "m")
    with pytest.raises(WishConflictError, match="alias of 'm'"):
        await wishes.register(Registration(ModelId("gpt"), "s3://bucket/models"))
    await wishes.unregister("new")
    assert directory.registrations() == ()
    with pytest.raises(InvalidRequestError, match="not registered"):
        await wishes.unregister("new")


async def test_without_a_directory_no_model_is_registered(cluster):
    new = Registration(ModelId("new"), "s3://bucket/models")
    for act in (lambda: cluster.here.register(new), lambda: cluster.here.unregister("new")):
        with pytest.raises(InvalidRequestError, match=r"\[remotes\] of each node"):
            await act()


async def test_where_there_is_a_directory_replicas_are_its_own(cluster):
    wishes = Wishes(cluster.journals[0], find, Reach(cluster.peers, Directory()))
    assert await wishes.scale(WISHED) == []
    assert (wishes.desired(), cluster.journals[0].records.desired) == ((WISHED,), {})
    await wishes.unscale("m")
    assert wishes.desired() == ()


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", pack(Wish()), pack(Wish(forgets_alias="a", forgets_desired="b"))]
)
async def test_a_wish_that_is_none_is_refused(cluster, payload):
    with pytest.raises(MessageFormatError):
        await cluster.there.take(NodeId("a"), payload, None)


async def test_a_peer_that_can_not_keep_a_wish_is_named(cluster):
    async def write(*changes):
        raise SllmError("the disk is full")

    cluster.there._journal = SimpleNamespace(write=write, records=Records())
    assert await cluster.here.set_alias("gpt", "m") == ["b", "c"]


# --- models that came later ---------------------------------------------------------------------------


async def test_a_model_that_comes_later_goes_before_an_alias_of_its_name(tmp_path, caplog):
    journal, models = await Journal.open(tmp_path / "j"), {"m"}

    def look(name):
        if name not in models:
            raise ModelNotFoundError(name, tuple(models))

    wishes = Wishes(journal, look)
    await wishes.set_alias("gpt", "m")
    models.add("gpt")
    assert [wishes.resolve("gpt") for _ in range(3)] == ["gpt"] * 3
    assert (wishes.aliases(), wishes.hidden()) == ({}, {"gpt": "m"})
    assert [one.message for one in caplog.records].count(
        "alias does not count: a model has its name"
    ) == 1
    models.remove("gpt")
    assert (wishes.resolve("gpt"), wishes.aliases(), wishes.hidden()) == ("m", {"gpt": "m"}, {})
    models.add("gpt")
    await wishes.drop_alias("gpt")
    assert wishes.hidden() == {}
    await journal.close()


async def test_an_alias_of_a_peer_does_not_hide_a_model_here(cluster):
    cluster.there._aliases._find = lambda name: find("m" if name == "gpt" else name)
    assert await cluster.here.set_alias("gpt", "n") == ["c"]
    assert (cluster.there.resolve("gpt"), cluster.there.hidden()) == ("gpt", {"gpt": "n"})


async def test_a_damaged_model_is_still_called_by_its_name(tmp_path):
    journal = await Journal.open(tmp_path / "j")

    def look(name):
        if name == "broken":
            raise SllmError("its index can't be read")

    with pytest.raises(WishConflictError, match="a model is called 'broken'"):
        await Wishes(journal, look).set_alias("broken", "m")
    await journal.close()


# --- missed, and again --------------------------------------------------------------------------------


class Net:
    """Three nodes that tell each other; `down`: those that can't be reached; `gate`: all wait for it."""

    def __init__(self):
        self.nodes: dict[str, Any] = {}
        self.down: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []
        self.seconds = itertools.count(1)

    def of(self, me):
        async def tell(peer, what, payload):
            self.asked.append(peer)
            if peer in self.down:
                raise PeerUnreachableError(peer, "gone")
            frames: list[bytes] = []

            async def send(frame):
                frames.append(frame)

            if me in self.gates:
                await self.gates[me].wait()
            await self.nodes[peer].take(NodeId(me), payload, SimpleNamespace(send=send))
            (frame,) = frames
            return frame

        def known():
            return tuple(NodeId(one) for one in self.nodes if one != me)

        return SimpleNamespace(desired=lambda: (), known=known, tell=tell)


@pytest.fixture
async def net(tmp_path):
    made, journals = Net(), []
    for me in ("a", "b", "c"):
        journals.append(await Journal.open(tmp_path / me))
        reach = Reach(made.of(me), me=me)
        made.nodes[me] = Wishes(journals[-1], find, reach, lambda: next(made.seconds))
    yield made
    for journal in journals:
        await journal.close()


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


async def until(is_so):
    while not is_so():
        await asyncio.sleep(0)


async def test_forgetting_can_be_asked_again_for_peers_that_were_missed(net):
    a, b, c = net.nodes.values()
    await a.set_alias("gpt", "m")
    await a.scale(WISHED)
    net.down = {"c"}
    assert (await a.drop_alias("gpt"), await a.unscale("m")) == (["c"], ["c"])
    assert (await a.drop_alias("gpt"), await a.unscale("m")) == (["c"], ["c"])
    net.down = set()
    assert (await a.drop_alias("gpt"), await a.unscale("m")) == ([], [])
    assert (c.aliases(), c.desired()) == ({}, ())
    with pytest.raises(InvalidRequestError, match="no alias 'gpt'"):
        await a.drop_alias("gpt")
    with pytest.raises(InvalidRequestError, match="no replicas of 'm'"):
        await b.unscale("m")


async def test_an_alias_that_only_a_peer_has_can_be_forgotten_here(net):
    a, _, c = net.nodes.values()
    net.down = {"a", "b"}
    await c.set_alias("gpt", "m")
    net.down = set()
    assert await a.drop_alias("gpt") == []
    assert c.aliases() == {}


# --- order --------------------------------------------------------------------------------------------


async def test_wishes_of_one_node_are_told_in_the_order_in_which_they_are_kept(net):
    a, b, _ = net.nodes.values()
    gate = net.gates["a"] = asyncio.Event()
    first = asyncio.create_task(a.set_alias("x", "m"))
    await until(lambda: len(net.asked) == 2)
    second = asyncio.create_task(a.set_alias("x", "n"))
    await turns()
    assert len(net.asked) == 2, "the second waits for its turn"
    gate.set()
    assert await first == await second == []
    assert (a.resolve("x"), b.resolve("x")) == ("n", "n")


async def test_a_wish_is_told_to_its_end_though_the_operator_goes_away(net):
    a, b, c = net.nodes.values()
    gate = net.gates["a"] = asyncio.Event()
    asking = asyncio.create_task(a.set_alias("x", "m"))
    await until(lambda: len(net.asked) == 2)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    gate.set()
    await a.close()
    assert (b.resolve("x"), c.resolve("x")) == ("m", "m")


async def test_of_two_wishes_at_different_nodes_the_same_one_holds_everywhere(net):
    a, b, _ = net.nodes.values()
    gate = net.gates["a"] = asyncio.Event()
    older = asyncio.create_task(a.set_alias("x", "m"))
    await until(lambda: len(net.asked) == 2)
    net.down = {"a"}
    assert await b.set_alias("x", "n") == ["a"]
    gate.set()
    with pytest.raises(WishConflictError, match="'x' is an alias of 'n'; ask again"):
        await older
    assert {node.resolve("x") for node in net.nodes.values()} == {"n"}
    net.down = set()
    assert await a.set_alias("x", "m") == [], "asked again, it is the later one"
    assert {node.resolve("x") for node in net.nodes.values()} == {"m"}


async def test_a_wish_that_was_taken_back_does_not_come_back_with_an_older_message(net):
    a, b, _ = net.nodes.values()
    await a.set_alias("x", "m")
    await a.drop_alias("x")
    assert b.aliases() == {}
    sent: list[bytes] = []

    async def send(frame):
        sent.append(frame)

    old = pack(Wish(alias=Alias("x", ModelId("m")), at_ms=0, node="a"))
    await b.take(NodeId("a"), old, SimpleNamespace(send=send))
    assert b.aliases() == {}
    assert len(sent) == 1


async def test_an_operator_at_a_node_whose_clock_is_late_is_told_what_holds(net):
    a, b, _ = net.nodes.values()
    net.down = {"a"}
    net.seconds = itertools.count(1_000)
    await b.set_alias("x", "n")
    net.down = set()
    net.seconds = itertools.count(1)
    with pytest.raises(WishConflictError, match="'b' was told otherwise later"):
        await a.drop_alias("x")
    assert a.resolve("x") == "n"
    assert await a.drop_alias("x") == []
    assert a.aliases() == b.aliases() == {}


async def test_an_answer_about_another_wish_is_not_believed(net):
    a = net.nodes["a"]
    other = Kept(had=False, newer=Wish(forgets_alias="y", at_ms=5, node="b"))

    async def take(sender, payload, reply):
        await reply.send(pack(other))

    net.nodes["b"] = SimpleNamespace(take=take)
    assert await a.set_alias("x", "m") == ["b"]


async def test_only_so_many_forgotten_wishes_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("sllm_node.cluster.wishes._FORGOTTEN_MAX", 2)
    journal = await Journal.open(tmp_path / "j")
    wishes = Wishes(journal, find)
    await wishes.set_alias("kept", "m")
    for name in ("p", "q", "r", "s"):
        await wishes.set_alias(name, "m")
        await wishes.drop_alias(name)
    assert set(journal.records.wished) <= {"alias kept", "alias r", "alias s"}
    await journal.close()


@pytest.mark.parametrize("at_ms", [-1, 1 << 60])
async def test_a_wish_of_no_time_is_refused(cluster, at_ms):
    frames: list[bytes] = []

    async def send(frame):
        frames.append(frame)

    wish = Wish(alias=Alias("x", ModelId("m")), at_ms=at_ms, node="b")
    await cluster.there.take(NodeId("a"), pack(wish), SimpleNamespace(send=send))
    assert isinstance(unpack_kept(frames[0]), Failed)
    assert cluster.there.aliases() == {}
