import errno
import json
import os
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sllm_node.convert import safetensors
from sllm_node.convert.safetensors import WEIGHTS_FILE, WEIGHTS_INDEX_FILE, few, open_weights
from sllm_node.convert.tensors import STORED_DTYPES, load
from sllm_node.core.errors import ConversionError
from tests.unit.convert.safetensors_bytes import write_file

A = {"a": ("F32", [2], b"12345678")}
B = {"b": ("U8", [3], b"xyz"), "empty": ("F16", [0, 4], b"")}


def open_all(folder):
    """Return name → (dtype, shape, bytes) of the folder's tensors."""
    with ExitStack() as files:
        return {
            name: (tensor.dtype, tensor.shape, b"".join(bytes(s) for s in tensor.slices()))
            for name, tensor in open_weights(folder, files).items()
        }


def write_sharded(folder, places):
    write_file(folder / "one.safetensors", A)
    write_file(folder / "two.safetensors", B)
    (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps({"weight_map": places, "metadata": {}}))


def test_tensors_of_every_shared_dtype_come_as_they_were_saved(tmp_path):
    saved = {name: torch.arange(6).to(dtype).reshape(2, 3) for dtype, name in STORED_DTYPES.items()}
    saved["scalar"] = torch.tensor(7)
    save_file(saved, tmp_path / WEIGHTS_FILE)
    with ExitStack() as files:
        found = {name: load(tensor) for name, tensor in open_weights(tmp_path, files).items()}
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))  # fmt: skip


def test_large_tensors_come_in_slices_that_join_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "SLICE_BYTES", 16)
    data = bytes(range(40))
    write_file(tmp_path / WEIGHTS_FILE, {"a": ("F32", [10], data)})
    with ExitStack() as files:
        tensor = open_weights(tmp_path, files)["a"]
        assert [len(piece) for piece in tensor.slices()] == [16, 16, 8]
        assert b"".join(bytes(piece) for piece in tensor.slices()) == data
        whole = bytearray(40)
        tensor.read_into(memoryview(whole))
        assert whole == data


def test_a_sharded_folder_gives_the_tensors_that_its_index_names(tmp_path):
    write_sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert open_all(tmp_path) == {"a": ("F32", (2,), b"12345678"), "b": ("U8", (3,), b"xyz")}


def test_a_single_file_goes_before_an_index_as_it_does_for_transformers(tmp_path):
    write_sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    write_file(tmp_path / WEIGHTS_FILE, {"a": ("F32", [2], b"abcdefgh")})
    assert open_all(tmp_path) == {"a": ("F32", (2,), b"abcdefgh")}


def test_a_single_file_of_another_name_is_found(tmp_path):
    write_file(tmp_path / "weights.safetensors", B)
    assert open_all(tmp_path)["empty"] == ("F16", (0, 4), b"")


@pytest.mark.parametrize("names", [["x", "y"], ["adapter_model"], []])
def test_a_folder_without_the_usual_names_is_refused(tmp_path, names):
    for name in names:
        write_file(tmp_path / f"{name}.safetensors", A)
    with pytest.raises(ConversionError, match=r"has neither model.safetensors nor"):
        open_all(tmp_path)


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors: can't be opened: No such file"),
        ({"a": "two.safetensors", "x": "one.safetensors"}, "no file has: x"),
        ({"a": "../one.safetensors"}, "outside the folder"),
        ({"a": ".."}, r"names a file outside the folder: '\.\.'"),
        ({"a": "."}, "names a file outside the folder"),
        ({"a": ""}, "names a file outside the folder"),
        ({"a": "one\0.safetensors"}, "can't be opened: embedded null byte"),
        ({"a": "folder.safetensors"}, "folder.safetensors: is no file"),
        ({"a": "pipe.safetensors"}, "pipe.safetensors: is no file"),
        ("no map", "is no index of shards"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, places, problem):
    write_sharded(tmp_path, places)
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ConversionError, match=problem):
        open_all(tmp_path)


def test_weights_that_are_a_folder_are_refused(tmp_path):
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(ConversionError, match=r"model.safetensors: is no file"):
        open_all(tmp_path)


def test_a_header_that_can_not_be_read_is_named(tmp_path, monkeypatch):
    def fail(descriptor, size, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_file(tmp_path / WEIGHTS_FILE, A)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ConversionError, match=r"model.safetensors: can't be read: Input/output"):
        open_all(tmp_path)


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (entry(dtype="F4"), "unknown dtype F4"),
        (entry(shape=[3]), "shape contradicts"),
        (entry(shape=[-1, -2]), "shape contradicts"),
        (entry(data_offsets=[-8, 0]), "shape contradicts"),
        (entry(data_offsets=[4, 12]), "is truncated"),
        (entry(data_offsets=[0]), "damaged header"),
        ([], "damaged header"),
    ],
)
def test_a_header_that_is_wrong_is_refused(tmp_path, header, problem):
    write_file(tmp_path / WEIGHTS_FILE, A, header)
    with pytest.raises(ConversionError, match=problem):
        open_all(tmp_path)


@given(st.binary(max_size=64))
def test_bytes_that_are_no_safetensors_are_a_conversion_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("x")
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(ConversionError):
        open_all(folder)


def test_a_file_truncated_while_it_is_read_is_named_with_the_tensor(tmp_path):
    path = write_file(tmp_path / WEIGHTS_FILE, A)
    with ExitStack() as files:
        tensor = open_weights(tmp_path, files)["a"]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ConversionError, match="ends inside tensor a"):
            load(tensor)


def test_a_file_that_can_not_be_read_is_named_with_the_tensor(tmp_path):
    write_file(tmp_path / WEIGHTS_FILE, A)
    with ExitStack() as files:
        tensor = open_weights(tmp_path, files)["a"]
    with pytest.raises(ConversionError, match="reading tensor a: Bad file descriptor"):
        load(tensor)


def test_many_names_are_cut_short():
    assert few([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
