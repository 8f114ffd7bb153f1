import os
import shutil
from contextlib import nullcontext
from pathlib import PosixPath

import msgspec
import pytest

from sllm_node.checkpoint.catalog import (
    Catalog,
    open_checkpoint,
    open_for_verify,
)
from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.checkpoint.verify import verify
from sllm_node.core.errors import (
    CheckpointFormatError,
    ModelNotFoundError,
    StorageWriteError,
)
from sllm_node.core.types import ModelId
from tests.unit.checkpoint.raw import write_raw


@pytest.fixture
def catalog(tmp_path):
    write_raw(tmp_path, "one")
    write_raw(tmp_path, "two")
    catalog = Catalog(tmp_path)
    catalog.scan()
    return catalog


def test_a_scan_finds_checkpoints_and_nothing_hidden(catalog):
    (catalog.root / ".sllm-tmp-three-00000001").mkdir()
    (catalog.root / "a-file").write_text("")
    catalog.scan()
    assert (catalog.models(), catalog.problems) == (("one", "two"), {})


def test_a_store_that_is_not_there_is_empty(tmp_path):
    catalog = Catalog(tmp_path / "nowhere")
    catalog.scan()
    assert catalog.models() == ()


def test_a_bad_checkpoint_is_a_problem_and_hides_no_other(catalog):
    (catalog.root / "two" / INDEX_FILE).write_text("{}")
    (catalog.root / "empty").mkdir()
    catalog.scan()
    assert catalog.models() == ("one",)
    assert sorted(catalog.problems) == ["empty", "two"]
    assert all(isinstance(p, CheckpointFormatError) for p in catalog.problems.values())


def test_a_checkpoint_that_vanished_is_forgotten(catalog):
    shutil.rmtree(catalog.root / "one")
    catalog.scan()
    assert catalog.models() == ("two",)


def test_an_unchanged_checkpoint_is_read_once(catalog):
    assert catalog.get("one") is catalog.get("one")


def test_a_checkpoint_that_appeared_later_is_found(catalog):
    written = write_raw(catalog.root, "three")
    assert catalog.get("three") == written
    assert "three" in catalog.models()


def test_a_replaced_checkpoint_is_read_anew(catalog):
    before = catalog.get("one")
    write_raw(catalog.root, "one", chunk_bytes=8192, replace=True)
    after = catalog.get("one")
    assert (before.index.chunk_bytes, after.index.chunk_bytes) == (4096, 8192)
    assert before.identities != after.identities


@pytest.fixture
def while_read(monkeypatch):
    """Return what lets a call be made once, between an index being read and its shards."""
    decode, waiting = msgspec.json.decode, []

    def call_first(data, **kind):
        if waiting:
            waiting.pop()()
        return decode(data, **kind)

    monkeypatch.setattr(msgspec.json, "decode", call_first)
    return waiting.append


@pytest.mark.parametrize("changed", [{"shard_bytes": 16384}, {"chunk_bytes": 8192}])
def test_a_checkpoint_replaced_while_it_is_opened_is_the_new_one(catalog, while_read, changed):
    path = catalog.root / "one"
    for opened in (
        lambda: open_checkpoint(path),
        lambda: Catalog(catalog.root).get(ModelId("one")),
    ):
        write_raw(catalog.root, "one", replace=True)
        os.utime(path / INDEX_FILE, ns=(1, 1))
        while_read(lambda: write_raw(catalog.root, "one", replace=True, **changed))
        assert opened() == open_checkpoint(path)
        assert verify(open_checkpoint(path)) == []


def test_a_checkpoint_removed_while_it_is_opened_is_a_format_error(catalog, while_read):
    while_read(lambda: catalog.remove("one"))
    with pytest.raises(CheckpointFormatError, match="No such file"):
        open_checkpoint(catalog.root / "one")


def test_a_shard_touched_since_gets_a_new_identity(catalog):
    before = catalog.get("one")
    os.utime(before.path / "shard-00001.bin", ns=(1, 1))
    assert catalog.get("one").identities[1].mtime_ns == 1


@pytest.mark.parametrize("name", ["three", "../one", ".hidden", "", "a/b"])
def test_a_name_without_checkpoint_is_not_found(catalog, name):
    with pytest.raises(ModelNotFoundError, match="one, two"):
        catalog.get(name)


