from types import SimpleNamespace
from typing import Any

import pytest

from sllm_node.cluster.journal import Journal
from sllm_node.cluster.records import Desired
from sllm_node.cluster.wire import pack
from sllm_node.cluster.wishes import WISH, Reach, Wish, Wishes
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
        ("-", "m", InvalidRequestError, "no name of a alias"),
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


async def test_what_was_not_wished_for_can_not_be_taken_back(cluster):
    with pytest.raises(InvalidRequestError, match="no alias 'x'"):
        await cluster.here.drop_alias("x")
    with pytest.raises(InvalidRequestError, match="no replicas of 'm'"):
        await cluster.here.unscale("m")


async def test_a_node_in_no_cluster_has_aliases_and_no_replicas(tmp_path):
    journal = await Journal.open(tmp_path / "j")
    alone = Wishes(journal, find)
    assert await alone.set_alias("gpt", "m") == []
    with pytest.raises(InvalidRequestError, match="in no cluster"):
        await alone.scale(WISHED)
    await journal.close()


async def test_where_there_is_a_directory_replicas_are_its_own(cluster):
    kept: list[Desired] = []

    class Directory:
        def desired(self):
            return tuple(kept)

        async def put(self, record):
            kept.append(record)

        async def drop(self, record):
            kept.remove(record)

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

    cluster.there._journal = SimpleNamespace(write=write)
    assert await cluster.here.set_alias("gpt", "m") == ["b", "c"]
