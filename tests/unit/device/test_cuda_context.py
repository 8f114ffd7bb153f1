"""How the answers of the CUDA driver are read."""

import pytest

from sllm_node.core.errors import DeviceError, DeviceLostError

driver = pytest.importorskip("cuda.bindings.driver")
context = pytest.importorskip("sllm_node.device.cuda_context")
RESULT = driver.CUresult


@pytest.fixture
def lost():
    return []


@pytest.fixture
def calls(lost):
    return context.CudaContext("cuda:0", None, None, lost.append)


def test_success_is_no_error(calls):
    assert calls.error("copy", RESULT.CUDA_SUCCESS) is None
    assert calls.check("ask", (RESULT.CUDA_SUCCESS, 7)) == 7
    assert calls.check("ask", (RESULT.CUDA_SUCCESS, 7, 8)) == (7, 8)


def test_a_refused_call_is_an_error_and_the_device_goes_on(calls, lost):
    error = calls.error("copy to the device", RESULT.CUDA_ERROR_INVALID_VALUE)
    assert isinstance(error, DeviceError)
    assert not isinstance(error, DeviceLostError)
    assert "copy to the device" in str(error)
    assert "CUDA_ERROR_INVALID_VALUE" in str(error)
    assert lost == []


@pytest.mark.parametrize("name", ["ILLEGAL_ADDRESS", "ECC_UNCORRECTABLE", "LAUNCH_FAILED"])
def test_a_poisoned_context_is_told_once(calls, lost, name):
    code = getattr(RESULT, f"CUDA_ERROR_{name}")
    first = calls.error("wait for a copy", code)
    assert isinstance(first, DeviceLostError)
    assert calls.error("copy", code) is first
    assert lost == [first]
    with pytest.raises(DeviceLostError):
        calls.check("map", (code, None))
