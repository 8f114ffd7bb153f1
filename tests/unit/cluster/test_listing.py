import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sllm_node.cluster.cluster import own_address
from sllm_node.cluster.directory_keys import NodeRecord, encode, key_of
from sllm_node.cluster.etcd import EtcdClient, EtcdOptions
from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.listing import Listing, etcd_options
from sllm_node.cluster.peers import Place
from sllm_node.cluster.records import Desired, Registration
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import parse_config
from sllm_node.core.errors import ConfigError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId
from tests.etcd import Etcd, needs_etcd

ME, B = NodeId("a"), NodeId("b")
KEY = '[trust]\nkey_file = "k"\n'
NODES = '[[nodes]]\nid = "a"\naddress = "10.0.0.1:8100"\n'
DIRECTORY = '[directory]\nendpoints = ["https://etcd:2379"]\n'
MODEL = Registration(ModelId("m"), "s3://bucket/m")
WISH = Desired(ModelId("m"), 1, 2, 30.0)


class Peers:
    """What is told of peers; `news` once something was."""

    def __init__(self):
        self.listed = {}
        self.news = asyncio.Event()

    def list_peer(self, peer, address):
        self.listed[peer] = address
        self.news.set()

    def unlist(self, peer, *, has_left):
        del self.listed[peer]


class Models:
    """Stands for who makes registered models known."""

    def __init__(self):
        self.told: list[dict[ModelId, str]] = []
        self.is_closed = False

    def set(self, urls):
        self.told.append(urls)

    async def close(self):
        self.is_closed = True


@asynccontextmanager
async def listing(folder, endpoint):
    journal, peers = await Journal.open(folder / "journal"), Peers()
    text = f'{KEY}[directory]\nendpoints = ["{endpoint}"]\ntimeout_s = 2.0\n'
    place = Place(ME, 7, folder / "cluster.toml", parse_cluster(text))
    made = Listing(place, "10.0.0.1:8100", peers, journal, MonotonicClock(), Metrics())  # type: ignore[arg-type]
    made.registered = models = Models()  # type: ignore[assignment]
    await made.start()
    try:
        yield made, peers
    finally:
        await made.close()
        assert models.is_closed
        await journal.close()


@needs_etcd
async def test_peers_and_desired_replicas_are_remembered_for_a_start_without_etcd(tmp_path):
    etcd = Etcd(tmp_path / "etcd").start()
    try:
        bad = NodeRecord(NodeId("bad"), "no address", 3)
        async with EtcdClient(EtcdOptions((etcd.client_url,))) as client:
            for record in (bad, WISH, MODEL, NodeRecord(B, "10.0.0.2:8100", 5)):
                await client.put(key_of(record), encode(record))
        async with listing(tmp_path, etcd.client_url) as (made, peers):
            await peers.news.wait()
            assert peers.listed == {B: "10.0.0.2:8100"}
            assert made.desired() == (WISH,)
            assert made.status()["state"] == "following"
            assert made.registrations() == (MODEL,)
            assert made.registered.told == [{"m": "s3://bucket/m"}]
    finally:
        etcd.close()
    async with listing(tmp_path, etcd.client_url) as (made, peers):
        assert peers.listed == {B: "10.0.0.2:8100"}
        assert made.desired() == (WISH,)
        assert made.registered.told == [{"m": "s3://bucket/m"}]
        assert [node["stale"] for node in made.status()["nodes"]] == [True, True]


def test_the_password_is_what_its_file_says_without_the_end_of_the_line(tmp_path):
    (tmp_path / "a.password").write_text("secret \n")
    text = DIRECTORY + 'user = "u"\npassword_file = "{id}.password"\n'
    config = parse_cluster(KEY + text).directory
    options = etcd_options(config, tmp_path / "cluster.toml", ME)
    assert (options.user, options.password) == ("u", "secret ")
    assert options.tls is not None


@pytest.mark.parametrize("key", ["ca_file", "password_file"])
def test_a_file_of_the_directory_that_cannot_be_used_is_told(tmp_path, key):
    (tmp_path / "x").write_bytes(b"\xff no certificate")
    text = f'{DIRECTORY}{key} = "x"\n' + ('user = "u"\n' if key == "password_file" else "")
    config = parse_cluster(KEY + text).directory
    with pytest.raises(ConfigError, match="directory: "):
        etcd_options(config, Path(tmp_path / "cluster.toml"), ME)


@pytest.mark.parametrize(
    ("file", "address", "expected"),
    [
        (NODES, "", "10.0.0.1:8100"),
        (NODES, "10.0.0.1:8100", "10.0.0.1:8100"),
        (DIRECTORY, "10.0.0.7:8100", "10.0.0.7:8100"),
        (NODES, "10.0.0.7:8100", None),
        (DIRECTORY, "", None),
    ],
)
def test_a_node_is_reached_where_the_file_or_its_own_config_says(file, address, expected):
    config = parse_config(f'[node]\nid = "a"\n[cluster]\nfile = "f"\naddress = "{address}"\n')
    cluster = parse_cluster(file + KEY)
    if expected is not None:
        assert own_address(config, cluster) == expected
        return
    with pytest.raises(ConfigError, match=r"cluster.address"):
        own_address(config, cluster)
