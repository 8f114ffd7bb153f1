"""What is asked of the machine that the tests run on."""

import socket

import pytest

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
