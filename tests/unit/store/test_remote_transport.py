"""The same over S3, as moto's server speaks it, and what a config can get wrong."""

import contextlib
import subprocess
import sys
import traceback
from threading import Event

import pytest

pytest.importorskip("obstore")

import obstore
from aiohttp import web
from obstore.store import S3Store

from sllm_node.core.config import RemoteConfig
from sllm_node.core.errors import (
    ConfigError,
    RemoteDeniedError,
    RemoteError,
    RemoteNotFoundError,
    RemoteUnreachableError,
)
from sllm_node.store import remote_transport
from sllm_node.store.remote_transport import Transport
from tests.ports import free_port
from tests.unit.store.remote_rig import Node, make_remote

SERVER = (
    "import sys; from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0); server.start()\n"
    "print('READY', *server.get_host_and_port(), flush=True); sys.stdin.read(); server.stop()"
)
BUCKET = (
    "import sys, boto3\n"
    "boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1',"
    " aws_access_key_id='k', aws_secret_access_key='s').create_bucket(Bucket='models')"
)


@pytest.fixture(scope="module")
def endpoint():
    pytest.importorskip("moto")
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    ready = next(line for line in child.stdout if line.startswith("READY"))
    _, host, port = ready.split()
    yield f"http://{host}:{port}"
    child.communicate("")


@pytest.fixture
def bucket(endpoint, tmp_path):
    """A bucket with the checkpoints a and b under a prefix."""
    made = make_remote(tmp_path / "made", "ab")
    options = {
        "endpoint": endpoint,
        "access_key_id": "k",
        "secret_access_key": "s",
        "region": "us-east-1",
    }
    subprocess.run([sys.executable, "-W", "ignore", "-c", BUCKET, endpoint], check=True)
    store = S3Store("models", config=options, client_options={"allow_http": True})
    for path in (tmp_path / "made").rglob("*.*"):
        if path.is_file():
            obstore.put(store, f"v1/{path.relative_to(tmp_path / 'made')}", path.read_bytes())
    keys = tmp_path / "credentials"
    keys.write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
    made.config = {
        "url": "s3://models/v1", "endpoint": endpoint, "region": "us-east-1",
        "credentials_file": str(keys),
    }  # fmt: skip
    return made


async def test_a_bucket_is_listed_and_loaded_from(bucket, tmp_path):
    async with Node(tmp_path / "n", {"s3": bucket.config}) as node:
        assert node.catalog.models() == ("a", "b")
        assert await node.load("a") == bucket.bytes["a"]
        node.unload("a")
        await node.tier.pull("b")
        assert await node.load("b") == bucket.bytes["b"]
        node.unload("b")
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == [".remote", "a", "b"]


def test_what_a_bucket_lacks_is_not_found(bucket):
    transport = Transport("s3", RemoteConfig(**bucket.config))
    with pytest.raises(RemoteNotFoundError, match="remote 's3': a/nothing: is not there"):
        transport.read_all("a/nothing", 100, Event())
    view = memoryview(bytearray(4096))
    assert sum(transport.read_some("a/shard-00000.bin", view, 8192, Event())) == 4096
    assert bytes(view) == bucket.bytes["a"][8192:12288]


# --- over HTTP --------------------------------------------------------------------------------------


async def in_thread(call):
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(None, call)


async def test_a_server_that_is_no_peer_needs_its_models_named(tmp_path):
    remote = make_remote(tmp_path / "remote")
    async with remote.serving():
        transport = Transport("r", RemoteConfig(url=remote.url + "/a/config.json"))
        with pytest.raises(RemoteError, match=r"name them in remotes\.r\.models"):
            await in_thread(transport.models)
        named = Transport("r", RemoteConfig(url=remote.url, models=("a",)))
        assert await in_thread(named.models) == ("a",)


async def test_a_file_beyond_its_limit_is_refused(tmp_path):
    remote = make_remote(tmp_path / "remote")
    async with remote.serving():
        transport = Transport("r", RemoteConfig(url=remote.url))
        with pytest.raises(RemoteError, match="more than 10 bytes"):
            await in_thread(lambda: transport.read_all("a/config.json", 10, Event()))


def cut_off(remote, data, times, *, version=lambda: "1"):
    """Let a text come in pieces of 100 KB, each on a connection that ends behind it."""
    left = [times]

    async def before(request):
        asked = request.http_range
        start = asked.start or 0
        remote.asked.append(("text", start, asked.stop))
        headers = {
            "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}",
            "ETag": f'"{version()}"',
        }
        response = web.StreamResponse(status=206 if asked.stop else 200, headers=headers)
        response.content_length = len(data) - start
        await response.prepare(request)
        left[0] -= 1
        await response.write(data[start:] if left[0] < 0 else data[start : start + 100_000])
        if left[0] >= 0:
            request.transport.close()
        return response

    remote.before = before


