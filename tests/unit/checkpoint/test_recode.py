import shutil
from pathlib import Path

import pytest

from sllm_node.checkpoint.catalog import open_checkpoint
from sllm_node.checkpoint.output import DiskFiles
from sllm_node.checkpoint.recode import recode
from sllm_node.checkpoint.verify import verify
from sllm_node.core.errors import CheckpointError, ChecksumError, ConversionError, StoreFullError
from tests.unit.checkpoint.raw import SPECS, WEIGHTS, CountedFiles, write_raw


@pytest.fixture
def checkpoint(tmp_path):
    made = write_raw(tmp_path, "m", WEIGHTS, chunk_bytes=16384, shard_bytes=65536)
    (made.path / "config.json").write_text("{}")
    return made


def shards(checkpoint):
    return [(checkpoint.path / s.name).read_bytes() for s in checkpoint.index.shards]


def test_there_and_back_every_byte_is_as_it_was(checkpoint):
    before = shards(checkpoint)
    seen = []
    encoded = recode(checkpoint, "exp", 16384, progress=lambda *counts: seen.append(counts))
    assert encoded.index.version == 2
    assert encoded.index.file_size < checkpoint.index.size
    assert verify(encoded) == []
    assert seen[-1] == (checkpoint.index.size, checkpoint.index.size)
    again = recode(encoded, "raw", 16384)
    assert shards(again) == before
    assert again.index == checkpoint.index
    assert (again.path / "config.json").read_text() == "{}"
    assert [path.name for path in Path(checkpoint.path.parent).iterdir()] == ["m"]


def test_what_a_link_leads_to_is_recoded_where_it_lies(checkpoint, tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "store" / "linked"
    link.symlink_to(checkpoint.path)
    encoded = recode(open_checkpoint(link), "exp", 16384)
    assert (encoded.model, encoded.path, encoded.index.version) == ("linked", link, 2)
    assert link.is_symlink()
    assert verify(open_checkpoint(checkpoint.path)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "store"]
    assert list(link.parent.iterdir()) == [link]


def test_whatever_call_fails_the_old_checkpoint_stays_whole(checkpoint):
    class StoppedError(Exception):
        pass

    def stop(at):
        def count(number):
            if number == at:
                raise StoppedError

        return CountedFiles(count)

    before = shards(checkpoint)
    for at in range(1, 200):
        try:
            recode(open_checkpoint(checkpoint.path), "exp", 16384, files=stop(at))
        except StoppedError:
            index = open_checkpoint(checkpoint.path).index
            if not index.is_encoded:
                assert shards(checkpoint) == before
            continue
        break
    assert verify(open_checkpoint(checkpoint.path)) == []
    assert open_checkpoint(checkpoint.path).index.is_encoded


def test_a_checkpoint_that_was_replaced_meanwhile_stays(checkpoint, tmp_path):
    def replace(number):
        if number == 12:
            write_raw(tmp_path, "m", SPECS, replace=True)

    with pytest.raises(ConversionError, match="was replaced while it was read"):
        recode(checkpoint, "raw", 16384, files=CountedFiles(replace))
    assert open_checkpoint(checkpoint.path).index.tensors != checkpoint.index.tensors
    assert verify(open_checkpoint(checkpoint.path)) == []


def test_one_that_is_replaced_while_it_is_read_is_not_called_damaged(checkpoint, tmp_path):
    write_raw(tmp_path / "other", "m", WEIGHTS[::-1], chunk_bytes=16384, shard_bytes=65536)

    def replace(done, total):
        shutil.rmtree(checkpoint.path)
        shutil.copytree(tmp_path / "other" / "m", checkpoint.path)

    with pytest.raises(ConversionError, match="was replaced while it was read"):
        recode(checkpoint, "exp", 16384, progress=replace)
    assert verify(open_checkpoint(checkpoint.path)) == []


def test_texts_that_are_edited_while_it_is_recoded_are_kept(checkpoint):
    def edit(done, total):
        (checkpoint.path / "config.json").write_text('{"edited": true}')
        (checkpoint.path / "NOTES.md").write_text("mine")

    encoded = recode(checkpoint, "exp", 16384, progress=edit)
    assert (encoded.path / "config.json").read_text() == '{"edited": true}'
    assert (encoded.path / "NOTES.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "NOTES.md"])
def test_a_text_that_is_edited_while_texts_are_copied_is_not_lost(checkpoint, monkeypatch, name):
    copy = shutil.copyfile

    def edited_then(source, destination):
        copy(source, destination)
        (checkpoint.path / name).write_text("mine")

    monkeypatch.setattr(shutil, "copyfile", edited_then)
    with pytest.raises(ConversionError, match=rf"edited while it was copied \({name}\); recode"):
        recode(checkpoint, "exp", 16384)
    assert (checkpoint.path / name).read_text() == "mine"
    assert open_checkpoint(checkpoint.path) == checkpoint


def test_what_fits_only_when_it_is_encoded_is_recoded(checkpoint):
    class SmallDisk(DiskFiles):
        def free_bytes(self, folder):
            return checkpoint.index.size * 3 // 4

    with pytest.raises(StoreFullError):
        recode(checkpoint, "raw", 16384, files=SmallDisk())
    assert recode(checkpoint, "exp", 16384, files=SmallDisk()).index.is_encoded


def test_a_checkpoint_that_was_deleted_meanwhile_does_not_come_back(checkpoint):
    def delete(number):
        if number == 12:
            shutil.rmtree(checkpoint.path)

    with pytest.raises(CheckpointError):
        recode(checkpoint, "raw", 16384, files=CountedFiles(delete))
    assert not checkpoint.path.exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_folders_in_a_checkpoint_are_never_deleted_by_recoding_it(checkpoint, is_there):
    def put():
        (checkpoint.path / "original").mkdir(exist_ok=True)
        (checkpoint.path / "original" / "model.safetensors").write_text("precious")

    if is_there:
        put()
    with pytest.raises(ConversionError, match="has folders that would be deleted: original; move"):
        recode(checkpoint, "exp", 16384, progress=lambda done, total: put())
    assert (checkpoint.path / "original" / "model.safetensors").read_text() == "precious"
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["m"]


def test_a_damaged_checkpoint_is_not_recoded(checkpoint):
    path = checkpoint.path / "shard-00000.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ChecksumError):
        recode(checkpoint, "exp")
    assert not open_checkpoint(checkpoint.path).index.is_encoded


@pytest.mark.parametrize(
    ("codec", "chunk_bytes", "problem"),
    [("zip", 4096, "none of raw, exp"), ("raw", 5000, "4096"), ("exp", 1 << 31, "more than")],
)
def test_what_cannot_be_written_is_refused(checkpoint, codec, chunk_bytes, problem):
    with pytest.raises(ConversionError, match=problem):
        recode(checkpoint, codec, chunk_bytes)
