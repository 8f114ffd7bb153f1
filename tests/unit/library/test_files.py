from contextlib import nullcontext
from typing import Any

import pytest

from sllm_node.core.errors import (
    ArgumentError,
    CheckpointChangedError,
    CheckpointFormatError,
    CheckpointNotFoundError,
)
from sllm_node.library.files import destination, find, pool_size, shown, unchanged
from tests.unit.checkpoint.raw import write_raw


def test_a_name_is_looked_for_in_the_store(store):
    assert find("llama", store).path == (store / "llama").resolve()


def test_a_checkpoint_is_known_by_its_whole_path(store):
    assert find(store / "llama").model == str((store / "llama").resolve())


def test_a_name_that_is_not_there_is_told_with_those_that_are(store):
    with pytest.raises(CheckpointNotFoundError, match="there are: gemma2, gpt2"):
        find("lama", store)


@pytest.mark.parametrize("name", ["no/such", "/no/such", "nothing"])
def test_a_folder_that_is_not_there_is_an_error(name, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        find(name, tmp_path / "no_store")


def test_a_folder_of_something_else_says_how_to_make_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="save_model"):
        find(tmp_path)


def test_a_damaged_index_is_an_error(tmp_path):
    (tmp_path / "tensor_index.json").write_text("{")
    with pytest.raises(CheckpointFormatError):
        find(tmp_path)


def test_only_checkpoints_are_ever_replaced(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    assert destination(folder, overwrite=False) == folder  # empty
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(ArgumentError, match="left alone"):
        destination(folder, overwrite=True)
    (folder / "tensor_index.json").write_text("{}")
    with pytest.raises(ArgumentError, match="overwrite=True"):
        destination(folder, overwrite=False)
    with pytest.raises(ArgumentError, match=r"would be deleted with it: thesis\.txt; move that"):
        destination(folder, overwrite=True)
    (folder / "thesis.txt").unlink()
    assert destination(folder, overwrite=True) == folder


@pytest.mark.parametrize("error", [None, CheckpointFormatError("order.json", "is wrong")])
def test_what_is_read_of_another_checkpoint_counts_for_nothing(tmp_path, error):
    def read(folder):
        with unchanged(find(folder)):
            if folder == replaced:
                write_raw(tmp_path, "replaced", replace=True)
            if error is not None:
                raise error

    same, replaced = (write_raw(tmp_path, name).path for name in ("same", "replaced"))
    with pytest.raises(CheckpointChangedError, match="was replaced"):
        read(replaced)
    with nullcontext() if error is None else pytest.raises(CheckpointFormatError):
        read(same)


def test_a_name_that_no_node_could_have_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="no name"):
        destination(tmp_path / ".hidden", overwrite=False)


def test_sizes_are_written_as_in_the_config():
    assert pool_size("2MiB") == 2 << 20
    assert pool_size(5) == 5
    assert pool_size(None) is None
    wrong: Any
    for wrong in ("lots", -1, 1.5):
        with pytest.raises(ArgumentError, match="pool_bytes"):
            pool_size(wrong)


def test_progress_goes_to_stderr_and_only_if_asked_for(capsys):
    with shown("work", progress=False) as nothing:
        assert nothing is None
    with shown("work", progress=True) as show:
        assert show is not None
        show(1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert "work" in said.err
