"""Client and listener on loopback, under a key and under TLS."""

import asyncio
import contextlib
import io
import ssl
from datetime import UTC, datetime

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.cluster import folder
from sllm_node.cluster.named_files import load_cluster
from sllm_node.cluster.transport import PREFIX, Client, Listener
from sllm_node.cluster.trust import REQUEST_LIMIT, KeyTrust, open_trust
from sllm_node.core.errors import (
    ListenError,
    MessageFormatError,
    PeerDeniedError,
    PeerUnreachableError,
)
from sllm_node.core.types import NodeId
from tests.ports import free_port

A, B = NodeId("a"), NodeId("b")
KEY, OTHER_KEY = bytes(32), bytes([1]) * 32


async def echo(sender, payload, reply):
    await reply.send(sender.encode() + b":" + payload)


class Rig:
    """Node b listens; node a asks."""

    def __init__(self, server, client):
        self.refused = []
        self.cancelled = asyncio.Event()
        self.address = f"127.0.0.1:{free_port()}"
        handlers = {
            "echo": echo,
            "many": self._many,
            "endless": self._endless,
            "silent": self._silent,
            "left": self._left,
        }
        self.listener = Listener(server, handlers, 5.0, self.refused.append)
        self.client = Client(client, lambda peer: self.address if peer == B else None)

    async def _many(self, sender, payload, reply):
        for i in range(5):
            await reply.send(b"%d" % i)

    async def _endless(self, sender, payload, reply):
        await reply.send(b"begun")
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def _silent(self, sender, payload, reply):
        await asyncio.Event().wait()

    async def _left(self, sender, payload, reply):
        raise ConnectionResetError("Cannot write to closing transport")


@contextlib.asynccontextmanager
async def rigged(server, client):
    rig = Rig(server, client)
    await rig.listener.start(rig.address)
    try:
        yield rig
    finally:
        await rig.client.close()
        await rig.listener.close()


def key_trust(me, key=KEY, boot=7):
    return KeyTrust(key, me, [A, B], 64, lambda: boot)


def tls_trusts(place):
    now = datetime.now(UTC)
    folder.init(place, "tls", now)
    for number, name in enumerate((A, B, NodeId("c"))):
        folder.join(place, name, f"127.0.0.1:{8100 + number}", now)
    file = place / folder.FILE
    cluster = load_cluster(file)
    return {
        name: open_trust(cluster, file, name, cluster.address(name), lambda: 1)
        for name in (A, B, NodeId("c"))
    }


@pytest.fixture(params=["key", "tls"])
async def rig(request, tmp_path):
    if request.param == "key":
        server, client = key_trust(B), key_trust(A)
    else:
        trusts = tls_trusts(tmp_path)
        server, client = trusts[B], trusts[A]
    async with rigged(server, client) as made:
        yield made


async def test_a_request_is_answered_and_says_who_asks(rig):
    assert await rig.client.ask(B, "echo", b"hello", 5.0) == b"a:hello"


async def test_frames_come_one_after_another(rig):
    async with rig.client.stream(B, "many", b"", 5.0) as frames:
        assert [frame async for frame in frames] == [b"0", b"1", b"2", b"3", b"4"]


async def test_who_leaves_an_answer_ends_it_on_the_other_side(rig):
    async with rig.client.stream(B, "endless", b"", 5.0) as frames:
        assert await anext(frames) == b"begun"
    async with asyncio.timeout(30):
        await rig.cancelled.wait()


async def test_a_node_that_says_nothing_is_given_up(rig):
    with pytest.raises(PeerUnreachableError):
        await rig.client.ask(B, "silent", b"", 0.05)


async def test_nodes_that_are_not_there_are_unreachable(rig):
    with pytest.raises(PeerUnreachableError, match="cluster file"):
        await rig.client.ask(A, "echo", b"", 5.0)
    await rig.listener.close()
    with pytest.raises(PeerUnreachableError) as caught:
        await rig.client.ask(B, "echo", b"", 5.0)
    assert caught.value.problem == "connection refused"
    assert "127.0.0.1" not in str(caught.value)


async def test_an_unknown_request_is_denied(rig):
    with pytest.raises(PeerDeniedError):
        await rig.client.ask(B, "nothing", b"", 5.0)


async def test_an_address_that_is_taken_is_told(rig):
    second = Listener(key_trust(B), {}, 5.0, rig.refused.append)
    with pytest.raises(ListenError):
        await second.start(rig.address)


async def test_another_key_is_refused_and_counted():
    async with rigged(key_trust(B), key_trust(A, OTHER_KEY)) as rig:
        with pytest.raises(PeerDeniedError, match="wrong_key"):
            await rig.client.ask(B, "echo", b"hello", 5.0)
        assert [error.code for error in rig.refused] == ["wrong_key"]


async def test_a_recorded_request_is_refused_the_second_time():
    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        body = key_trust(A).send(b"hello", B).body
        statuses = []
        for _ in range(2):
            async with http.post(f"http://{rig.address}{PREFIX}echo", data=body) as response:
                statuses.append(response.status)
        assert statuses == [200, 403]
        assert [error.code for error in rig.refused] == ["replayed"]


