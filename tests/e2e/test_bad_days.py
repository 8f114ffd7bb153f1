"""What goes wrong in production, on a real process: damage, drain, vanished files."""

import asyncio

import aiohttp
import openai
import pytest

from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("good", "bad"):
        make_checkpoint(folder, name, chunk_bytes=65536)
    return folder


def connect(node):
    return openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def ask(model, **more):
    return {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, **more}


def flip_bit(path, offset):
    with path.open("r+b") as shard:
        shard.seek(offset)
        byte = shard.read(1)[0]
        shard.seek(offset)
        shard.write(bytes([byte ^ 1]))


async def test_a_flipped_bit_is_an_error_never_a_token_and_the_node_goes_on(tmp_path, store):
    shard = store / "bad" / "shard-00000.bin"
    flip_bit(shard, 5000)
    with NodeProcess(tmp_path, store, braked=True) as node:
        async with connect(node) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.completions.create(**ask("bad"))
            assert caught.value.status_code == 500
            assert caught.value.code == "checksum_mismatch"
            assert "shard-00000.bin" in str(caught.value)
            expected = (await client.completions.create(**ask("good"))).choices[0].text
            flip_bit(shard, 5000)
            assert (await client.completions.create(**ask("bad"))).choices[0].text == expected


async def test_a_truncated_shard_is_an_error_and_the_next_model_is_served(tmp_path, store):
    shard = store / "bad" / "shard-00000.bin"
    with NodeProcess(tmp_path, store, braked=True) as node:
        with shard.open("r+b") as file:
            file.truncate(8192)
        async with connect(node) as client:
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(**ask("bad"))
            assert (await client.completions.create(**ask("good"))).choices[0].text


async def test_sigterm_lets_a_running_stream_finish_and_exits_with_zero(tmp_path, store):
    with NodeProcess(tmp_path, store, braked=True) as node:
        async with connect(node) as client:
            body = ask("good", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
            node.brake()
            stream = await client.completions.create(**body)
            chunks = [await anext(aiter(stream))]
            node.terminate()
            await asyncio.to_thread(node.wait_for, "STOPPING=1")
            node.release()
            chunks += [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
        assert await asyncio.to_thread(node.wait) == 0


async def test_a_drain_ends_sessions_at_its_limit_and_still_exits_with_zero(tmp_path, store):
    with NodeProcess(tmp_path, store, braked=True, drain_s=0.0) as node:
        async with connect(node) as client:
            body = ask("good", max_tokens=450, stream=True, extra_body={"ignore_eos": True})
            node.brake()
            stream = await client.completions.create(**body)
            await anext(aiter(stream))
            node.terminate()
            with pytest.raises(openai.APIError):
                _ = [chunk async for chunk in stream]
        assert await asyncio.to_thread(node.wait) == 0


async def test_a_removed_checkpoint_is_not_found_and_a_new_one_is_served(tmp_path, store):
    import shutil

    with NodeProcess(tmp_path, store, braked=True) as node:
        shutil.rmtree(store / "bad")
        make_checkpoint(store, "new", chunk_bytes=65536)
        async with connect(node) as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(**ask("bad"))
            assert (await client.completions.create(**ask("new"))).choices[0].text


def test_a_port_in_use_is_one_clear_sentence(tmp_path, store):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = NodeProcess(tmp_path, store)
        node.config.write_text(node.config.read_text().replace("port = 0", f"port = {port}"))
        with pytest.raises(AssertionError, match="did not start"):
            node.__enter__()
    assert f"{port}" in node.log.read_text()
    assert "Traceback" not in node.log.read_text()


async def pinned(node, verb=None):
    """Return which models are pinned, after `pin` or `unpin` of good."""
    async with aiohttp.ClientSession() as http:
        if verb is not None:
            async with http.post(f"{node.url}/admin/models/good/{verb}") as response:
                assert response.status == 200, await response.text()
        async with http.get(f"{node.url}/admin/status") as response:
            report = await response.json()
    return {model["id"] for model in report["models"] if model["pinned"]}


async def test_a_pin_survives_a_kill_until_it_is_taken_back(tmp_path, store):
    node = NodeProcess(tmp_path, store, braked=True)
    with node:
        assert await pinned(node, "pin") == {"good"}
        node.process.kill()
    with node:
        assert await pinned(node) == {"good"}
        assert await pinned(node, "unpin") == set()
    with node:
        assert await pinned(node) == set()


async def test_a_damaged_journal_is_set_aside_and_told_and_the_node_serves(tmp_path, store):
    journal = store / ".journal" / "test.sqlite"
    journal.parent.mkdir()
    journal.write_bytes(b"no database" * 1000)
    with NodeProcess(tmp_path, store, braked=True) as node:
        async with connect(node) as client:
            assert (await client.completions.create(**ask("good"))).choices[0].text
        assert "journal set aside" in node.log.read_text()
        async with aiohttp.ClientSession() as http, http.get(f"{node.url}/metrics") as response:
            assert "sllm_journals_set_aside_total 1.0" in await response.text()
    assert (journal.parent / "test.sqlite.damaged-1").exists()
