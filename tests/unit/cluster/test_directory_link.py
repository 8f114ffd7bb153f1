import asyncio
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import ClientSession

from sllm_node.cluster.directory import (
    BackAgain,
    CutOff,
    Directory,
    Farewell,
    IdTaken,
    NodeListed,
    NodeUnlisted,
    RecordDropped,
    RecordPut,
)
from sllm_node.cluster.directory_keys import Entry, Head, NodeRecord, encode, key_of
from sllm_node.cluster.directory_link import Backoff, DirectoryLink, LinkOptions
from sllm_node.cluster.etcd import EtcdClient, EtcdOptions
from sllm_node.cluster.records import Desired, KnownPeer, Registration
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.errors import EtcdDeniedError, EtcdUnreachableError, InvalidRequestError
from sllm_node.core.types import ModelId, NodeId
from tests.etcd import Etcd, make_members, needs_etcd
from tests.ports import free_port

LONG_S = 90.0
MODEL = Registration(ModelId("m"), "s3://bucket/m")
WISH = Desired(ModelId("m"), 1, 3, 60.0)


def record(name, boot=1):
    return NodeRecord(NodeId(name), f"{name}.example:8100", boot)


class Node:
    """A node's directory and its link, and what it was told."""

    def __init__(self, client, me, known=(), lease_s=30, grace_s=600.0):
        self.client = client
        self.directory = Directory(me, known, grace_s)
        self.told = []
        self.changed = asyncio.Event()
        options = LinkOptions(lease_s, first_wait_s=0.01, most_wait_s=0.2)
        self.link = DirectoryLink(
            client, self.directory, options, MonotonicClock(), lambda: 0.5, self.hear
        )
        self.task = asyncio.create_task(self.link.run())

    def hear(self, news):
        self.told.append(news)
        self.changed.set()

    async def until(self, news):
        """Wait until it was told so, since the last call that waited."""
        async with asyncio.timeout(LONG_S):
            while news not in self.told:
                self.changed.clear()
                await self.changed.wait()
        del self.told[: self.told.index(news) + 1]

    async def until_cut_off(self):
        async with asyncio.timeout(LONG_S):
            while not any(isinstance(news, CutOff) for news in self.told):
                self.changed.clear()
                await self.changed.wait()
        self.told.clear()

    def peers(self):
        return [(peer.node, peer.is_stale) for peer in self.directory.peers()]

    async def stop(self):
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@asynccontextmanager
async def node(urls, name, *, prefix="/sllm/", timeout_s=15.0, boot=1, **changes):
    async with EtcdClient(EtcdOptions(tuple(urls), prefix, timeout_s=timeout_s)) as client:
        made = Node(client, record(name, boot), **changes)
        try:
            yield made
        finally:
            await made.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    etcd = Etcd(tmp_path_factory.mktemp("etcd")).start()
    yield etcd
    etcd.close()


@pytest.fixture
async def own(tmp_path):
    """A server that a test may kill."""
    etcd = await asyncio.to_thread(Etcd(tmp_path / "data").start)
    yield etcd
    etcd.close()


@needs_etcd
async def test_nodes_that_join_and_leave_are_told_to_the_others(server, request):
    prefix = f"/{request.node.name}/"
    async with node([server.client_url], "a", prefix=prefix) as a:
        await a.until(BackAgain())
        async with node([server.client_url], "b", prefix=prefix) as b:
            await a.until(NodeListed(record("b")))
            await b.until(NodeListed(record("a")))
            assert a.peers() == [("b", False)]
            await b.stop()
            assert await b.link.leave()
            await a.until(NodeUnlisted(NodeId("b"), Farewell.LEFT))
        assert a.peers() == []


@needs_etcd
async def test_a_node_that_dies_goes_when_its_lease_ends(server, request):
    prefix = f"/{request.node.name}/"
    async with node([server.client_url], "a", prefix=prefix) as a:
        async with node([server.client_url], "b", prefix=prefix, lease_s=1):
            await a.until(NodeListed(record("b")))
        await a.until(NodeUnlisted(NodeId("b"), Farewell.EXPIRED))


@needs_etcd
async def test_a_key_or_lease_that_somebody_took_away_is_put_again(server, request):
    prefix = f"/{request.node.name}/"
    url = [server.client_url]
    async with node(url, "a", prefix=prefix) as a, node(url, "b", prefix=prefix, lease_s=3) as b:
        await a.until(NodeListed(record("b")))
        await a.client.delete("nodes/b")
        await a.until(NodeUnlisted(NodeId("b"), Farewell.EXPIRED))
        await a.until(NodeListed(record("b")))
        await b.client.revoke(b.link._lease)
        await a.until(NodeListed(record("b")))


