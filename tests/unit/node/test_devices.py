"""Which devices a config opens."""

import pytest

from sllm_node.core.config import CPU_MEMORY_BYTES, ByteSize, DeviceConfig
from sllm_node.core.errors import DeviceError, DeviceLostError
from sllm_node.node.devices import EXIT_DEVICE_LOST, end_process, open_devices
from sllm_node.node.systemd import Notifier


def test_cpus_get_their_memory_each():
    opened = open_devices(
        DeviceConfig(names=("cpu:0", "cpu:1"), memory_bytes=ByteSize(1 << 20)), Notifier({})
    )
    assert [(device.name, device.memory_total) for device in opened] == [
        ("cpu:0", 1 << 20),
        ("cpu:1", 1 << 20),
    ]
    (one,) = open_devices(DeviceConfig(), Notifier({}))
    assert one.memory_total == CPU_MEMORY_BYTES


def test_a_gpu_that_is_not_there_is_an_error_and_no_cpu_instead():
    with pytest.raises(DeviceError) as caught:
        open_devices(DeviceConfig(names=("cuda:99",)), Notifier({}))
    assert "cuda" in str(caught.value)


def test_a_lost_device_ends_the_process_at_once(monkeypatch, caplog):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    end_process(DeviceLostError("cuda:0", "wait for a copy: illegal address"), Notifier({}))
    assert ended == [EXIT_DEVICE_LOST]
    assert "illegal address" in caplog.records[0].error
