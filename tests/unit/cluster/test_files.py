"""Files between nodes on loopback: one gives what lies on its disk, the other's store loads it."""

import asyncio
import errno
import http.client
import shutil
import socket
import ssl
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.given import index_digest
from sllm_node.checkpoint.index import INDEX_FILE, from_json, to_json
from sllm_node.checkpoint.verify import verify
from sllm_node.cluster.file_link import Call, Links
from sllm_node.cluster.file_messages import (
    FILE,
    RANGE_BYTES,
    AskFile,
    FileHead,
    FileRefused,
    unpack_ask,
    unpack_head,
)
from sllm_node.cluster.files import Sender as Chosen
from sllm_node.cluster.frames import FrameWriter
from sllm_node.cluster.giving import _Sending
from sllm_node.cluster.packing import pack
from sllm_node.cluster.transport import Client
from sllm_node.cluster.trust import KeyTrust, Outgoing
from sllm_node.core.errors import (
    MessageFormatError,
    ModelNotFoundError,
    PeerDeniedError,
    PeerUnreachableError,
    RemoteError,
    RemoteUnreachableError,
)
from sllm_node.core.types import ModelId, NodeId, Tier
from tests.unit.cluster.file_rig import Receiver, Sender, serving
from tests.unit.cluster.test_transport import tls_trusts
from tests.unit.store.handmade import write_checkpoint

A = ModelId("a")
SHARD = "shard-00000.bin"


def key_trusts():
    names = [NodeId(name) for name in "abc"]
    return {me: KeyTrust(bytes(32), me, names, 1024, lambda: 7) for me in names}


@pytest.fixture(params=["key", "tls"])
def trusts(request, tmp_path):
    return key_trusts() if request.param == "key" else tls_trusts(tmp_path / "trust")


def make_store(root, shards=(704_512, 303_104), **options):
    data = write_checkpoint(root, "a", shards, **options)
    (root / "a" / "config.json").write_text('{"model_type": "handmade"}')
    (root / "a" / "notes.txt").write_text("private")
    return data


@pytest.fixture
async def pair(tmp_path):
    """Node a has model a; node b sees it."""
    data, trusts = make_store(tmp_path / "a"), key_trusts()
    sender = Sender("a", tmp_path / "a", trusts[NodeId("a")])
    async with serving(sender), Receiver(tmp_path / "b", trusts[NodeId("b")], [sender]) as node:
        yield sender, node, data


async def test_a_load_from_a_peer_leaves_an_ordinary_checkpoint(tmp_path, trusts):
    data = make_store(tmp_path / "a")
    sender = Sender("a", tmp_path / "a", trusts[NodeId("a")])
    async with serving(sender), Receiver(tmp_path / "b", trusts[NodeId("b")], [sender]) as node:
        assert not node.fetching.is_here("a")
        assert await node.load("a") == data
        assert node.fetching.status()["senders"] in ({"a": ["a"]}, {})  # or it is complete by now
        node.unload("a")
        assert node.sample("sllm_peer_files_received_bytes_total", peer="a") == len(data)
        assert node.sample("sllm_remote_bytes_total", remote=":peers") == len(data)
    assert verify(open_checkpoint(tmp_path / "b" / "a")) == []
    names = {path.name for path in (tmp_path / "b" / "a").iterdir()}
    assert names == {INDEX_FILE, "config.json", SHARD, "shard-00001.bin"}


async def test_a_pull_brings_what_only_a_peer_has(pair):
    _, node, data = pair
    await node.fetching.ensure("a")
    assert node.catalog.get(A).remote == ":peers"
    await node.tier.pull("a")
    assert node.catalog.get(A).remote is None
    assert node.store.residency(A)[Tier.NVME] == len(data)


async def test_a_model_that_nobody_has_is_not_found(pair):
    _, node, _ = pair
    with pytest.raises(ModelNotFoundError):
        await node.fetching.ensure("none")


# --- who sends ------------------------------------------------------------------------------------


