"""What a folder allows, tried in real folders."""

from pathlib import Path

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


def test_a_file_that_is_not_there_can_not_be_read(tmp_path):
    assert reading_problem(tmp_path / "x") == "can't be read: no such file or directory"
    (tmp_path / "x").write_text("")
    assert reading_problem(tmp_path / "x") is None
