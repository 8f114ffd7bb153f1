"""Tokenizers of peers' models: asked for once, kept on the disk, within their room."""

import asyncio
import contextlib
from dataclasses import replace

import pytest

from sllm_node.cluster.packing import pack
from sllm_node.cluster.state import HeldModel
from sllm_node.cluster.text_folders import look
from sllm_node.cluster.texts import Texts
from sllm_node.cluster.wire import Described
from sllm_node.core.errors import CheckpointFormatError, PeerUnreachableError
from sllm_node.core.types import ModelId, NodeId

HELD = HeldModel(ModelId("m"), 8, 8)
PEER = NodeId("b")


class Peer:
    """Answers with a tokenizer of 1000 bytes; `is_away`: not at all."""

    def __init__(self):
        self.asked = 0
        self.is_away = False

    @contextlib.asynccontextmanager
    async def stream(self, peer, *_):
        self.asked += 1
        if self.is_away:
            raise PeerUnreachableError(peer, "away")
        yield self._frames()

    async def _frames(self):
        yield pack(Described(512, (("tokenizer.json", 1000),)))
        yield b"t" * 1000


class Life:
    """One life of a node; `damaged` tokenizers can't be loaded."""

    def __init__(self, root, peer, limit=1 << 20):
        self.damaged = set()
        self.texts = Texts(root, peer, self.load, 1.0, limit)

    async def load(self, folder):
        if folder.name in self.damaged:
            raise CheckpointFormatError(str(folder), "no tokenizer")
        return (folder / "tokenizer.json").read_bytes()

    async def get(self, version=0):
        return await self.texts.get(replace(HELD, created=version), [PEER])


@pytest.fixture
def peer():
    return Peer()


async def test_after_a_restart_a_tokenizer_is_read_from_the_disk_though_its_peer_is_away(
    tmp_path, peer
):
    known = await Life(tmp_path, peer).get()
    assert (known.codec, known.context_tokens) == (b"t" * 1000, 512)
    peer.is_away = True
    assert await Life(tmp_path, peer).get() == known
    assert peer.asked == 1


async def test_what_is_damaged_on_the_disk_is_asked_for_again(tmp_path, peer):
    known = await Life(tmp_path, peer).get()
    (folder,) = tmp_path.iterdir()
    (folder / "tokenizer.json").write_bytes(b"t" * 999)
    assert await Life(tmp_path, peer).get() == known
    assert peer.asked == 2
    assert (folder / "tokenizer.json").read_bytes() == b"t" * 1000


async def test_what_is_whole_and_no_tokenizer_is_asked_for_again(tmp_path, peer):
    await Life(tmp_path, peer).get()
    life = Life(tmp_path, peer)
    life.damaged = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointFormatError):
        await life.get()
    assert peer.asked == 2
    life.damaged = set()
    assert (await life.get()).context_tokens == 512


async def test_the_versions_used_longest_ago_give_their_room_up(tmp_path, peer):
    life = Life(tmp_path, peer, limit=3500)
    for version in (0, 1, 2, 0, 3):
        await life.get(version)
    assert len(look(tmp_path)) == 3
    peer.is_away = True
    later = Life(tmp_path, peer)
    for version in (0, 2, 3):
        assert (await later.get(version)).context_tokens == 512
    with pytest.raises(PeerUnreachableError):
        await later.get(1)


async def test_a_tokenizer_on_its_way_is_kept_beside_others_that_are_there(tmp_path, peer):
    life, loads, go_on = Life(tmp_path, peer, limit=0), asyncio.Queue(), asyncio.Event()

    async def load(folder):
        loads.put_nowait(folder)
        await go_on.wait()
        return (folder / "tokenizer.json").read_bytes()

    life.texts._load_codec = load
    first = asyncio.create_task(life.get(0))
    folder = await loads.get()
    second = asyncio.create_task(life.get(1))
    assert await loads.get() != folder
    go_on.set()
    assert (await first).codec == (await second).codec == b"t" * 1000
    await life.get(2)
    assert len(look(tmp_path)) == 1
