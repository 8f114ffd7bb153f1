import os

import pytest

from sllm_node.cluster.text_folders import LIST_FILE, Found, look, read, remove, surplus, write
from sllm_node.core.errors import StorageWriteError

TEXTS = {"tokenizer.json": b"t" * 1000, "config.json": b"{}"}
KEY, OTHER, THIRD = (digit * 32 for digit in "abc")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / KEY, 512, TEXTS)
    return tmp_path / KEY


def test_what_was_written_is_read_and_its_use_noted(folder):
    os.utime(folder, (1, 1))
    assert read(folder) == 512
    assert [(one.name, one.used_ns > 1_000_000_000) for one in look(folder.parent)] == [(KEY, True)]
    assert {name: (folder / name).read_bytes() for name in TEXTS} == TEXTS


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"t" * 999 + b"u"),
        ("tokenizer.json", b"t" * 999),
        (LIST_FILE, None),
        (LIST_FILE, b""),
        (LIST_FILE, b"\xff"),
        (LIST_FILE, b'{"context_tokens": 512}'),
    ],
)
def test_what_is_damaged_or_lacks_something_counts_as_not_here(folder, name, data):
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    assert read(folder) is None


def test_what_is_written_again_takes_the_place_of_what_was_there_and_of_what_a_crash_left(folder):
    (folder / "vocab.txt").write_bytes(b"x")
    left = folder.with_name(folder.name + ".new")
    left.mkdir()
    (left / "vocab.txt").write_bytes(b"x")
    write(folder, 256, TEXTS)
    assert read(folder) == 256
    assert sorted(path.name for path in folder.iterdir()) == sorted((*TEXTS, LIST_FILE))
    assert not left.exists()


def test_a_disk_that_refuses_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageWriteError, match="file"):
        write(tmp_path / "file" / KEY, 512, TEXTS)


def test_only_folders_of_texts_are_found_and_removed_ones_are_not(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    assert [one.name for one in look(tmp_path)] == [KEY]
    remove(folder)
    assert look(tmp_path) == look(tmp_path / "none") == []


FOUND = (Found(KEY, 4, 30), Found(OTHER, 4, 10), Found(THIRD, 4, 20))


@pytest.mark.parametrize(
    ("recent", "busy", "limit", "gone"),
    [
        ([], [], 12, []),
        ([], [], 11, [OTHER]),
        ([], [], 7, [OTHER, THIRD]),
        ([], [], 0, [OTHER, THIRD, KEY]),
        ([OTHER], [], 8, [THIRD]),
        ([KEY, OTHER], [], 4, [THIRD, KEY]),
        ([], [OTHER], 8, [THIRD]),
        ([KEY, OTHER, THIRD], [KEY, THIRD], 0, [OTHER]),
    ],
)
def test_those_used_longest_ago_go_and_never_one_that_is_busy(recent, busy, limit, gone):
    assert surplus(FOUND, recent, busy, limit) == gone


def test_half_written_ones_go_unless_somebody_writes_them():
    found = (Found(KEY + ".new", 4, 1), Found(OTHER + ".new", 4, 1), Found(OTHER, 4, 1))
    assert surplus(found, [], [OTHER], 100) == [KEY + ".new"]
