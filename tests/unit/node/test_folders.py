"""What a folder allows, tried in real folders."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from sllm_node.node.folders import look, reading_problem


def test_a_folder_that_is_there_can_be_written_and_nothing_is_left_behind(tmp_path):
    found = look(tmp_path)
    assert (found.exists, found.problem, found.place) == (True, None, tmp_path)
    assert found.free is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_judged_by_the_one_above_it(tmp_path):
    found = look(tmp_path / "a" / "b")
    assert (found.exists, found.problem, found.place) == (False, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_fatal(tmp_path):
    (tmp_path / "a").write_text("")
    found = look(tmp_path / "a" / "b")
    assert found.is_fatal
    assert found.problem == f"{tmp_path / 'a'} is no folder"


def test_a_link_that_leads_nowhere_is_fatal(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    assert look(tmp_path / "a").problem == f"{tmp_path / 'a'} leads nowhere"


def test_where_no_file_can_be_made_the_problem_is_told():
    found = look(Path("/proc/self/none"))
    assert found.is_fatal
    assert "can't be made in /proc/self" in str(found.problem)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_is_told_as_that(tmp_path):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False)
    if done.returncode:
        pytest.skip("no mounts here")
    try:
        with suppress(OSError), (tmp_path / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        found = look(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (found.is_full, found.is_fatal, found.exists) == (True, False, True)
    assert "no space left" in str(found.problem)


def test_a_file_that_is_not_there_can_not_be_read(tmp_path):
    assert reading_problem(tmp_path / "x") == "can't be read: no such file or directory"
    (tmp_path / "x").write_text("")
    assert reading_problem(tmp_path / "x") is None