@needs_etcd
async def test_a_restarted_node_takes_its_key_and_an_earlier_life_gives_way(server, request):
    prefix = f"/{request.node.name}/"
    url = [server.client_url]
    async with node(url, "a", prefix=prefix) as a, node(url, "b", prefix=prefix) as old:
        await a.until(NodeListed(record("b")))
        async with node(url, "b", prefix=prefix, boot=2):
            await a.until(NodeListed(record("b", 2)))
            await old.until(IdTaken(2))
            assert a.peers() == [("b", False)]


@needs_etcd
async def test_models_and_replicas_are_shared(server, request):
    prefix = f"/{request.node.name}/"
    url = [server.client_url]
    async with node(url, "a", prefix=prefix) as a, node(url, "b", prefix=prefix) as b:
        await a.link.put(MODEL)
        await a.link.put(WISH)
        await b.until(RecordPut(WISH))
        assert (b.directory.registrations(), b.directory.desired()) == ((MODEL,), (WISH,))
        await b.link.drop(MODEL)
        await a.until(RecordDropped(Registration, "m"))
        with pytest.raises(InvalidRequestError):
            await a.link.put(Desired(ModelId("m"), 3, 1))


@needs_etcd
async def test_etcd_restarts_and_nobody_is_lost(own):
    async with node([own.client_url], "a") as a:
        async with node([own.client_url], "b") as b:
            await a.until(NodeListed(record("b")))
            await b.until(NodeListed(record("a")))
            own.kill()
            await a.until_cut_off()
            await b.until_cut_off()
            assert a.peers() == [("b", True)]
            await asyncio.to_thread(own.start)
            await a.until(BackAgain())
            await b.until(BackAgain())
            assert a.peers() == [("b", False)]
            await b.link.put(MODEL)
            await a.until(RecordPut(MODEL))
        assert not any(isinstance(news, NodeUnlisted) for news in a.told)


@needs_etcd
async def test_etcd_that_hangs_is_noticed_and_taken_up_again(own):
    async with node([own.client_url], "a", timeout_s=1.0, lease_s=3) as a:
        await a.until(BackAgain())
        own.pause()
        await a.until_cut_off()
        own.go_on()
        await a.until(BackAgain())
        await a.link.put(MODEL)
        await a.until(RecordPut(MODEL))


@needs_etcd
async def test_etcd_that_comes_back_empty_gets_everything_again(own):
    async with node([own.client_url], "a") as a, node([own.client_url], "b") as b:
        await a.until(NodeListed(record("b")))
        await a.link.put(MODEL)
        await a.until(RecordPut(MODEL))
        await b.until(RecordPut(MODEL))
        own.kill()
        own.forget()
        await a.until_cut_off()
        await asyncio.to_thread(own.start)
        await a.until(BackAgain())
        async with node([own.client_url], "c") as c:
            async with asyncio.timeout(LONG_S):
                while {"a", "b"} - {peer.node for peer in c.directory.peers()} or (
                    MODEL not in c.directory.registrations()
                ):
                    c.changed.clear()
                    await c.changed.wait()
        assert a.directory.registrations() == (MODEL,)
        assert "b" in [name for name, _ in a.peers()]
        assert not any(isinstance(news, NodeUnlisted) for news in a.told)


class Shaky:
    """An etcd in memory that was set back, and whose puts fail now and then."""

    endpoint = "fake"

    def __init__(self, *failures):
        self.rows, self.revision = {}, 100
        self.failures = list(failures)
        self.is_back = asyncio.Event()
        self.changed = asyncio.Event()

    def set_back(self):
        self.rows, self.revision = {}, 5
        self.is_back.set()

    async def read(self):
        rows = tuple(Entry(key, value, self.revision) for key, value in self.rows.items())
        return Head(self.revision, 2), rows

    async def watch(self, revision):
        if revision > self.revision + 1:
            yield Head(self.revision, 2)
        await (asyncio.Event() if self.is_back.is_set() else self.is_back).wait()

    async def put_if(self, key, value, revision, lease=0):
        self.changed.set()
        if not lease and self.is_back.is_set() and self.failures:
            raise self.failures.pop(0)
        if key not in self.rows:
            self.revision += 1
            self.rows[key] = value
        return True

    async def get(self, key):
        return None

    async def grant(self, seconds):
        return 1

    async def keep_alive(self, lease):
        return True


