import json

import pytest
import torch
from safetensors.torch import load_file

from sllm_node.bench.shapes import find_shape
from sllm_node.bench.synthesis import check_room, synthesise
from sllm_node.core.errors import StorageWriteError, StoreFullError

FILE_BYTES = 10_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shape")
    return synthesise(find_shape("tiny"), root / "tiny", seed=1, file_bytes=FILE_BYTES)


def test_the_files_hold_every_tensor_of_the_shape(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        part = load_file(folder / name)
        assert all(index["weight_map"][tensor] == name for tensor in part)
        found |= {tensor: tuple(value.shape) for tensor, value in part.items()}
    assert found == {tensor.name: tensor.dimensions for tensor in find_shape("tiny").tensors}


def test_no_file_is_larger_than_asked_for(folder):
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < FILE_BYTES + 10_000


def test_values_are_gaussian_with_the_spread_of_weights(folder):
    weights = load_file(folder / "model-00001-of-00005.safetensors")["model.embed_tokens.weight"]
    assert weights.dtype == torch.bfloat16
    assert weights.float().std().item() == pytest.approx(0.02, rel=0.01)


def test_equal_seeds_give_equal_bytes_and_others_do_not(folder, tmp_path):
    shape = find_shape("tiny")
    again = synthesise(shape, tmp_path / "again", seed=1, file_bytes=FILE_BYTES)
    other = synthesise(shape, tmp_path / "other", seed=2, file_bytes=FILE_BYTES)
    name = "model-00002-of-00005.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_a_folder_that_is_there_stays(tmp_path):
    (tmp_path / "tiny").mkdir()
    synthesise(find_shape("tiny"), tmp_path / "tiny")
    assert list((tmp_path / "tiny").iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(StoreFullError):
        check_room(tmp_path, 1 << 60)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageWriteError, match=r"can.t be written"):
        synthesise(find_shape("tiny"), tmp_path / "file" / "tiny")
