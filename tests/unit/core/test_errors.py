import inspect

import pytest

from sllm_node.core import errors
from sllm_node.core.errors import Fault, SllmError

CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SllmError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_says_whose_fault_it_is_and_has_a_code(kind):
    assert isinstance(kind.fault, Fault)
    assert kind.code == kind.code.lower()


def test_codes_tell_errors_apart():
    codes = [kind.code for kind in CLASSES]
    assert len(codes) == len(set(codes))


def test_a_damaged_chunk_names_model_shard_bytes_and_tensors():
    error = errors.ChecksumError("m", "shard-00001.bin", 4096, 8192, ("a", "b"))
    assert "shard-00001.bin" in str(error)
    assert "4096 to 12288" in str(error)
    assert "a, b" in str(error)


def test_an_unknown_model_is_answered_with_those_there_are():
    assert str(errors.ModelNotFoundError("x", ("a", "b"))).endswith("there are: a, b")
    assert str(errors.ModelNotFoundError("x")).endswith("here")


@pytest.mark.parametrize(
    "error",
    [
        errors.NodeFullError(3, 2, 1.4),
        errors.QueueTimeoutError("m", 3.0, 1.0),
        errors.DrainingError(5.0),
        errors.PoolExhaustedError("m", 4),
        errors.DeviceMemoryError("cpu", 3, 2, 9),
    ],
)
def test_busy_errors_say_when_to_come_back(error):
    assert error.fault is Fault.BUSY
    assert error.retry_after_s > 0


def test_other_errors_carry_their_fields():
    assert errors.PromptTooLongError(9, 4, "the model's context").limit == 4
    assert errors.CancelledByOperatorError("drain").reason == "drain"
    assert errors.ModelBusyError("m", "is pinned").model == "m"
    assert "Bearer" in str(errors.UnauthorizedError())
    assert "server.admin_keys" in str(errors.UnauthorizedError(needs_admin=True))
    assert "kv_cache_bytes is raised" in str(errors.PromptTooLongError(9, 0, "KV memory"))
    told = str(errors.ChecksumError("m", "s", 0, 9, ("a", "b", "c", "d", "e")))
    assert "(tensors: a, b, c and 2 more)" in told
    assert "1.0 KiB (1024 bytes)" in str(errors.ModelTooLargeError("m", 2048, 1024))
    assert errors.CheckpointFormatError("p", "bad").problem == "bad"
    assert errors.CheckpointChangedError("m", "s", "was truncated").shard == "s"
    assert errors.StorageReadError("m", "s", 4, "EIO").offset == 4
    assert "Foo" in str(errors.UnsupportedArchitectureError("src", "Foo", ("Bar",)))
    assert errors.ModelTooLargeError("m", 9, 4).model == "m"
    assert errors.DeviceError("cpu", "gone").problem == "gone"
    assert errors.LoadFailedError("m", "x").model == "m"
    assert errors.EngineError("m", "x").model == "m"
