import asyncio
import errno
import gc
import shutil
from pathlib import Path

import pytest

pytest.importorskip("obstore")

from aiohttp import web

from sllm_node.checkpoint.cards import read_bits
from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.verify import verify
from sllm_node.core.errors import (
    CancelledByOperatorError,
    ModelNotFoundError,
    RemoteChangedError,
    RemoteChecksumError,
    RemoteDeniedError,
    RemoteError,
    RemoteNotFoundError,
    RemoteUnreachableError,
    StorageWriteError,
    StoreFullError,
)
from sllm_node.core.types import ModelId, Tier
from sllm_node.store.remote_disk import CardDisk
from tests.unit.store.handmade import Rig, pool_chunk, write_checkpoint
from tests.unit.store.remote_rig import Node, make_remote

pytestmark = pytest.mark.usefixtures("with_codecs")

A = ModelId("a")


@pytest.fixture
async def remote(tmp_path):
    made = make_remote(tmp_path / "remote", "ab")
    async with made.serving():
        yield made


def chunk():
    """Return what a file chunk takes in a shard, and one of the pool."""
    return pool_chunk(Rig.codec)


def only(remote, **options):
    return {"r": {"url": remote.url, "models": ("a",), **options}}


def is_here(node):
    return (node.root / "a").is_dir()