@pytest.fixture
async def trio(tmp_path):
    """Nodes a and c have the same model; node b sees both and asks a first."""
    data, trusts = make_store(tmp_path / "a"), key_trusts()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    first, second = (Sender(name, tmp_path / name, trusts[NodeId(name)]) for name in "ac")
    senders = [first, second]
    async with serving(*senders), Receiver(tmp_path / "b", trusts[NodeId("b")], senders) as node:
        yield first, second, node, data


async def test_a_sender_that_dies_in_the_middle_is_followed_by_another(trio):
    first, second, node, data = trio
    await node.fetching.ensure("a")
    first.asked = 0

    def die():
        if first.asked > 2:
            raise ConnectionResetError

    first.before = die
    assert await node.load("a") == data
    assert first.asked > 2
    assert second.asked > 0
    node.unload("a")


async def test_another_sender_goes_on_where_one_died_in_the_middle_of_a_range(trio):
    first, second, node, data = trio
    await node.fetching.ensure("a")

    async def cut(sender, payload, reply):
        size = unpack_ask(payload).size
        await reply.send(pack(FileHead(size, size)))
        await reply.send(data[:100_000])
        raise ConnectionResetError

    first.instead = cut
    await node.tier.pull("a")
    assert (node.root / "a" / SHARD).read_bytes() == data[:704_512]
    asked = [(ask.name, ask.first) for ask in second.asks if ask.name == SHARD]
    assert asked == [(SHARD, 100_000)]


async def test_a_busy_sender_is_passed_over(trio):
    first, second, node, data = trio
    await node.fetching.ensure("a")
    first.giving.under_way = 2
    assert await node.load("a") == data
    assert second.asked > 0
    assert first.metrics.registry.get_sample_value(
        "sllm_peer_files_refused_total", {"reason": "busy"}
    )
    node.unload("a")


async def test_a_sender_that_is_busy_is_asked_again(pair):
    sender, node, data = pair

    def release():
        sender.giving.under_way = 2 if sender.asked < 8 else 0

    sender.before = release
    assert await node.load("a") == data
    assert sender.asked > 8
    node.unload("a")


async def test_without_any_sender_the_load_ends_with_a_typed_error_and_goes_on_later(pair):
    sender, node, data = pair
    await node.fetching.ensure("a")
    checkpoint = node.catalog.get(A)
    node.view.remove(sender.name)
    assert not node.fetching.is_here("a")
    remote = node.tier._joined[":peers"]
    remote._retries = 0
    room = memoryview(bytearray(8192))
    with pytest.raises(RemoteUnreachableError, match="no node that lives"):
        await asyncio.to_thread(remote.fetch, checkpoint, 0, room, 0, Event())
    node.look()
    assert node.fetching.is_here("a")
    assert await node.load("a") == data
    node.unload("a")


async def test_a_card_shows_while_its_model_is_in_use(pair):
    sender, node, _ = pair
    await node.fetching.ensure("a")
    node.view.remove(sender.name)
    assert not node.fetching.is_here("a")
    node.hosted.add(A)
    assert node.fetching.is_here("a")


async def test_after_a_restart_what_has_come_stays_usable(tmp_path, pair):
    sender, node, data = pair
    await node.fetching.ensure("a")
    sender.asked = 0
    reached = asyncio.Event()

    def before():
        if sender.asked > 12:
            reached.set()
            raise ConnectionResetError

    sender.before = before
    load = asyncio.create_task(node.store.acquire(A))
    await reached.wait()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await node.store.settled(A)
    await asyncio.to_thread(node.tier._partials[A].wait_settled)
    here = node.store.residency(A)[Tier.NVME]
    assert 0 < here < len(data)
    sender.before = lambda: None
    shutil.copytree(tmp_path / "b", tmp_path / "later")
    async with Receiver(tmp_path / "later", node.files._trust, [sender]) as other:
        assert other.fetching.is_here("a")
        assert await other.load("a") == data
        received = other.sample("sllm_peer_files_received_bytes_total", peer="a")
        assert received == len(data) - here
        other.unload("a")


