import errno
import mmap
import os
import threading

import pytest

from sllm_node.checkpoint.cards import Cards, clear, read_bits
from sllm_node.core.errors import CheckpointChangedError
from sllm_node.core.types import ModelId
from sllm_node.store import remote_disk
from sllm_node.store.remote_disk import CardDisk, Writers
from tests.unit.store.handmade import CHUNK, write_checkpoint

A = ModelId("a")


@pytest.fixture
def cards(tmp_path):
    write_checkpoint(tmp_path / "far", "a")
    made = Cards(tmp_path)
    index = (tmp_path / "far" / "a" / "tensor_index.json").read_bytes()
    made.write(A, "r", {"tensor_index.json": index})
    return made


def page(data):
    view = memoryview(mmap.mmap(-1, CHUNK))
    view[:] = data * CHUNK
    return view


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_and_flushed_is_there(cards, direct):
    card = cards.get(A)
    disk = CardDisk(card, direct=direct)
    disk.write(1, page(b"x"), CHUNK)
    disk.flush([False] * 6 + [True, False])
    disk.close()
    assert (card.path / "shard-00001.bin").read_bytes()[CHUNK : 2 * CHUNK] == b"x" * CHUNK
    assert read_bits(card.path, card.index) == [False] * 6 + [True, False]


def test_who_writes_for_a_card_that_was_cleared_writes_to_nothing(cards):
    disk = CardDisk(cards.get(A), direct=False)
    clear(cards.get(A).path)
    card = cards.get(A)
    disk.write(0, page(b"x"), 0)
    disk.flush([True] * 8)
    disk.close()
    assert read_bits(card.path, card.index) == [False] * 8
    assert (card.path / "shard-00000.bin").read_bytes() == bytes(5 * CHUNK)


def test_shards_that_were_replaced_are_not_opened(cards):
    card = cards.get(A)
    held = (card.path / "shard-00000.bin").open("rb")
    clear(card.path)
    cards.get(A)
    with pytest.raises(CheckpointChangedError, match="was replaced"):
        CardDisk(card, direct=False)
    held.close()


def test_a_card_without_its_files_can_not_be_opened(cards):
    card = cards.get(A)
    clear(card.path)
    with pytest.raises(FileNotFoundError):
        CardDisk(card, direct=True)


def test_a_file_system_without_direct_io_is_written_through_the_page_cache(tmp_path, monkeypatch):
    real = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "open", refuses)
    os.close(remote_disk._open(tmp_path / "file", direct=True))


def test_a_writer_takes_a_copy_while_a_buffer_is_free():
    writers = Writers(1, 1, CHUNK)
    begun, go_on, written = threading.Event(), threading.Event(), []

    def write(view):
        begun.set()
        go_on.wait()
        written.append(bytes(view))

    view = page(b"a")
    assert writers.write_later(view, write)
    view[:] = b"b" * CHUNK
    begun.wait()
    assert not writers.write_later(view, write)
    go_on.set()
    writers.close()
    assert written == [b"a" * CHUNK]
    writers.do_later(lambda: written.append(b"after the end"))
    assert len(written) == 1


def test_what_is_larger_than_a_buffer_is_the_callers_to_write():
    writers = Writers(1, 1, 4096)
    assert not writers.write_later(page(b"a"), lambda view: None)
    writers.close()
