from sllm_node.core.units import GIB
from sllm_node.node.node import describe_devices


def test_what_is_cached_is_not_told_as_used():
    devices = [
        {"name": "cuda:0", "used": 20 * GIB, "cached": 30 * GIB, "total": 139 * GIB},
        {"name": "cuda:1", "used": 0, "cached": 10 * GIB, "total": 139 * GIB},
    ]
    told = describe_devices(devices)
    assert told == "device 20.0 GiB of 278.0 GiB used, 40.0 GiB cached"
