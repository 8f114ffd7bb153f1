import errno
import subprocess
import sys
from pathlib import Path

import pytest

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.output import check_still_ours
from sllm_node.checkpoint.verify import verify
from sllm_node.core.errors import StorageWriteError, StoreFullError
from tests.unit.checkpoint.raw import CountedFiles, FullDisk, write_raw

ROOT = Path(__file__).parents[3]
KILLED_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from tests.unit.checkpoint.raw import CountedFiles, write_raw

store, replace = Path(sys.argv[1]), sys.argv[2] == "replace"
whole = CountedFiles(lambda count: None)
write_raw(store / "whole", files=whole)
for last in range(1, whole.count + 1):
    place = store / str(last)
    if replace:
        write_raw(place, chunk_bytes=8192)
    child = os.fork()
    if child == 0:
        def at(count):
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        write_raw(place, files=CountedFiles(at), replace=replace)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL, (last, status)
print(whole.count)
"""


def kill_at_every_call(store, mode):
    """Write checkpoints into folders 1, 2, …, killed before the call of that number."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(store), mode],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [store / str(number) for number in range(1, int(done.stdout) + 1)]


def usable(store):
    catalog = Catalog(store)
    catalog.scan()
    assert catalog.problems == {}
    return [catalog.get(model) for model in catalog.models()]


def test_a_writer_killed_at_any_call_leaves_no_checkpoint_or_a_whole_one(tmp_path):
    found = [usable(store) for store in kill_at_every_call(tmp_path, "new")]
    assert all(verify(checkpoint) == [] for checkpoints in found for checkpoint in checkpoints)
    counts = [len(checkpoints) for checkpoints in found]
    assert counts == sorted(counts)
    assert {0, 1} == set(counts)


def test_a_replacement_killed_at_any_call_leaves_the_old_or_the_new_one(tmp_path):
    stores = kill_at_every_call(tmp_path, "replace")
    found = [checkpoint for store in stores for checkpoint in usable(store)]
    assert len(found) == len(stores)
    assert all(verify(checkpoint) == [] for checkpoint in found)
    assert {checkpoint.index.chunk_bytes for checkpoint in found} == {4096, 8192}


def test_a_disk_known_to_be_too_small_is_refused_before_a_byte_is_written(tmp_path):
    with pytest.raises(StoreFullError) as caught:
        write_raw(tmp_path, files=FullDisk(room=0, claimed=10_000))
    assert (caught.value.needed, caught.value.free) == (20480, 10_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing_and_says_what_is_needed(tmp_path, number):
    with pytest.raises(StoreFullError, match="needs 20480 bytes and 1048576 are free"):
        write_raw(tmp_path, files=FullDisk(10_000, number, claimed=1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_nothing_and_is_a_typed_error(tmp_path):
    with pytest.raises(StorageWriteError, match="Input/output error"):
        write_raw(tmp_path, files=FullDisk(10_000, errno.EIO))
    assert list(tmp_path.iterdir()) == []


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path):
    first = write_raw(tmp_path)
    with pytest.raises(StorageWriteError):
        write_raw(tmp_path, chunk_bytes=8192)
    assert usable(tmp_path) == [first]


def test_a_replacement_leaves_nothing_of_the_old_one(tmp_path):
    write_raw(tmp_path)
    new = write_raw(tmp_path, chunk_bytes=8192, replace=True)
    assert usable(tmp_path) == [new]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_every_file_and_both_folders_are_flushed_before_and_after_the_rename(tmp_path):
    calls = []

    class Recorded(CountedFiles):
        def sync(self, descriptor):
            calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        def rename(self, source, destination):
            calls.append("rename")
            super().rename(source, destination)

    write_raw(tmp_path, files=Recorded(lambda count: None))
    at = calls.index("rename")
    assert calls[at + 1 :] == [tmp_path.name]
    assert calls[at - 1].startswith(".sllm-tmp-m-")
    assert {"shard-00000.bin", "shard-00001.bin", "tensor_index.json"} < set(calls[:at])


def test_an_exchange_the_system_refuses_is_a_typed_error(tmp_path):
    class Refusing(CountedFiles):
        def exchange(self, one, other):
            super().exchange(one, other / "missing")

    old = write_raw(tmp_path)
    with pytest.raises(StorageWriteError, match="No such file"):
        write_raw(tmp_path, replace=True, files=Refusing(lambda count: None))
    assert usable(tmp_path) == [old]


def test_what_was_put_into_a_checkpoint_meanwhile_is_not_deleted_with_it(tmp_path):
    folder = write_raw(tmp_path).path
    check_still_ours(folder)
    check_still_ours(tmp_path / "nothing")
    (folder / "optimizer.pt").write_text("mine")
    with pytest.raises(StorageWriteError, match=r"would be deleted with it: optimizer\.pt"):
        check_still_ours(folder)