@pytest.mark.parametrize("body", [b"", b"SLMC", b"\x00" * 300, b"{}"])
async def test_noise_is_refused(body):
    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        async with http.post(f"http://{rig.address}{PREFIX}echo", data=body) as response:
            assert response.status == 403
        assert await rig.client.ask(B, "echo", b"still here", 5.0) == b"a:still here"


async def post(http, rig, body):
    async with http.post(f"http://{rig.address}{PREFIX}echo", data=body) as response:
        return response.status, (await response.text()).partition(":")[0]


def damaged(sealed, place, change, cut, more):
    """Return a sealed message with one byte changed, a part cut off, and bytes added behind it."""
    at = place % len(sealed)
    data = sealed[:at] + bytes([sealed[at] ^ change]) + sealed[at + 1 :]
    return data[: len(data) - cut % len(data)] + more


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0), st.integers(0, 255), st.integers(0, 400) | st.just(0), st.binary(max_size=40)
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
async def test_damaged_messages_are_refused_by_a_listener_with_a_typed_error(damages):
    """Cut off, changed, of another version, continued: none is taken, and the next good one is."""
    known = {"wrong_key", "message_format", "protocol_version", "unknown_sender", "misdirected"}
    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        other = key_trust(A, boot=8)
        for damage in damages:
            sealed = other.send(b"hello", B).body
            if (data := damaged(sealed, *damage)) != sealed:
                status, code = await post(http, rig, data)
                assert status == 403
                assert code in known
                assert rig.refused.pop().code == code
        assert await rig.client.ask(B, "echo", b"still here", 5.0) == b"a:still here"


async def test_a_message_of_another_version_is_refused():
    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        sealed = bytearray(key_trust(A).send(b"hello", B).body)
        sealed[4] += 1
        assert await post(http, rig, bytes(sealed)) == (403, "protocol_version")


async def test_a_message_for_another_node_is_refused():
    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        body = key_trust(A).send(b"hello", NodeId("c")).body
        assert await post(http, rig, body) == (403, "misdirected")


@pytest.mark.parametrize("says_its_length", [True, False])
async def test_a_message_above_the_limit_is_refused_and_counted(says_its_length):
    async def pieces():
        for _ in range(10):
            yield bytes(1 << 20)

    async with rigged(key_trust(B), key_trust(A)) as rig, aiohttp.ClientSession() as http:
        body = io.BytesIO(bytes(REQUEST_LIMIT + (1 << 20))) if says_its_length else pieces()
        with contextlib.suppress(aiohttp.ClientError):  # closed before all was sent
            assert await post(http, rig, body) == (403, "message_too_large")
        async with asyncio.timeout(30):
            while not rig.refused:
                await asyncio.sleep(0)
        assert [error.code for error in rig.refused] == ["message_too_large"]
        assert await rig.client.ask(B, "echo", b"still here", 5.0) == b"a:still here"


async def test_a_peer_that_leaves_in_the_middle_of_an_answer_is_no_error_of_ours(rig, caplog):
    with pytest.raises(PeerUnreachableError):
        await rig.client.ask(B, "left", b"", 5.0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_an_answer_with_another_secret_is_not_believed():
    """Somebody between the nodes who does not have the key."""

    async def forge(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = b"\x00\x00\x00\x02hi" + bytes(16)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(forge, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = Client(key_trust(A), lambda _: address)
    try:
        with pytest.raises(Exception, match="not signed with this cluster's key"):
            await client.ask(B, "echo", b"", 5.0)
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


async def test_an_answer_cut_in_a_frame_is_not_whole():
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n\x00\x00\x00\x09hi")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = Client(key_trust(A), lambda _: address)
    try:
        with pytest.raises(MessageFormatError):
            await client.ask(B, "echo", b"", 5.0)
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


async def test_under_tls_nobody_without_a_certificate_comes_in(tmp_path):
    trusts = tls_trusts(tmp_path / "ours")
    strangers = tls_trusts(tmp_path / "theirs")
    async with rigged(trusts[B], strangers[A]) as rig:
        with pytest.raises(
            PeerDeniedError, match="certificate: its certificate is of another auth"
        ):
            await rig.client.ask(B, "echo", b"", 5.0)
        bare = ssl.create_default_context(cafile=tmp_path / "ours" / "ca.crt")
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                async with http.post(f"https://{rig.address}{PREFIX}echo", ssl=bare, data=b"") as r:
                    await r.read()


async def test_under_tls_a_node_that_left_the_file_is_a_stranger(tmp_path):
    trusts = tls_trusts(tmp_path)
    trusts[B].set_peers([NodeId("c")])
    async with rigged(trusts[B], trusts[A]) as rig:
        with pytest.raises(PeerDeniedError, match="unknown_sender"):
            await rig.client.ask(B, "echo", b"", 5.0)