async def test_another_version_at_the_peer_makes_another_card(pair):
    sender, node, _ = pair
    await node.fetching.ensure("a")
    index = from_json((sender.root / "a" / INDEX_FILE).read_bytes(), "test")
    data = make_store(sender.root, seed=2)
    newer = replace(from_json((sender.root / "a" / INDEX_FILE).read_bytes(), "test"), created=5)
    assert index.created == 0
    (sender.root / "a" / INDEX_FILE).write_bytes(to_json(newer))
    node.look()
    assert not node.fetching.is_here("a")
    assert await node.load("a") == data
    node.unload("a")


# --- what is asked --------------------------------------------------------------------------------


async def ask(sender, node, message):
    payload = message if isinstance(message, bytes) else pack(message)
    client = Client(node.files._trust, lambda _: sender.address)
    try:
        async with client.stream(sender.name, FILE, payload, 5.0) as frames:
            return [frame async for frame in frames]
    finally:
        await client.close()


GOOD = AskFile("a", SHARD, "", 0, 8192)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "none"}, "absent"),
        ({"model": "../a"}, "absent"),
        ({"model": ".remote/a"}, "absent"),
        ({"model": ""}, "absent"),
        ({"name": "../a/" + SHARD}, "absent"),
        ({"name": "/etc/passwd"}, "absent"),
        ({"name": "notes.txt"}, "absent"),
        ({"name": "tokenizer.json"}, "absent"),
        ({"name": ""}, "absent"),
        ({"name": "config.json\0"}, "absent"),
        ({"digest": "0" * 16}, "other"),
        ({"first": -1}, "range"),
        ({"first": 1 << 62}, "range"),
        ({"first": 704_512}, "range"),
        ({"size": 0}, "range"),
        ({"size": -5}, "range"),
        ({"size": RANGE_BYTES + 1}, "range"),
    ],
)
async def test_what_is_not_to_be_had_is_refused_with_the_reason(pair, changes, reason):
    sender, node, _ = pair
    values = {name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | changes
    (only,) = await ask(sender, node, AskFile(**values))
    assert unpack_head(only) == FileRefused(reason)
    assert sender.giving.under_way == 0


async def test_a_range_beyond_the_end_is_cut_there(pair):
    sender, node, data = pair
    head, *frames = await ask(sender, node, AskFile("a", SHARD, "", 602_112, RANGE_BYTES))
    assert unpack_head(head) == FileHead(102_400, 704_512)
    assert b"".join(frames) == data[602_112:704_512]


async def test_with_the_index_come_the_names_of_its_texts(pair):
    sender, node, _ = pair
    head, *_ = await ask(sender, node, AskFile("a", INDEX_FILE, "", 0, RANGE_BYTES))
    told = unpack_head(head)
    assert isinstance(told, FileHead)
    assert told.texts == ("config.json",)
    checkpoint = sender.catalog.get(A)
    digest = index_digest(checkpoint.index)
    head, *_ = await ask(sender, node, AskFile("a", SHARD, digest, 0, 8192))
    assert unpack_head(head) == FileHead(8192, 704_512)


async def test_what_is_no_request_for_a_file_is_refused(pair):
    sender, node, _ = pair
    for payload in (b"", b"\xff", b"\x95\xa1a\xa1b\xa0\xc0\xc0", b"\x80"):
        with pytest.raises(PeerDeniedError, match="message_format"):
            await ask(sender, node, payload)
    assert [type(error) for error in sender.refused] == [MessageFormatError] * 4


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_noise_is_no_request_and_no_head(data):
    for unpack in (unpack_ask, unpack_head):
        try:
            unpack(data)
        except MessageFormatError:
            continue


async def test_an_index_above_the_limit_is_not_taken(pair):
    sender, node, _ = pair
    with pytest.raises(RemoteError, match="more than 100 bytes"):
        await asyncio.to_thread(
            node.files.read_from, Chosen(sender.name, ""), f"a/{INDEX_FILE}", 100
        )


async def test_a_listener_that_was_started_again_is_asked_on_a_new_connection(pair):
    sender, node, _ = pair
    await node.fetching.ensure("a")
    await sender.listener.close()
    await sender.start()
    found = await asyncio.to_thread(node.files.read_all, f"a/{INDEX_FILE}", 1 << 20, Event())
    assert found == (sender.root / "a" / INDEX_FILE).read_bytes()


async def test_a_load_that_is_stopped_lets_the_sender_stop(pair):
    sender, node, _ = pair
    await node.fetching.ensure("a")
    sender.asked = 0
    reached = asyncio.Event()
    sender.before = lambda: reached.set() if sender.asked > 2 else None
    load = asyncio.create_task(node.store.acquire(A))
    await reached.wait()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await node.store.settled(A)
    await asyncio.to_thread(node.tier._partials[A].wait_settled)
    assert node.store.residency(A)[Tier.NVME] > 0
    await node.fetching.close()
    with pytest.raises(RemoteUnreachableError, match="leaves the cluster"):
        await asyncio.to_thread(node.files.read_all, f"a/{INDEX_FILE}", 1 << 20, Event())


# --- who asks goes away ---------------------------------------------------------------------------


class Asker:
    """A reply whose peer takes nothing until it goes away: the handler is cancelled in `descriptor`, or later."""

    silence_s = 5.0

    def __init__(self, giving=None):
        self.writer = FrameWriter(None)
        self.response = SimpleNamespace(content_length=None)
        self.peer, self.own = socket.socketpair()
        self.peer.setblocking(False)
        self.giving = giving
        """All its threads are at work when the descriptor is asked for."""
        self.release = threading.Event()
        self.reached = asyncio.Event()
        self.sent: list[bytes] = []

    async def send(self, frame):
        self.sent.append(frame)

    async def descriptor(self):
        self.reached.set()
        if self.giving is None:
            await asyncio.Event().wait()
        for _ in range(2):
            self.giving._threads.submit(self.release.wait)
        return self.own.detach()

    async def goes_away(self, giving):
        asking = asyncio.create_task(giving.file(NodeId("b"), pack(GOOD), self))
        await self.reached.wait()
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert giving.under_way == 0

    def close(self):
        self.release.set()
        for one in (self.peer, self.own):
            one.close()


def open_files(path):
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.readlink() == path]