@pytest.mark.parametrize("file", [INDEX_FILE, "shard-00000.bin"])
def test_a_checkpoint_that_lost_a_file_is_a_format_error(catalog, file):
    (catalog.root / "one" / file).unlink()
    with pytest.raises(CheckpointFormatError, match=f"{file}: can't be read: No such file"):
        catalog.get("one")
    assert catalog.models() == ("two",)


def test_a_truncated_shard_is_named_with_both_sizes(catalog):
    os.truncate(catalog.root / "one" / "shard-00001.bin", 100)
    with pytest.raises(
        CheckpointFormatError, match=r"shard-00001.bin: has 100 bytes.*\d+; convert"
    ):
        catalog.get("one")


def test_a_huge_index_is_not_read(catalog):
    os.truncate(catalog.root / "one" / INDEX_FILE, (1 << 30) + 1)
    with pytest.raises(CheckpointFormatError, match="too large"):
        catalog.get("one")


def test_an_index_that_can_not_be_read_is_a_format_error(catalog):
    (catalog.root / "one" / INDEX_FILE).unlink()
    (catalog.root / "one" / INDEX_FILE).mkdir()
    with pytest.raises(CheckpointFormatError, match="Is a directory"):
        catalog.get("one")


def test_a_removed_checkpoint_is_gone_from_disk_and_from_memory(catalog):
    catalog.remove("one")
    assert catalog.models() == ("two",)
    assert [path.name for path in catalog.root.iterdir()] == ["two"]


def test_a_damaged_checkpoint_can_be_removed(catalog):
    (catalog.root / "one" / INDEX_FILE).write_text("{")
    (catalog.root / "one" / "shard-00000.bin").unlink()
    catalog.remove("one")
    assert not (catalog.root / "one").exists()


def test_of_a_link_only_the_link_is_removed(catalog, tmp_path):
    linked = write_raw(tmp_path / "disk", "large")
    (catalog.root / "three").symlink_to(linked.path)
    assert catalog.remove("three") == linked.path.resolve()
    assert verify(linked) == []
    assert "three" not in catalog.models()
    assert sorted(path.name for path in catalog.root.iterdir()) == ["disk", "one", "two"]


def test_a_removal_sweeps_what_was_left_behind_even_of_a_name_that_is_not_there(catalog):
    for name in ("one", "gone"):
        (catalog.root / f".sllm-tmp-{name}-00000000").mkdir()
        with nullcontext() if name == "one" else pytest.raises(ModelNotFoundError):
            assert catalog.remove(name) is None
    assert [path.name for path in catalog.root.iterdir()] == ["two"]


def test_an_empty_folder_can_be_removed(catalog):
    (catalog.root / "empty").mkdir()
    catalog.remove("empty")
    assert not (catalog.root / "empty").exists()


def test_a_folder_that_is_no_checkpoint_is_not_removed(catalog):
    (catalog.root / "data").mkdir()
    (catalog.root / "data" / "photos").write_text("all of them")
    with pytest.raises(CheckpointFormatError, match=r"data: has no tensor_index.json.*left alone"):
        catalog.remove("data")
    assert (catalog.root / "data" / "photos").is_file()


@pytest.mark.parametrize("name", ["three", "..", "../store"])
def test_what_is_no_checkpoint_is_not_removed(catalog, name):
    with pytest.raises(ModelNotFoundError):
        catalog.remove(name)


def test_a_removal_that_the_system_refuses_is_a_typed_error(tmp_path):
    class Unwritable(PosixPath):
        def rename(self, target):
            raise PermissionError(13, "Permission denied")

    write_raw(tmp_path, "one")
    with pytest.raises(StorageWriteError, match="Permission denied"):
        Catalog(Unwritable(tmp_path)).remove("one")


def test_a_damaged_checkpoint_opens_for_verification(catalog):
    (catalog.root / "one" / "shard-00000.bin").unlink()
    assert len(open_for_verify(catalog.root / "one").index.tensors) == 5


def test_a_checkpoint_that_is_completed_while_its_card_is_read_is_the_one_that_is_here(tmp_path):
    class Completing:
        def models(self):
            return ("late",)

        def get(self, model):
            write_raw(tmp_path, model)
            return open_for_verify(tmp_path / model)

        def remove(self, name):
            raise AssertionError(name)

    assert Catalog(tmp_path, Completing()).get(ModelId("late")).identities != ()
