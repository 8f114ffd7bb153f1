import os

import pytest

from sllm_node.bench.files import PageCache, prepare_source, read_at
from sllm_node.core.errors import BenchError
from tests.unit.bench.rig import no_drop


def test_copies_are_real_copies(files):
    first, second = (one.all() for one in files)
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one.stat().st_ino != other.stat().st_ino
    assert first[0].read_bytes() == second[0].read_bytes()


def test_a_source_is_converted_and_not_copied(files, tmp_path):
    found = prepare_source(files[0].folder, tmp_path, 1)
    assert found[0].folder == files[0].folder
    assert found[0].model == "tiny-0-0"
    assert found[0].size == files[0].size


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(BenchError, match="holds no"):
        prepare_source(tmp_path, tmp_path / "store", 1)


def test_without_the_right_to_drop_all_the_files_are_dropped(files, tmp_path):
    cache = no_drop(tmp_path)
    cache.drop(files[0].all())
    assert "one by one" in cache.way


def test_the_whole_page_cache_is_dropped_where_that_is_allowed(tmp_path):
    cache = PageCache(tmp_path / "drop_caches")
    cache.drop([])
    assert (tmp_path / "drop_caches").read_text() == "3"
    assert "whole" in cache.way


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(BenchError, match="ends at byte 3"):
            read_at(descriptor, memoryview(bytearray(8)), 0)
    finally:
        os.close(descriptor)
