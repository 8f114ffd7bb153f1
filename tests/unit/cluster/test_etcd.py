import asyncio
import ssl
from contextlib import aclosing
from datetime import UTC, datetime

import pytest
from aiohttp import ClientSession, web

from sllm_node.cluster import etcd as module
from sllm_node.cluster.certificates import Holder, issue, make_authority
from sllm_node.cluster.directory_keys import Entry, Head
from sllm_node.cluster.etcd import EtcdClient, EtcdOptions
from sllm_node.core.errors import (
    EtcdCompactedError,
    EtcdDeniedError,
    EtcdError,
    EtcdLeaseError,
    EtcdUnreachableError,
)
from sllm_node.core.types import NodeId
from tests.etcd import Etcd, needs_etcd
from tests.ports import free_port

LONG_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    etcd = Etcd(tmp_path_factory.mktemp("etcd")).start()
    yield etcd
    etcd.close()


@pytest.fixture
def prefix(request):
    return f"/{request.node.name}/"


@pytest.fixture
async def client(server, prefix):
    async with EtcdClient(EtcdOptions((server.client_url,), prefix)) as client:
        yield client


async def next_entries(changes):
    async with asyncio.timeout(LONG_S):
        while isinstance(told := await anext(changes), Head):
            pass
        return told


async def value(client, key):
    entry = await client.get(key)
    return None if entry is None else entry.value


async def compact(server, revision):
    await post(server, "kv/compaction", {"revision": str(revision)})


async def post(server, path, body):
    async with (
        ClientSession() as session,
        session.post(f"{server.client_url}/v3/{path}", json=body) as r,
    ):
        assert r.status == 200, await r.text()


@needs_etcd
async def test_keys_come_back_as_they_were_put_and_nobody_elses_with_them(server, client, prefix):
    neighbour = EtcdOptions((server.client_url,), prefix.rstrip("/") + "0/")
    async with EtcdClient(neighbour) as other:
        await other.put("a", b"theirs")
    await client.put("a", b"\x00\xff")
    await client.put("b/c", b"")
    head, entries = await client.read()
    assert [(e.key, e.value) for e in entries] == [("a", b"\x00\xff"), ("b/c", b"")]
    assert head.revision == entries[-1].revision
    await client.delete("a")
    await client.delete("a")
    assert await client.get("a") is None
    assert await client.get("b/c") == entries[1]


@needs_etcd
async def test_many_keys_are_read_in_pages_as_of_one_revision(client):
    count = module.PAGE + 7
    for begin in range(0, count, 100):
        keys = range(begin, min(count, begin + 100))
        await asyncio.gather(*(client.put(f"{i:05}", b"%d" % i) for i in keys))
    _, entries = await client.read()
    assert [e.key for e in entries] == [f"{i:05}" for i in range(count)]


@needs_etcd
async def test_a_key_is_put_only_where_it_is_as_it_was_seen(client):
    assert await client.put_if("a", b"1", 0)
    assert not await client.put_if("a", b"2", 0)
    old = await client.get("a")
    assert old is not None
    assert await client.put_if("a", b"3", old.revision)
    assert not await client.put_if("a", b"4", old.revision)
    assert await value(client, "a") == b"3"


@needs_etcd
async def test_keys_go_with_their_lease(client):
    lease = await client.grant(60)
    assert await client.keep_alive(lease)
    await client.put("a", b"1", lease)
    await client.revoke(lease)
    assert await client.get("a") is None
    assert not await client.keep_alive(lease)
    with pytest.raises(EtcdLeaseError):
        await client.put("a", b"1", lease)
    with pytest.raises(EtcdLeaseError):
        await client.revoke(lease)


@needs_etcd
async def test_a_watch_tells_puts_deletions_and_leases_that_end(client):
    head, _ = await client.read()
    lease = await client.grant(1)
    async with aclosing(client.watch(head.revision + 1)) as changes:
        assert isinstance(await anext(changes), Head)
        await client.put("a", b"1")
        (put,) = await next_entries(changes)
        await client.delete("a")
        (deleted,) = await next_entries(changes)
        await client.put("b", b"1", lease)
        await next_entries(changes)
        (ended,) = await next_entries(changes)
    assert put == Entry("a", b"1", head.revision + 1)
    assert deleted == Entry("a", None, head.revision + 2)
    assert (ended.key, ended.value) == ("b", None)


@needs_etcd
async def test_a_watch_begins_in_the_past_unless_that_is_compacted(server, client):
    for value in (b"1", b"2", b"3"):
        await client.put("a", value)
    entry = await client.get("a")
    assert entry is not None
    last = entry.revision
    async with aclosing(client.watch(last - 2)) as changes:
        seen = []
        while len(seen) < 3:
            seen += await next_entries(changes)
    assert [e.value for e in seen] == [b"1", b"2", b"3"]
    await compact(server, last)
    async with aclosing(client.watch(last - 2)) as changes:
        with pytest.raises(EtcdCompactedError):
            await next_entries(changes)


@needs_etcd
async def test_an_endpoint_that_is_not_there_is_passed_over(server, prefix):
    options = EtcdOptions((f"http://127.0.0.1:{free_port()}", server.client_url), prefix)
    async with EtcdClient(options) as client:
        await client.put("a", b"1")
        assert client.endpoint == server.client_url


