import asyncio

from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import parse_config
from sllm_node.core.errors import StoppingError
from sllm_node.core.units import GIB
from sllm_node.node.node import Node, describe_devices
from sllm_node.node.systemd import Notifier


def small(tmp_path):
    text = f'[server]\nport = 0\n[store]\npath = "{tmp_path}/models"\npool_bytes = "4MiB"\n'
    sizes = 'chunk_bytes = "64KiB"\n[device]\nmemory_bytes = "64MiB"\n'
    return parse_config(f'{text}{sizes}[engine]\nkv_cache_bytes = "4MiB"\n')


def test_what_is_cached_is_not_told_as_used():
    devices = [
        {"name": "cuda:0", "used": 20 * GIB, "cached": 30 * GIB, "total": 139 * GIB},
        {"name": "cuda:1", "used": 0, "cached": 10 * GIB, "total": 139 * GIB},
    ]
    told = describe_devices(devices)
    assert told == "device 20.0 GiB of 278.0 GiB used, 40.0 GiB cached"


def test_no_drain_is_taken_back_from_the_moment_in_which_a_node_stops(tmp_path):
    config = small(tmp_path)

    async def main():
        loop = asyncio.get_running_loop()
        node = Node(config, Notifier({}), MonotonicClock())
        await node.start()
        stopping = loop.create_task(node.stop(asyncio.Event()))
        refused = loop.create_future()

        def undrain():
            """Be what the loop runs next after the turn in which the drain begins."""
            try:
                node._service.undrain()
            except StoppingError:
                refused.set_result(True)
            else:
                refused.set_result(False)

        loop.call_soon(undrain)
        await stopping
        assert await refused

    asyncio.run(main())


def test_a_node_that_starts_sweeps_what_crashed_writers_left_and_nothing_else(tmp_path):
    config = small(tmp_path)
    store = tmp_path / "models"
    for left in (store / ".tmp-m-0000000a", store / ".remote" / ".sllm-tmp-m-00000000"):
        left.mkdir(parents=True)
        (left / "shard-00000.bin").write_bytes(b"half")
    (store / ".tmp-my-precious").mkdir()

    async def main():
        node = Node(config, Notifier({}), MonotonicClock())
        await node.start()
        await node.stop(asyncio.Event())

    with temporary_folder(store, "other") as folder:
        asyncio.run(main())
        assert folder.is_dir()
    assert [path.name for path in store.glob(".*tmp*")] == [".tmp-my-precious"]
    assert list((store / ".remote").iterdir()) == []
