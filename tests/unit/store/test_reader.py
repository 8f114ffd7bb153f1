import errno
import logging
import mmap
import os
import threading

import pytest

from sllm_node.store.reader import Blocks, DirectFile, DirectFileSystem, close_shards

PAGE = 4096


@pytest.fixture
def page_view():
    return memoryview(mmap.mmap(-1, 4 * PAGE))


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "shard"
    made.write_bytes(os.urandom(3 * PAGE))
    return made


@pytest.mark.parametrize("direct", [True, False])
def test_bytes_are_read_and_the_end_is_short(path, page_view, direct):
    file = DirectFileSystem(direct=direct).open(path)
    assert file.read_into(page_view, PAGE) == 2 * PAGE
    assert bytes(page_view[: 2 * PAGE]) == path.read_bytes()[PAGE:]
    file.close()


@pytest.mark.parametrize(("start", "size", "offset"), [(1, PAGE, 0), (0, 100, 0), (0, PAGE, 7)])
def test_a_misaligned_read_is_a_programmers_error(path, page_view, start, size, offset):
    file = DirectFileSystem(direct=False).open(path)
    with pytest.raises(AssertionError):
        file.read_into(page_view[start : start + size], offset)
    file.close()


class Refuses(DirectFile):
    """A file whose file system takes O_DIRECT at open and refuses it when read."""

    def _preadv(self, view, offset):
        if self._is_direct():
            raise OSError(errno.EINVAL, "Invalid argument")
        return super()._preadv(view, offset)


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(path, page_view):
    refused = []
    file = Refuses(path, lambda path, error: refused.append(error), direct=True)
    assert file.read_into(page_view, 0) == 3 * PAGE
    assert bytes(page_view[: 3 * PAGE]) == path.read_bytes()
    assert refused
    file.close()


def test_missing_direct_io_is_told_once(path, caplog):
    system = DirectFileSystem()
    with caplog.at_level(logging.WARNING):
        system._warn(path, OSError(22, "Invalid argument"))
        system._warn(path, OSError(22, "Invalid argument"))
    assert [record.message for record in caplog.records] == [
        "no direct I/O here, reading through the page cache"
    ]


def test_an_error_on_close_is_of_no_interest(path):
    file = DirectFileSystem().open(path)
    file.close()
    close_shards((file,))


@pytest.mark.parametrize("block", [PAGE, 2 * PAGE, 8 * PAGE])
@pytest.mark.parametrize("direct", [True, False])
def test_reading_through_a_block_brings_the_same_bytes(path, page_view, direct, block):
    file = DirectFileSystem(direct=direct, block_bytes=block).open(path)
    assert file.read_into(page_view, 0) == 3 * PAGE
    assert bytes(page_view[: 3 * PAGE]) == path.read_bytes()
    assert file.read_into(page_view[: 2 * PAGE], PAGE) == 2 * PAGE
    assert bytes(page_view[: 2 * PAGE]) == path.read_bytes()[PAGE:]
    file.close()


def test_each_thread_reads_through_a_block_of_its_own():
    blocks, found = Blocks(PAGE), []
    threads = [threading.Thread(target=lambda: found.append(blocks.mine())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(block.obj) for block in found}) == 3
    assert blocks.mine() is blocks.mine()
