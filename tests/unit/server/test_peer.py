import pytest

from tests.unit.server.rig import serving
from tests.unit.store.handmade import write_checkpoint

BASE = "/peer/v1/checkpoints"


@pytest.fixture
def store(tmp_path):
    write_checkpoint(tmp_path, "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "notes.txt").write_text("private")
    (tmp_path / "outside.bin").write_text("private")
    return tmp_path


@pytest.fixture
async def rig(store):
    async with serving(store=store) as made:
        yield made


async def raw(rig, path, **headers):
    async with rig.http.get(rig.url + path, headers=headers) as response:
        return response.status, await response.read()


async def test_the_checkpoints_are_listed_with_their_digests(rig, store):
    status, body, _ = await rig.get(BASE)
    assert status == 200
    assert [(one["name"], one["bytes"]) for one in body["checkpoints"]] == [("a", 61440)]
    before = body["checkpoints"][0]["digest"]
    write_checkpoint(store, "a", seed=2)
    _, body, _ = await rig.get(BASE)
    assert body["checkpoints"][0]["digest"] != before


async def test_files_of_a_checkpoint_are_read_whole_or_in_part(rig, store):
    shard = (store / "a" / "shard-00000.bin").read_bytes()
    assert await raw(rig, f"{BASE}/a/shard-00000.bin") == (200, shard)
    part = await raw(rig, f"{BASE}/a/shard-00000.bin", Range="bytes=4096-8191")
    assert part == (206, shard[4096:8192])
    assert await raw(rig, f"{BASE}/a/config.json") == (200, b"{}")


@pytest.mark.parametrize(
    "path",
    [
        "a/notes.txt", "a/shard-00002.bin", "a/..%2Foutside.bin", "..%2Fa/config.json",
        "a%2F../config.json", ".remote%2Fa/config.json", "b/config.json", "a/tokenizer.json",
        "a/%2Fetc%2Fpasswd", "a/.", "%2e%2e/outside.bin",
    ],
)  # fmt: skip
async def test_nothing_else_is_given(rig, path):
    status, body = await raw(rig, f"{BASE}/{path}")
    assert status == 404
    assert b"private" not in body


async def test_peers_are_let_in_by_an_admin_key_only(store):
    keys = {"api_keys": ("client",), "admin_keys": ("admin",)}
    async with serving(store=store, **keys) as rig:
        for path in (BASE, f"{BASE}/a/config.json"):
            assert (await raw(rig, path))[0] == 401
            assert (await raw(rig, path, Authorization="Bearer client"))[0] == 401
            assert (await raw(rig, path, Authorization="Bearer admin"))[0] == 200


async def test_a_pull_is_passed_to_the_node_and_told(rig):
    status, body, _ = await rig.post("/admin/models/m/pull", {})
    assert (status, body["id"], rig.pulled) == (200, "m", ["m"])
