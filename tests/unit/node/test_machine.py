"""What is asked of the machine that the tests run on."""

import asyncio
import socket
import threading

import pytest
from aiohttp import web

from sllm_node.core.config import DeviceConfig
from sllm_node.core.errors import DeviceError
from sllm_node.node.machine import ThisMachine

MACHINE = ThisMachine()


def test_a_process_has_no_more_memory_than_its_machine():
    memory = MACHINE.memory()
    assert 0 < memory.available <= memory.total
    limit = MACHINE.lockable()
    assert limit is None or limit >= 0


def test_a_port_that_is_taken_is_told_and_a_free_one_is_not():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in (MACHINE.listen_problem("127.0.0.1", port) or "")
    assert MACHINE.listen_problem("127.0.0.1", 0) is None
    assert MACHINE.listen_problem("192.0.2.1", 0) is not None


def test_a_gpu_that_is_not_there_is_an_error_and_cpus_are_not_opened():
    with pytest.raises(DeviceError):
        MACHINE.devices(DeviceConfig(names=("cuda:99",)))
    assert MACHINE.devices(DeviceConfig()) == []


@pytest.fixture
def port():
    """Where something answers /admin/status to who has the key."""

    async def status(request):
        if request.headers.get("Authorization") != "Bearer k":
            return web.json_response({}, status=401)
        return web.json_response({"node": {"id": "n1"}})

    loop = asyncio.new_event_loop()
    application = web.Application()
    application.router.add_get("/admin/status", status)
    runner = web.AppRunner(application)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield runner.addresses[0][1]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_node_that_runs_tells_its_id_to_who_has_its_key(port):
    assert MACHINE.node_at("0.0.0.0", port, "k") == "n1"
    assert MACHINE.node_at("127.0.0.1", port, None) is None


def test_what_is_no_node_has_no_id():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert MACHINE.node_at("127.0.0.1", port, None) is None