@pytest.fixture
def sender(tmp_path):
    make_store(tmp_path / "a")
    made = Sender("a", tmp_path / "a", key_trusts()[NodeId("a")])
    yield made
    made.giving.close()


async def test_a_connection_that_no_thread_has_begun_to_write_to_is_closed(sender):
    asker = Asker(sender.giving)
    await asker.goes_away(sender.giving)
    asker.release.set()
    await asyncio.to_thread(sender.giving._threads.shutdown)
    assert asker.peer.recv(1) == b"", "no descriptor of it is left"
    assert open_files(sender.root / "a" / SHARD) == []
    asker.close()


async def test_a_file_is_closed_though_the_node_leaves_meanwhile(sender):
    asker = Asker()
    asking = asyncio.create_task(sender.giving.file(NodeId("b"), pack(GOOD), asker))
    await asker.reached.wait()
    sender.giving.close()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert open_files(sender.root / "a" / SHARD) == []
    asker.close()


def test_nothing_is_opened_for_somebody_who_went_away(sender):
    path = sender.root / "a" / SHARD
    sending = _Sending(sender.catalog.get(A), path, GOOD, FrameWriter(None))
    sending.stop()
    sending.close()
    assert sending.open() == "absent"
    assert open_files(path) == []


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX_FILE])
async def test_no_file_of_a_checkpoint_that_came_meanwhile_is_given_as_the_older_ones(sender, name):
    asker, release = Asker(), threading.Event()
    for _ in range(2):
        sender.giving._threads.submit(release.wait)
    digest = index_digest(sender.catalog.get(A).index)
    wanted = pack(AskFile("a", name, digest, 0, 8192))
    asking = asyncio.create_task(sender.giving.file(NodeId("b"), wanted, asker))
    await asyncio.sleep(0)  # it has been found, and no thread has opened it
    assert sender.giving.under_way == 1
    make_store(sender.root / "new", seed=2)
    (sender.root / "a").rename(sender.root / "old")
    (sender.root / "new" / "a").rename(sender.root / "a")
    release.set()
    async with asyncio.timeout(30):
        await asking
    assert asker.sent == [pack(FileRefused("other"))]
    await asyncio.to_thread(sender.giving._threads.shutdown)
    assert open_files(sender.root / "a" / name) == []
    asker.close()


