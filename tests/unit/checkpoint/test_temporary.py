import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sllm_node.checkpoint.temporary import _locked, sweep, temporary_folder
from sllm_node.checkpoint.verify import verify
from tests.unit.checkpoint.raw import write_raw

ROOT = Path(__file__).parents[3]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def leave(folder, *files):
    """Make what a writer that was killed leaves behind."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"half")
    return folder


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (".sllm-tmp-m-00000000", []),
        (".sllm-tmp-m-00000000", ["config.json"]),
        (".sllm-tmp-m-00000000", ["shard-00000.bin"]),
        # as the version before named them
        (".tmp-m-0000000a", ["config.json", "shard-00000.bin"]),
        (".tmp-m-0000000a", ["tensor_index.json", "card.json"]),
    ],
)
def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path, name, files):
    leave(tmp_path / name, *files)
    write_raw(tmp_path)
    assert names_in(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (".tmp-my-precious", ["thesis.txt"]),
        (".tmp-my-precious", ["tensor_index.json"]),
        (".tmp-backup-20261121", ["photos", "config.json"]),
        (".tmp-backup-20261121", []),
        (".sllm-tmp-mine", ["tensor_index.json"]),
    ],
)
def test_hidden_folders_of_other_programs_stay(tmp_path, name, files):
    leave(tmp_path / name, *files)
    write_raw(tmp_path)
    assert names_in(tmp_path) == [name, "m"]
    assert names_in(tmp_path / name) == sorted(files)


def test_a_folder_with_more_in_it_than_the_version_before_wrote_stays(tmp_path):
    left = leave(tmp_path / ".tmp-backup-20261121", "shard-00000.bin")
    leave(left / "photos", "one")
    write_raw(tmp_path)
    assert (left / "photos" / "one").is_file()


def test_the_folder_of_a_writer_at_work_is_not_swept(tmp_path):
    with temporary_folder(tmp_path, "one") as folder:
        write_raw(tmp_path, "other")
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_writer_waits_while_another_makes_its_folder(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code = (
        "from pathlib import Path; from tests.unit.checkpoint.raw import write_raw; "
        f"print('here', flush=True); write_raw(Path({str(tmp_path)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert list(tmp_path.iterdir()) == []
    os.close(descriptor)
    child.stdout.close()
    assert child.wait() == 0
    assert (tmp_path / "m").is_dir()


def test_a_sweep_tells_what_it_deleted_and_leaves_what_is_in_use(tmp_path):
    leave(tmp_path / ".sllm-tmp-m-00000000", "shard-00000.bin")
    leave(tmp_path / ".tmp-n-00000000", "shard-00000.bin")
    leave(tmp_path / ".tmp-my-precious", "thesis.txt")
    with temporary_folder(tmp_path / "other", "one") as folder:
        (folder / "shard-00000.bin").write_bytes(b"half")
        assert sweep(tmp_path) == [".sllm-tmp-m-00000000", ".tmp-n-00000000"]
        assert sweep(tmp_path / "other") == []
        assert names_in(folder) == ["shard-00000.bin"]
    assert names_in(tmp_path) == [".tmp-my-precious", "other"]


def test_a_sweep_waits_for_nobody_who_makes_a_folder(tmp_path):
    leave(tmp_path / ".sllm-tmp-m-00000000")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert sweep(tmp_path) == []
    os.close(descriptor)
    assert sweep(tmp_path) == [".sllm-tmp-m-00000000"]


def descriptors_of(folder):
    """Return copies of this process's descriptors of `folder`: what a process forked now has."""
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return [os.dup(n) for n in numbers if os.path.samestat(os.fstat(n), folder.stat())]


def is_locked(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_process_that_was_forked_meanwhile_keeps_no_lock(tmp_path):
    with _locked(tmp_path):
        children = descriptors_of(tmp_path)
    assert not is_locked(tmp_path)
    with temporary_folder(tmp_path, "m") as folder:
        children += descriptors_of(folder)
        folder.rename(tmp_path / "m")
        assert is_locked(tmp_path / "m")
    assert len(children) == 2
    assert not is_locked(tmp_path / "m")
    for descriptor in children:
        os.close(descriptor)


def test_what_was_left_is_deleted_when_the_lock_of_the_store_is_free_again(tmp_path, monkeypatch):
    left = leave(tmp_path / ".sllm-tmp-m-00000000", "shard-00000.bin")
    seen, delete = [], shutil.rmtree

    def look(folder, **options):
        if folder == left:
            seen.append((is_locked(tmp_path), is_locked(left)))
        delete(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    with temporary_folder(tmp_path, "n"):
        assert names_in(tmp_path)[0].startswith(".sllm-tmp-n-")
    assert seen == [(False, True)]


def test_a_sweep_of_a_folder_that_is_not_there_does_nothing(tmp_path):
    assert sweep(tmp_path / "nowhere") == []


def test_a_link_that_was_left_behind_is_swept_and_not_what_it_leads_to(tmp_path):
    made = write_raw(tmp_path / "disk")
    store = leave(tmp_path / "store")
    for name in (".tmp-m-0000000a", ".sllm-tmp-m-0000000a", ".tmp-m-20261121"):
        (store / name).symlink_to(made.path)
    leave(tmp_path / "photos", "one")
    (store / ".tmp-photos-20261121").symlink_to(tmp_path / "photos")
    assert len(sweep(store)) == 3
    assert names_in(store) == [".tmp-photos-20261121"]
    assert verify(made) == []