@needs_etcd
async def test_a_server_that_hangs_is_left_and_its_watch_with_it(tmp_path, server, prefix):
    hanging = await asyncio.to_thread(Etcd(tmp_path / "data").start)
    try:
        options = EtcdOptions((hanging.client_url, server.client_url), prefix, timeout_s=2.0)
        async with EtcdClient(options) as client, aclosing(client.watch(0)) as changes:
            await anext(changes)
            hanging.pause()
            await client.put("a", b"1")
            assert client.endpoint == server.client_url
            async with asyncio.timeout(LONG_S):
                assert [told async for told in changes] == []
    finally:
        hanging.go_on()
        hanging.close()


async def test_where_nobody_answers_all_that_were_asked_are_named():
    urls = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(2))
    async with EtcdClient(EtcdOptions(urls)) as client:
        with pytest.raises(EtcdUnreachableError) as told:
            await client.read()
        assert all(url in str(told.value) for url in urls)
        with pytest.raises(EtcdUnreachableError):
            await anext(client.watch(1))


ANSWERS = [
    (200, b"?", EtcdError),
    (200, b'{"kvs":3}', EtcdError),
    (200, b"x" * 5000, EtcdError),
    (400, b'{"code":3,"message":"bad"}', EtcdError),
    (502, b"<html>", EtcdUnreachableError),
    (503, b'{"code":14,"message":"no leader"}', EtcdUnreachableError),
    (403, b'{"code":7,"message":"permission denied"}', EtcdDeniedError),
    (400, b'{"code":3,"message":"etcdserver: user name is empty"}', EtcdDeniedError),
]


@pytest.mark.parametrize(("status", "body", "error"), ANSWERS)
async def test_answers_that_are_no_good_are_typed(status, body, error, aiohttp_url):
    url = await aiohttp_url(lambda _: web.Response(status=status, body=body))
    async with EtcdClient(EtcdOptions((url,), answer_bytes=4000)) as client:
        with pytest.raises(EtcdError) as told:
            await client.read()
        assert type(told.value) is error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"?\n", EtcdError),
        (b"x" * 5000, EtcdError),
        (
            b'{"result":{"canceled":true,"cancel_reason":"code = PermissionDenied"}}\n',
            EtcdDeniedError,
        ),
    ],
)
async def test_changes_that_are_no_good_are_typed(body, error, aiohttp_url):
    url = await aiohttp_url(lambda _: web.Response(body=body))
    async with EtcdClient(EtcdOptions((url,), answer_bytes=4000)) as client:
        with pytest.raises(EtcdError) as told:
            await anext(client.watch(1))
        assert type(told.value) is error


async def test_a_lease_that_can_not_be_renewed_now_is_not_taken_for_lost(aiohttp_url):
    url = await aiohttp_url(lambda _: web.Response(body=b'{"error":{"grpc_code":14}}\n'))
    async with EtcdClient(EtcdOptions((url,))) as client:
        with pytest.raises(EtcdUnreachableError):
            await client.keep_alive(7)


@pytest.fixture
async def aiohttp_url():
    runners = []

    async def serve(handler):
        async def answer(request):
            return handler(request)

        app = web.Application()
        app.router.add_post("/{path:.*}", answer)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{port}"

    yield serve
    for runner in runners:
        await runner.cleanup()


@needs_etcd
async def test_users_log_in_again_after_a_restart_and_strangers_are_refused(tmp_path):
    etcd = await asyncio.to_thread(Etcd(tmp_path / "data").start)
    try:
        for name, role in (("root", "root"), ("sllm", None)):
            await post(etcd, "auth/user/add", {"name": name, "password": "secret"})
            if role:
                await post(etcd, "auth/user/grant", {"user": name, "role": role})
        await post(etcd, "auth/enable", {})
        url = (etcd.client_url,)
        async with EtcdClient(EtcdOptions(url, user="root", password="secret")) as client:
            await client.put("a", b"1")
            etcd.kill()
            await asyncio.to_thread(etcd.start)
            assert await value(client, "a") == b"1"
            async with aclosing(client.watch(1)) as changes:
                assert (await next_entries(changes))[0].value == b"1"
        for stranger in (
            EtcdOptions(url),
            EtcdOptions(url, user="root", password="wrong"),
            EtcdOptions(url, user="sllm", password="secret"),
        ):
            async with EtcdClient(stranger) as client:
                with pytest.raises(EtcdDeniedError):
                    await client.get("a")
    finally:
        etcd.close()


@needs_etcd
async def test_over_tls_both_sides_show_certificates_of_the_authority(tmp_path):
    now = datetime.now(UTC)
    authority = make_authority("test", now)
    issued = issue(authority, Holder(NodeId("etcd"), "127.0.0.1"), now)
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    (tmp_path / "cert.pem").write_bytes(issued.certificate)
    (tmp_path / "key.pem").write_bytes(issued.key)
    files = (
        "--cert-file", str(tmp_path / "cert.pem"), "--key-file", str(tmp_path / "key.pem"),
        "--trusted-ca-file", str(tmp_path / "ca.pem"),
    )  # fmt: skip
    etcd = await asyncio.to_thread(Etcd(tmp_path / "data", *files, scheme="https").start)
    try:
        anonymous = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        tls = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        async with EtcdClient(EtcdOptions((etcd.client_url,), tls=tls)) as client:
            await client.put("a", b"1")
            assert await value(client, "a") == b"1"
        for context in (None, anonymous):
            async with EtcdClient(EtcdOptions((etcd.client_url,), tls=context)) as stranger:
                with pytest.raises(EtcdUnreachableError, match=r"(?i)certificate"):
                    await stranger.get("a")
    finally:
        etcd.close()


def test_a_password_is_in_no_text():
    assert "secret" not in repr(EtcdOptions(("http://x",), user="u", password="secret"))
