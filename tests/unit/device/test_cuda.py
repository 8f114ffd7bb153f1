"""What of the CUDA device can be told without a GPU: that there is none."""

import pytest

from sllm_node.core.errors import DeviceError

cuda = pytest.importorskip("sllm_node.device.cuda")


def test_a_machine_without_a_gpu_says_so():
    try:
        count = cuda.device_count()
    except DeviceError as error:
        assert "driver" in str(error)  # noqa: PT017 - either answer is right, by the machine
    else:
        with pytest.raises(DeviceError, match="numbered from 0"):
            cuda.CudaDevice(count + 1)