# --- connections, names, time ---------------------------------------------------------------------


async def test_only_so_many_connections_are_kept_for_addresses_that_come_and_go(monkeypatch):
    monkeypatch.setattr("sllm_node.cluster.file_link._IDLE_MAX", 2)
    links = Links(None, 5.0)
    made = [
        (f"10.0.0.{i}:80", SimpleNamespace(sock=1, is_closed=False, close=None)) for i in range(4)
    ]
    for address, connection in made:
        connection.close = partial(setattr, connection, "is_closed", True)
        links._keep(address, cast("Any", connection), is_whole=True)
    assert [one.is_closed for _, one in made] == [True, True, False, False]
    assert links._take("10.0.0.3:80") == cast("Any", (made[3][1], False))
    links.close()
    assert [one.is_closed for _, one in made] == [True, True, True, False]
    links._keep("10.0.0.3:80", cast("Any", made[3][1]), is_whole=True)
    assert made[3][1].is_closed


class Broken:
    """A connection on which every request ends with `error`."""

    def __init__(self, error):
        self.sock, self.error, self.asked = 1, error, 0

    def request(self, *_):
        self.asked += 1
        raise self.error

    def close(self):
        pass


ADDRESS = "10.0.0.7:80"


@pytest.mark.parametrize(
    ("error", "times", "told"),
    [
        (TimeoutError("timed out"), 1, "no answer in time"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 3, "connection reset by peer"),
        (ssl.SSLError(1, "certificate is not valid for '10.0.0.7'"), 3, "SSLError"),
    ],
)
def test_a_peer_is_waited_for_on_one_connection_and_clients_are_not_told_its_address(
    monkeypatch, error, times, told
):
    """Two connections to it are kept, and a third can be made."""
    links, broken = Links(None, 5.0), cast("Any", Broken(error))
    monkeypatch.setattr(http.client, "HTTPConnection", lambda *_, **__: broken)
    for _ in range(2):
        links._keep(ADDRESS, broken, is_whole=True)
    call = Call(NodeId("a"), ADDRESS, Outgoing(b"", None))
    with pytest.raises(PeerUnreachableError) as found, links.ask(call):
        pass
    assert (broken.asked, found.value.problem) == (times, told)


async def test_a_peer_that_answers_nonsense_is_one_that_gives_nothing():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 no\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    call = Call(NodeId("a"), f"127.0.0.1:{port}", Outgoing(b"", None))

    def ask_it():
        with Links(None, 5.0).ask(call):
            pass

    with pytest.raises(PeerUnreachableError):
        await asyncio.to_thread(ask_it)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "x/a", ".remote", ""])
async def test_a_peer_can_not_name_a_model_so_that_its_card_lies_elsewhere(pair, name):
    sender, node, _ = pair
    state = sender.state(version=2)
    held = (replace(state.models[0], model=ModelId(name)),)
    node.view.refresh(replace(state, models=held), 0.0)
    sender.asked = 0
    with pytest.raises(ModelNotFoundError):
        await node.fetching.ensure(name)
    assert sender.asked == 0


async def test_an_event_loop_that_does_not_answer_is_an_error_of_its_own(pair, monkeypatch):
    _, node, _ = pair
    monkeypatch.setattr("sllm_node.cluster.files._LOOP_S", 0.0)
    stands = SimpleNamespace(call_soon_threadsafe=lambda _: None)
    node.files._loop, running = stands, node.files._loop
    with pytest.raises(RemoteUnreachableError, match="event loop"):
        await asyncio.to_thread(node.files.read_all, f"a/{INDEX_FILE}", 1 << 20, Event())
    node.files._loop = running