@pytest.mark.parametrize(
    "failure",
    [EtcdUnreachableError("fake", "reset by peer"), EtcdDeniedError("fake", "no permission")],
    ids=["unreachable", "denied"],
)
async def test_records_are_put_back_although_a_put_fails_in_the_middle(failure):
    shaky = Shaky(failure)
    shaky.rows = {key_of(record): encode(record) for record in (MODEL, WISH)}
    a = Node(shaky, record("a"), lease_s=1)
    try:
        await a.until(BackAgain())
        shaky.set_back()
        async with asyncio.timeout(LONG_S):
            while not {key_of(MODEL), key_of(WISH)} <= shaky.rows.keys():
                shaky.changed.clear()
                await shaky.changed.wait()
        assert not any(isinstance(news, RecordDropped) for news in a.told)
        assert (a.directory.registrations(), a.directory.desired()) == ((MODEL,), (WISH,))
    finally:
        await a.stop()


async def test_with_etcd_gone_from_the_start_the_remembered_peers_stay():
    known = (KnownPeer(NodeId("b"), "b.example:8100"),)
    url = f"http://127.0.0.1:{free_port()}"
    async with node([url], "a", known=known, grace_s=0.0) as a:
        await a.until_cut_off()
        assert a.peers() == [("b", True)]
        assert not await a.link.leave()
        assert not a.task.done()


class Gate:
    """A way to a server that can be shut: connections are cut, and new ones wait until it opens."""

    def __init__(self, url):
        self.host, self.port = url.removeprefix("http://").rsplit(":", 1)
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.waiting = asyncio.Event()
        self.writers = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.pass_on, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.is_open.set()
        self.server.close()
        self.shut()
        await self.server.wait_closed()

    def shut(self):
        self.is_open.clear()
        for writer in self.writers:
            writer.transport.abort()

    async def pass_on(self, reader, writer):
        self.waiting.set()
        await self.is_open.wait()
        far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
        self.writers |= {writer, far_writer}
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        self.writers -= {writer, far_writer}


async def copy(reader, writer):
    with suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    writer.close()


@needs_etcd
async def test_a_node_that_is_behind_a_compaction_reads_all_again(server, request):
    prefix = f"/{request.node.name}/"
    async with (
        Gate(server.client_url) as gate,
        EtcdClient(EtcdOptions((server.client_url,), prefix)) as other,
        node([gate.url], "a", prefix=prefix, timeout_s=LONG_S, lease_s=60) as a,
    ):
        await other.put(key_of(MODEL), encode(MODEL))
        await a.until(RecordPut(MODEL))
        gate.waiting.clear()
        gate.shut()
        async with asyncio.timeout(LONG_S):
            await gate.waiting.wait()
        for i in range(20):
            await other.put(key_of(record("b", i + 1)), encode(record("b", i + 1)))
        await other.delete(key_of(MODEL))
        await other.put(key_of(WISH), encode(WISH))
        head, _ = await other.read()
        await compact(server, head.revision)
        gate.is_open.set()
        await a.until(RecordDropped(Registration, "m"))
        assert a.directory.desired() == (WISH,)
        assert a.peers() == [("b", False)]
        assert not any(isinstance(news, CutOff) for news in a.told)


async def compact(server, revision):
    async with ClientSession() as session:
        url = f"{server.client_url}/v3/kv/compaction"
        async with session.post(url, json={"revision": str(revision)}) as answer:
            assert answer.status == 200


@needs_etcd
async def test_one_of_three_servers_dies_and_nodes_go_on_with_the_others(tmp_path):
    members = make_members(tmp_path, 3)
    try:
        for member in members:
            member.begin()
        for member in members:
            await asyncio.to_thread(member.wait)
        urls = [member.client_url for member in members]
        async with (
            node(urls, "a") as a,
            node(urls[1:], "b") as b,
        ):
            await a.until(NodeListed(record("b")))
            members[0].kill()
            await b.link.put(MODEL)
            await a.until(RecordPut(MODEL))
            await a.link.put(WISH)
            await b.until(RecordPut(WISH))
            assert a.client.endpoint in urls[1:]
            assert not any(isinstance(news, NodeUnlisted) for news in (*a.told, *b.told))
    finally:
        for member in members:
            member.close()


def test_waits_double_up_to_a_limit_with_jitter_and_begin_anew_after_a_success():
    draws = iter([0.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    backoff = Backoff(1.0, 5.0, lambda: next(draws))
    assert [backoff.next() for _ in range(5)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next() == 1.0