async def test_a_text_that_is_cut_off_goes_on_where_it_ended(tmp_path):
    data = bytes(range(250)) * 2000
    remote = make_remote(tmp_path / "remote")
    cut_off(remote, data, times=3)
    async with remote.serving():
        transport = Transport("r", RemoteConfig(url=remote.url, retries=1))
        found = await in_thread(lambda: transport.read_all("a/config.json", 1 << 20, Event()))
    assert found == data
    starts = [start for _, start, _ in remote.asked]
    assert starts == sorted({*starts})
    assert len(starts) == 4


async def test_a_text_that_is_replaced_while_it_comes_is_read_from_its_start(tmp_path):
    versions = iter(["1", "2", "2"])
    remote = make_remote(tmp_path / "remote")
    cut_off(remote, bytes(250_000), times=1, version=lambda: next(versions))
    async with remote.serving():
        transport = Transport("r", RemoteConfig(url=remote.url, retries=2))
        found = await in_thread(lambda: transport.read_all("a/config.json", 1 << 20, Event()))
    assert found == bytes(250_000)
    assert [start > 0 for _, start, _ in remote.asked] == [False, True, False]


async def test_a_text_that_fails_is_asked_for_as_often_as_a_shard(tmp_path):
    remote = make_remote(tmp_path / "remote")

    async def before(request):
        remote.asked.append(("text", 0, 0))
        return web.Response(status=503)

    remote.before = before
    async with remote.serving():
        transport = Transport("r", RemoteConfig(url=remote.url, retries=2))
        with pytest.raises(RemoteUnreachableError, match="503") as found:
            await in_thread(lambda: transport.read_all("a/config.json", 100, Event()))
        stopped = Event()
        stopped.set()
        with pytest.raises(RemoteUnreachableError, match="503"):
            await in_thread(lambda: transport.read_all("a/config.json", 100, stopped))
    assert not found.value.is_silent
    assert len(remote.asked) == 3 + 1


def test_who_takes_no_connection_is_silent():
    transport = Transport("r", RemoteConfig(url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(RemoteUnreachableError, match="no connection to it") as found:
        transport.read_all("a/config.json", 100, Event())
    assert found.value.is_silent


def test_a_key_file_that_is_not_there_is_an_error_of_the_config(tmp_path):
    with pytest.raises(ConfigError, match=r"remotes\.r: can't be used: .*No such file"):
        Transport("r", RemoteConfig(url="http://x/y", key_file=str(tmp_path / "none")))


def test_credentials_without_keys_are_an_error_of_the_config(tmp_path):
    (tmp_path / "file").write_text("[default]\n")
    config = RemoteConfig(url="s3://b/p", credentials_file=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="aws_access_key_id"):
        Transport("r", config)


def test_keys_come_from_the_environment_where_the_config_names_none():
    config = RemoteConfig(url="s3://b/p", anonymous=True)
    options = remote_transport._s3_options(config)
    assert options == {"virtual_hosted_style_request": True, "skip_signature": True}


def test_errors_of_the_library_have_one_line():
    with contextlib.suppress(RemoteDeniedError):
        assert remote_transport._told(ValueError("a\nb")) == "a"
    assert remote_transport._told(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("status", "told"),
    [(403, "403 Forbidden"), (503, "503 Service Unavailable"), (None, "no connection to it")],
)
async def test_clients_are_told_neither_where_a_remote_is_nor_what_it_says(tmp_path, status, told):
    remote = make_remote(tmp_path / "remote")

    async def refuse(request):
        return web.Response(status=status, text="internal 10.0.0.7")

    async with remote.serving():
        host = remote.url.partition("//")[2]
        if status is None:
            host = f"127.0.0.1:{free_port()}"
        remote.before = refuse
        transport = Transport("r", RemoteConfig(url=f"http://user:PASSWORD@{host}?sig=TOKEN"))
        with pytest.raises(RemoteError) as found:
            await in_thread(lambda: transport.read_all("a/config.json", 1000, Event()))
    log = "".join(traceback.format_exception(found.value))
    assert str(found.value).endswith(told)
    assert not [word for word in ("PASSWORD", "TOKEN", "127.0.0.1", "10.0.0.7") if word in log]