async def test_a_load_is_the_fetch_and_leaves_an_ordinary_checkpoint(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
    assert verify(open_checkpoint(node.root / "a")) == []
    assert remote.shard_bytes == remote.stored["a"]
    names = {path.name for path in (node.root / "a").iterdir()}
    assert names == {
        "tensor_index.json", "config.json", "tokenizer.json", "shard-00000.bin", "shard-00001.bin",
    }  # fmt: skip


async def test_what_came_is_the_same_checkpoint_for_those_who_hold_it(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        before = node.catalog.get(A)
        lease = await node.store.acquire(A)
        await node.tier.pull("a")
        after = node.catalog.get(A)
        assert (after, after.path) == (before, node.root / "a")
        assert (before.remote, after.remote) == ("r", None)
        lease.release()
        node.store.evict(A, Tier.DEVICE, "test")
        assert await node.load("a") == remote.bytes["a"]
        assert node.reports[-1].bytes_from_dram == len(remote.bytes["a"])


async def test_the_report_and_the_metrics_tell_the_remotes_bytes(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.load("a")
        size = len(remote.bytes["a"])
        assert node.reports[0].bytes_from_remote == size
        assert node.sample("sllm_load_bytes_total", source="remote") == size
        assert node.sample("sllm_remote_bytes_total", remote="r") >= remote.stored["a"]
        assert node.store.bandwidth(Tier.REMOTE) > 0
        assert node.store.bandwidth(Tier.NVME) is None
        node.unload("a")


async def test_a_restarted_node_asks_for_nothing_that_is_here(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.load("a")
        node.unload("a")
    remote.asked.clear()
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
    assert remote.shard_bytes == 0


async def stopped_after(remote, node, chunks):
    """Cancel a load after `chunks` file chunks; return how many bytes have come."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def before(request):
        asked = [name for name, _, _ in remote.asked if name.startswith("shard-")]
        if request.match_info["file"].startswith("shard-") and len(asked) >= chunks:
            reached.set()
            await go_on.wait()
        return

    remote.before = before
    load = asyncio.create_task(node.store.acquire(A))
    await reached.wait()
    load.cancel()
    go_on.set()
    await asyncio.gather(load, return_exceptions=True)
    await node.store.settled(A)
    remote.before = remote._nothing


async def test_a_cancelled_load_goes_on_where_it_was(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, 3)
        assert not is_here(node)
    async with Node(tmp_path / "n", only(remote)) as node:
        here = node.store.residency(A)[Tier.NVME]
        assert here > 0
        remote.asked.clear()
        assert await node.load("a") == remote.bytes["a"]
        assert remote.shard_bytes == remote.stored["a"] - here
        node.unload("a")
    assert is_here(node)


@pytest.mark.parametrize("chunks", range(1, 8))
async def test_a_load_that_goes_on_tells_no_more_of_the_remote_than_it_read(
    tmp_path, remote, chunks
):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, chunks)
        assert await node.load("a") == remote.bytes["a"]
        report = node.reports[-1]
        assert 0 <= report.bytes_from_remote <= report.bytes_from_nvme
        sizes = [node.sample("sllm_load_bytes_total", source=tier) for tier in ("nvme", "remote")]
        assert sizes == [
            report.bytes_from_nvme - report.bytes_from_remote,
            report.bytes_from_remote,
        ]
        assert sum(sizes) + report.bytes_from_dram == report.bytes_total
        node.unload("a")


async def test_two_who_want_it_fetch_it_once(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await asyncio.gather(
            node.load("a"), node.load("a"), node.tier.pull("a"), node.tier.pull("a")
        )
        assert remote.shard_bytes == remote.stored["a"]
        assert is_here(node)
        node.unload("a")


async def test_a_pull_needs_neither_device_nor_pool(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.tier.pull("a")
        assert node.reports == []
        assert node.store.pool_chunks_used == 0
        assert node.store.residency(A)[Tier.NVME] == remote.stored["a"]
        assert verify(open_checkpoint(node.root / "a")) == []
        await node.tier.pull("a")


async def test_a_connection_cut_in_a_chunk_goes_on_where_it_ended(tmp_path, remote):
    remote.cut[("shard-00000.bin", chunk())] = 5000
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == remote.bytes["a"]
        assert node.sample("sllm_remote_retries_total", remote="r") == 1
        node.unload("a")


async def test_wrong_bytes_are_asked_for_again(tmp_path, remote):
    spoiled = []

    def spoil(name, start, data):
        if name == "shard-00000.bin" and start == chunk() and not spoiled:
            spoiled.append(start)
            return bytes(len(data))
        return data

    remote.spoil = spoil
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")


async def test_bytes_that_stay_wrong_are_never_kept(tmp_path, remote):
    remote.spoil = lambda name, start, data: bytes(len(data)) if start == chunk() else data
    async with Node(tmp_path / "n", only(remote)) as node:
        with pytest.raises(
            RemoteChecksumError, match=f"remote 'r' sends wrong bytes {chunk()} to {2 * chunk()}"
        ):
            await node.load("a")
        assert node.sample("sllm_checksum_failures_total") == 1
        failures = {"remote": "r", "reason": "remote_checksum_mismatch"}
        assert node.sample("sllm_remote_failures_total", **failures) == 1
        remote.spoil = lambda name, start, data: data
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")


async def test_a_remote_that_has_another_checkpoint_by_now_is_told(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, 2)
        new = write_checkpoint(remote.root, "a", seed=1)
        with pytest.raises(RemoteChangedError, match="was replaced at remote 'r'"):
            await node.load("a")
        assert await node.load("a") == new  # the card was made anew before the error was told
        node.unload("a")


@pytest.mark.parametrize("status", [403, 404, 416])
async def test_whatever_a_remote_with_another_checkpoint_answers_that_is_told(
    tmp_path, remote, status
):
    """It may have fewer shards, or shorter ones: then there is nothing that a digest could tell of."""

    async def before(request):
        is_shard = request.match_info["file"].startswith("shard-")
        return web.Response(status=status) if is_shard else None

    async with Node(tmp_path / "n", only(remote)) as node:
        remote.before = before
        new = write_checkpoint(remote.root, "a", seed=1)
        with pytest.raises(RemoteChangedError, match="was replaced at remote 'r'"):
            await node.load("a")
        remote.before = remote._nothing
        assert await node.load("a") == new
        node.unload("a")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, RemoteDeniedError),
        (401, RemoteDeniedError),
        (404, RemoteNotFoundError),
        (500, RemoteUnreachableError),
        (416, RemoteError),
        (200, RemoteError),
    ],
)
async def test_what_a_remote_refuses_is_a_typed_error(tmp_path, remote, status, kind):
    async def before(request):
        if request.match_info["file"].startswith("shard-"):
            return web.Response(status=status, body=b"x" * chunk())
        return None

    async with Node(tmp_path / "n", only(remote)) as node:
        remote.before = before
        with pytest.raises(kind, match="remote 'r': a/shard-0000"):
            await node.load("a")
        with pytest.raises(kind):
            await node.tier.pull("a")


async def test_a_remote_that_went_down_costs_its_models_only(tmp_path, remote):
    write_checkpoint(tmp_path / "n", "own")
    async with Node(tmp_path / "n", only(remote)):
        pass
    async with Node(tmp_path / "n", {"r": {"url": "http://127.0.0.1:1/x"}}) as node:
        assert node.catalog.models() == ("a", "own")
        assert node.tier.status()[0]["state"] == "down"
        assert await node.load("own")
        with pytest.raises(RemoteUnreachableError):
            await node.load("a")
        node.unload("own")


async def test_a_remotes_models_are_listed_with_their_tier(tmp_path, remote):
    async with Node(tmp_path / "n", {"r": {"url": remote.url}}) as node:
        assert node.catalog.models() == ("a", "b")
        assert node.tier.status() == [
            {
                "name": "r",
                "url": remote.url,
                "state": "ok",
                "problem": None,
                "models": ["a", "b"],
                "not_offered": [],
            }
        ]
        size = remote.stored["a"]
        wanted = {Tier.DEVICE: 0, Tier.DRAM: 0, Tier.NVME: 0, Tier.REMOTE: size}
        assert node.store.residency(A) == wanted


async def test_a_model_that_left_its_remote_is_gone(tmp_path, remote):
    async with Node(tmp_path / "n", {"r": {"url": remote.url}}) as node:
        (remote.root / "b").rename(remote.root / "c")
        await node.tier.refresh()
        assert node.catalog.models() == ("a", "c")


async def test_of_two_remotes_with_one_name_the_first_is_asked(tmp_path, remote):
    other = make_remote(tmp_path / "other", "a", seed=5)
    async with other.serving():
        remotes = {"one": {"url": other.url}, "two": {"url": remote.url}}
        async with Node(tmp_path / "n", remotes) as node:
            await node.tier.refresh()
            assert await node.load("a") == other.bytes["a"]
            node.unload("a")


async def test_while_a_remote_is_down_another_that_has_the_same_is_asked(tmp_path, remote):
    remotes = {"one": {"url": remote.url}, "two": {"url": remote.url}}
    async with Node(tmp_path / "n", remotes) as node:
        await stopped_after(remote, node, 3)
        await node.tier.refresh()
        here = node.store.residency(A)[Tier.NVME]
        assert here > 0
    remotes["one"] = {"url": "http://127.0.0.1:1/x"}
    async with Node(tmp_path / "n", remotes) as node:
        assert [seen["state"] for seen in node.tier.status()] == ["down", "ok"]
        remote.asked.clear()
        assert await node.load("a") == remote.bytes["a"]
        assert remote.shard_bytes == remote.stored["a"] - here
        node.unload("a")


async def test_a_checkpoint_that_is_here_goes_before_a_remotes(tmp_path, remote):
    own = write_checkpoint(tmp_path / "n", "a", seed=9)
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == own
        node.unload("a")
    assert remote.shard_bytes == 0


class FullDisk(CardDisk):
    """Takes two writes and no more."""

    left = 2

    def write(self, shard, view, offset):
        FullDisk.left -= 1
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(shard, view, offset)


async def test_a_full_disk_costs_the_copy_and_not_the_load(tmp_path, remote):
    FullDisk.left = 2
    disk = lambda checkpoint: FullDisk(checkpoint, direct=True)  # noqa: E731
    async with Node(tmp_path / "n", only(remote), open_disk=disk) as node:
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
        with pytest.raises(StoreFullError):
            await node.tier.pull("a")
    assert not is_here(node)
    async with Node(tmp_path / "n", only(remote)) as node:
        assert node.store.residency(A)[Tier.NVME] == 2 * chunk()
        await node.tier.pull("a")
    assert verify(open_checkpoint(node.root / "a")) == []


async def test_what_has_come_can_be_removed_also_while_more_comes(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, 3)
        node.catalog.remove("a")
        assert node.store.residency(A)[Tier.NVME] == 0
        with pytest.raises(ModelNotFoundError):
            node.catalog.remove("a")
        node.unload("a")
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
    assert verify(open_checkpoint(node.root / "a")) == []


async def test_a_checkpoint_that_came_and_was_removed_can_come_again(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.tier.pull("a")
        node.catalog.remove("a")
        assert node.store.residency(A)[Tier.NVME] == 0
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
    assert is_here(node)


async def test_the_last_who_leaves_a_pull_stops_it(tmp_path, remote):
    asked = asyncio.Event()
    never = asyncio.Event()

    async def before(request):
        if request.match_info["file"].startswith("shard-"):
            asked.set()
            await never.wait()
        return

    async with Node(tmp_path / "n", only(remote, timeout_s=1.5)) as node:
        remote.before = before
        pulls = [asyncio.create_task(node.tier.pull("a")) for _ in range(2)]
        await asked.wait()
        pulls[0].cancel()
        await asyncio.gather(pulls[0], return_exceptions=True)
        assert not pulls[1].done()
        pulls[1].cancel()
        await asyncio.gather(pulls[1], return_exceptions=True)
        never.set()
        remote.before = remote._nothing
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.tier.pull("a")
    assert is_here(node)


async def test_who_comes_while_a_pull_is_being_stopped_gets_a_new_one(tmp_path, remote):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    reached, gate = asyncio.Event(), asyncio.Event()

    async def slowly(request):
        if request.match_info["file"].startswith("shard-"):
            reached.set()
            await gate.wait()

    remote.before = slowly
    async with Node(tmp_path / "n", only(remote)) as node:
        first = asyncio.create_task(node.tier.pull("a"))
        await reached.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(node.tier.pull("a"))
        await asyncio.sleep(0)
        gate.set()
        await second
        assert is_here(node)
    del first
    gc.collect()
    assert told == []


async def test_a_pull_of_what_comes_here_in_the_meantime_has_nothing_to_do(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:

        async def before(request):
            write_checkpoint(node.root, "c")

        remote.before = before
        await node.tier.pull("c")


async def test_a_pull_of_what_nobody_has_is_not_found(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        for name in ("nothing", "../a", ""):
            with pytest.raises(ModelNotFoundError):
                await node.tier.pull(name)


async def test_names_with_signs_are_found(tmp_path):
    odd = make_remote(tmp_path / "remote", ["llama-3:8b.q_1"])
    async with odd.serving(), Node(tmp_path / "n", {"r": {"url": odd.url}}) as node:
        assert await node.load("llama-3:8b.q_1") == odd.bytes["llama-3:8b.q_1"]
        node.unload("llama-3:8b.q_1")


async def test_a_peers_key_is_sent(tmp_path, remote):
    (tmp_path / "key").write_text("secret\n")
    async with Node(tmp_path / "n", only(remote, key_file=str(tmp_path / "key"))):
        pass
    assert {headers["Authorization"] for headers in remote.headers} == {"Bearer secret"}


async def test_an_index_that_makes_no_sense_is_visible_and_stops_nothing(tmp_path, remote):
    (remote.root / "a" / "tensor_index.json").write_text("{}")
    async with Node(tmp_path / "n", {"r": {"url": remote.url}}) as node:
        assert node.catalog.models() == ("b",)
        assert node.tier.status()[0]["state"] == "ok"
        assert "a/tensor_index.json" in node.tier.status()[0]["problem"]
        assert await node.load("b") == remote.bytes["b"]
        node.unload("b")


async def test_a_cancelled_load_does_not_wait_for_a_remote_that_hangs(tmp_path, remote):
    asked = asyncio.Event()

    async def before(request):
        if request.match_info["file"].startswith("shard-"):
            asked.set()
            return web.Response(status=503)
        return None

    async with Node(tmp_path / "n", only(remote, retries=1000)) as node:
        remote.before = before
        load = asyncio.create_task(node.store.acquire(A))
        await asked.wait()
        load.cancel()
        await node.store.settled(A)
        assert node.store.residency(A)[Tier.NVME] == 0


async def test_a_crash_costs_only_what_was_not_flushed(tmp_path, remote):
    class Crashes(CardDisk):
        def flush(self, bits):
            raise OSError(errno.EIO, "Input/output error")

    disk = lambda checkpoint: Crashes(checkpoint, direct=False)  # noqa: E731
    async with Node(tmp_path / "n", only(remote), open_disk=disk) as node:
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")
        with pytest.raises(StorageWriteError):
            await node.tier.pull("a")
    remote.asked.clear()
    async with Node(tmp_path / "n", only(remote)) as node:
        assert node.store.residency(A)[Tier.NVME] == 0
        await node.tier.pull("a")
    assert remote.shard_bytes == remote.stored["a"]
    assert verify(open_checkpoint(node.root / "a")) == []


async def test_what_is_on_the_disk_in_the_middle_of_a_load_can_be_gone_on_with(tmp_path, remote):
    """What a crash leaves: the bits of some moment, and shards that have at least their chunks."""
    flushed, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Tells(CardDisk):
        def flush(self, bits):
            super().flush(bits)
            if sum(bits) >= 3:
                loop.call_soon_threadsafe(flushed.set)

    async def before(request):
        start = request.http_range.start
        if request.match_info["file"] == "shard-00001.bin" and start == 2 * chunk():
            await go_on.wait()
        return

    disk = lambda checkpoint: Tells(checkpoint, direct=True)  # noqa: E731
    async with Node(tmp_path / "n", only(remote), open_disk=disk, flush_bytes=1) as node:
        remote.before = before
        load = asyncio.create_task(node.load("a"))
        await flushed.wait()
        bits = Path(".remote") / "a" / "fetched.bits"
        promised = (node.root / bits).read_bytes()
        shutil.copytree(node.root, tmp_path / "crashed")
        (tmp_path / "crashed" / bits).write_bytes(promised)
        go_on.set()
        assert await load == remote.bytes["a"]
        node.unload("a")
    remote.asked.clear()
    async with Node(tmp_path / "crashed", only(remote)) as node:
        here = node.store.residency(A)[Tier.NVME]
        assert here >= 3 * chunk()
        assert await node.load("a") == remote.bytes["a"]
        assert remote.shard_bytes == remote.stored["a"] - here
        node.unload("a")
    assert verify(open_checkpoint(node.root / "a")) == []


async def test_what_a_crash_left_of_a_completed_card_is_deleted(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await node.tier.pull("a")
        left = node.tier.cards.root / "a" / "shard-00000.bin"
        left.hardlink_to(node.root / "a" / "shard-00000.bin")
        await node.tier.refresh()
        assert not left.exists()
        assert verify(open_checkpoint(node.root / "a")) == []


async def test_what_was_damaged_here_before_all_has_come_is_fetched_again(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, 3)
    here, _ = node.tier.cards.fetched(A)  # what was on its way is written by now
    card = node.tier.cards.root / "a"
    index = node.tier.cards.get(A).index
    number = read_bits(card, index).index(True)
    with (card / "shard-00000.bin").open("r+b") as file:
        file.seek(number * chunk())
        file.write(bytes(100))
    remote.asked.clear()
    async with Node(tmp_path / "n", only(remote)) as node:
        assert await node.load("a") == remote.bytes["a"]
        assert remote.shard_bytes == remote.stored["a"] - here + chunk()
        node.unload("a")
    assert verify(open_checkpoint(node.root / "a")) == []


async def test_units_of_several_file_chunks_fetch_only_those_that_are_missing(tmp_path, remote):
    async with Node(tmp_path / "n", only(remote)) as node:
        await stopped_after(remote, node, 3)
    remote.asked.clear()
    async with Node(tmp_path / "n", only(remote), unit=4 * chunk()) as node:
        here = node.store.residency(A)[Tier.NVME]
        assert await node.load("a") == remote.bytes["a"]
        assert remote.shard_bytes == remote.stored["a"] - here
        node.unload("a")
    assert is_here(node)


async def test_remotes_are_looked_at_beside_and_who_waits_for_the_first_look_is_told(
    tmp_path, remote
):
    async with Node(tmp_path / "n", only(remote)) as node:
        looked = asyncio.Event()
        beside = asyncio.create_task(node.tier.keep_fresh(looked.set))
        await looked.wait()
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        assert node.tier.status()[0]["state"] == "ok"


async def test_a_store_that_takes_no_card_is_told_as_a_problem(tmp_path, remote, caplog):
    async with Node(tmp_path / "n", only(remote)) as node:
        node.tier.cards.drop(A)
        node.tier.cards.root.rmdir()
        node.tier.cards.root.write_text("in the way")
        await node.tier.refresh()
        assert ".remote/a" in node.tier.status()[0]["problem"]
        assert "remote not usable" in caplog.text


async def test_a_node_that_stops_ends_its_pulls(tmp_path, remote):
    asked = asyncio.Event()

    async def before(request):
        if request.match_info["file"].startswith("shard-"):
            asked.set()
            return web.Response(status=503)
        return None

    async with Node(tmp_path / "n", only(remote, retries=1000)) as node:
        remote.before = before
        pull = asyncio.create_task(node.tier.pull("a"))
        await asked.wait()
        await node.tier.close()
        with pytest.raises(CancelledByOperatorError, match="the pull was stopped"):
            await pull


async def partly_fetched(tmp_path, remote, remotes=None):
    """Return a node on which some bytes of `a` have come, and how many."""
    remotes = remotes or {"r": {"url": remote.url}}
    async with Node(tmp_path / "n", remotes) as first:
        await stopped_after(remote, first, 3)
    node = await Node(tmp_path / "n", remotes).__aenter__()
    here = node.store.residency(A)[Tier.NVME]
    assert here > 0
    return node, here


async def test_bytes_that_have_come_outlive_a_look_that_lists_nothing(tmp_path, remote):
    node, here = await partly_fetched(tmp_path, remote)
    (remote.root / "a").rename(tmp_path / "away")
    await node.tier.refresh()
    assert node.tier.status()[0]["not_offered"] == ["a"]
    assert node.catalog.models() == ("a", "b")
    assert node.store.residency(A)[Tier.NVME] == here
    (tmp_path / "away").rename(remote.root / "a")
    await node.tier.refresh()
    assert node.tier.status()[0]["not_offered"] == []
    remote.asked.clear()
    assert await node.load("a") == remote.bytes["a"]
    assert remote.shard_bytes == remote.stored["a"] - here
    node.unload("a")
    await node.__aexit__()


async def test_bytes_of_a_model_not_offered_go_when_an_operator_removes_them(tmp_path, remote):
    node, _ = await partly_fetched(tmp_path, remote)
    (remote.root / "a").rename(tmp_path / "away")
    await node.tier.refresh()
    assert node.tier.cards.remove(A)
    await node.tier.refresh()
    assert node.catalog.models() == ("b",)
    assert node.tier.status()[0]["not_offered"] == []
    await node.__aexit__()


async def test_bytes_that_have_come_go_when_the_remote_offers_another_index(tmp_path, remote):
    node, _ = await partly_fetched(tmp_path, remote)
    (remote.root / "a").rename(tmp_path / "away")
    remote.bytes["a"] = write_checkpoint(remote.root, "a", seed=77)
    await node.tier.refresh()
    assert node.store.residency(A)[Tier.NVME] == 0
    assert await node.load("a") == remote.bytes["a"]
    node.unload("a")
    await node.__aexit__()


async def test_a_later_remotes_other_index_does_not_cost_bytes_that_have_come(tmp_path, remote):
    other = make_remote(tmp_path / "other", "a", seed=5)
    async with other.serving():
        remotes = {"one": {"url": remote.url}, "two": {"url": other.url}}
        node, here = await partly_fetched(tmp_path, remote, remotes)
        (remote.root / "a").rename(tmp_path / "away")
        await node.tier.refresh()
        assert node.store.residency(A)[Tier.NVME] == here
        assert "rm a" in node.tier.status()[1]["problem"]
        await node.__aexit__()
