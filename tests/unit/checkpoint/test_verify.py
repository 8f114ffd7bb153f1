import os
import shutil

import pytest

from sllm_node.checkpoint.catalog import open_for_verify
from sllm_node.checkpoint.verify import Damage, verify
from sllm_node.core.errors import CheckpointReplacedError
from tests.unit.checkpoint.raw import SPECS, write_raw

CHANGED = "the bytes are not those written"


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_an_undamaged_checkpoint_has_no_damage_and_the_progress_reaches_its_size(tmp_path):
    checkpoint = write_raw(tmp_path)
    seen = []
    assert verify(checkpoint, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (checkpoint.index.size, checkpoint.index.size)


def test_a_flipped_bit_is_named_by_shard_chunk_and_tensors(tmp_path):
    checkpoint = write_raw(tmp_path)
    flip(checkpoint.path / "shard-00000.bin", 4096)
    assert verify(checkpoint) == [Damage("shard-00000.bin", 4096, 4096, ("a", "b"), CHANGED)]


def test_a_flipped_bit_of_padding_is_damage_without_tensors(tmp_path):
    checkpoint = write_raw(tmp_path)
    last = checkpoint.index.shards[-1]
    flip(checkpoint.path / last.name, last.size - 1)
    assert [(d.shard, d.problem) for d in verify(checkpoint)] == [(last.name, CHANGED)]


def test_every_damaged_chunk_is_reported_in_order(tmp_path):
    checkpoint = write_raw(tmp_path)
    flip(checkpoint.path / "shard-00001.bin", 0)
    flip(checkpoint.path / "shard-00000.bin", 5000)
    flip(checkpoint.path / "shard-00000.bin", 0)
    places = [(d.shard, d.offset) for d in verify(checkpoint)]
    assert places == [("shard-00000.bin", 0), ("shard-00000.bin", 4096), ("shard-00001.bin", 0)]


def test_a_truncated_shard_says_how_many_bytes_are_missing(tmp_path):
    checkpoint = write_raw(tmp_path)
    os.truncate(checkpoint.path / "shard-00000.bin", 5000)
    (damage,) = verify(checkpoint)
    assert (damage.offset, damage.problem) == (4096, "the file ends 3192 bytes too early")


def test_a_missing_shard_is_damage_of_all_its_chunks(tmp_path):
    checkpoint = write_raw(tmp_path)
    (checkpoint.path / "shard-00000.bin").unlink()
    damages = verify(open_for_verify(checkpoint.path))
    assert [(d.offset, d.problem) for d in damages] == [
        (0, "can't be read: No such file or directory"),
        (4096, "can't be read: No such file or directory"),
    ]


@pytest.mark.parametrize("is_there", [True, False])
def test_one_that_is_replaced_or_removed_while_it_is_read_is_not_called_damaged(tmp_path, is_there):
    checkpoint = write_raw(tmp_path)
    shutil.rmtree(checkpoint.path)
    if is_there:
        write_raw(tmp_path, specs=SPECS[::-1])
    with pytest.raises(CheckpointReplacedError, match="replaced or removed while it was read"):
        verify(checkpoint)


def test_bytes_that_no_chunk_has_are_damage_without_tensors(tmp_path):
    checkpoint = write_raw(tmp_path)
    first, *_, last = checkpoint.index.shards
    for shard in (first, last):
        with (checkpoint.path / shard.name).open("ab") as file:
            file.write(bytes(100))
    flip(checkpoint.path / first.name, 4096)
    problem = "the file has 100 bytes too many"
    assert verify(checkpoint) == [
        Damage(first.name, 4096, 4096, ("a", "b"), CHANGED),
        Damage(first.name, first.file_size, 100, (), problem),
        Damage(last.name, last.file_size, 100, (), problem),
    ]
