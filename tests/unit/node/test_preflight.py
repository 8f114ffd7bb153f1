"""What a preflight says of a config, on a machine that is made up, in real folders."""

import socket
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field, replace

import pytest

from sllm_node.core.config import parse_config
from sllm_node.core.errors import DeviceError
from sllm_node.core.units import GIB
from sllm_node.node import folders
from sllm_node.node.machine import DeviceRoom, Memory, ThisMachine
from sllm_node.node.preflight import preflight


@dataclass
class FakeMachine:
    """Answers what it was told."""

    total: int = 64 * GIB
    available: int = 32 * GIB
    lock_limit: int | None = None
    taken: dict[int, str] = field(default_factory=dict)
    unwritable: dict[str, bool] = field(default_factory=dict)
    """Names of folders in which nothing can be written, and whether that is for want of room."""
    rooms: list[DeviceRoom] = field(default_factory=list)
    device_problem: str = ""

    def memory(self):
        return Memory(self.total, self.available)

    def lockable(self):
        return self.lock_limit

    def listen_problem(self, host, port):
        return self.taken.get(port)

    def look(self, folder):
        found = folders.look(folder)
        if not found.exists or folder.name not in self.unwritable:
            return found
        return replace(found, problem="can't be written", is_full=self.unwritable[folder.name])

    def devices(self, config):
        if self.device_problem:
            raise DeviceError(config.names[0], self.device_problem)
        return self.rooms


@pytest.fixture
def found(tmp_path):
    """Return what is found of a config, those that are well left out: level, key and line."""

    def run(text="", machine=None, mode=0o600):
        file = tmp_path / "node.toml"
        store = tmp_path / "models"
        file.write_text(f'[store]\npath = "{store}"\n{text}' if "[store]" not in text else text)
        file.chmod(mode)
        config = parse_config(file.read_text())
        made = list(preflight(config, file, machine or FakeMachine()))
        return [(one.level, one.about, one.line) for one in made if one.level != "ok"]

    return run


def only(lines):
    (line,) = lines
    return line


def test_a_good_machine_has_nothing_to_say_and_makes_no_folder(found, tmp_path):
    assert found() == []
    assert not (tmp_path / "models").exists()


def test_a_store_that_can_not_be_made_is_an_error_with_its_place(found, tmp_path):
    (tmp_path / "file").write_text("")
    lines = found(f'[store]\npath = "{tmp_path}/file/models"\n')
    assert [(level, key) for level, key, _ in lines] == [
        ("error", "store.path"), ("error", "node.journal"),
    ]  # fmt: skip
    assert f"{tmp_path}/file is no folder" in lines[0][2]


TAKEN = {8000: "address already in use"}


@pytest.fixture
def journal(tmp_path):
    """Where the journal of the node is, in a folder that is there."""
    path = tmp_path / "models" / ".journal" / "node-0.sqlite"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def held(journal):
    """The journal while somebody has it: as this process does, until it is looked at once."""
    with closing(sqlite3.connect(journal)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE one (x)")
        yield journal


@pytest.mark.usefixtures("held")
def test_a_journal_that_another_process_has_is_an_error(found):
    level, key, line = only(found())
    assert (level, key) == ("error", "node.journal")
    assert "need ids of their own (node.id)" in line


@pytest.mark.usefixtures("held")
def test_who_has_journal_and_port_is_the_node_that_runs(found):
    assert found("", FakeMachine(taken=TAKEN)) == []


def test_a_look_at_the_journal_leaves_nothing_behind(found, journal):
    with closing(sqlite3.connect(journal)) as other:
        other.execute("CREATE TABLE one (x)")
    assert found() == []
    assert [path.name for path in journal.parent.iterdir()] == ["node-0.sqlite"]


def test_a_store_that_can_not_be_written_serves_what_is_there(found, tmp_path, cluster):
    (tmp_path / "models").mkdir()
    away = f'[node]\njournal = "{tmp_path}/j/n.sqlite"\n'
    remote = '[remotes.r]\nurl = "http://h/x"\n'
    for text in (away, away + remote, cluster().replace("[node]\n", away)):
        level, key, line = only(found(text, FakeMachine(unwritable={"models": False})))
        assert (level, key) == ("warning", "store.path")
        assert "what is there is served" in line


@pytest.mark.parametrize(
    ("is_full", "is_there", "level"),
    [(True, True, "warning"), (True, False, "error"), (False, True, "error")],
)
def test_a_full_disk_keeps_no_node_from_a_journal_that_is_there(
    found, journal, is_full, is_there, level
):
    if is_there:
        journal.touch()
    line = only(found("", FakeMachine(unwritable={".journal": is_full})))
    assert line[:2] == (level, "node.journal")
    assert ("the node starts" in line[2]) == (level == "warning")


def test_who_listens_on_the_port_before_a_start_is_asked_nothing(found):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        text = f'pool_bytes = "32MiB"\n[server]\nport = {port}\nadmin_keys = ["secret"]\n'
        level, key, _ = only([one for one in found(text, ThisMachine()) if one[0] == "error"])
        assert (level, key) == ("error", "server.port")
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_damaged_checkpoints_and_models_that_are_not_there_are_warnings(found, tmp_path):
    (tmp_path / "models" / "broken").mkdir(parents=True)
    lines = found("[models.none]\npreload = true\n[models.broken]\npinned = true\n")
    assert [(level, key) for level, key, _ in lines] == [
        ("warning", "store.path"), ("warning", "models.none"),
    ]  # fmt: skip
    assert "checkpoint broken" in lines[0][2]


def test_a_folder_that_rm_would_not_delete_is_not_said_to_be_deleted(found, tmp_path):
    for name, file in (("broken", "tensor_index.json"), ("photos", "one.jpg")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / file).write_text("")
    broken, photos = (line for _, _, line in found() if "checkpoint " in line)
    assert "'sllm-node rm broken' deletes it" in broken
    assert "rm photos" not in photos


def test_a_pool_above_the_memory_is_an_error_and_above_what_is_free_a_warning(found):
    text = 'pool_bytes = "40GiB"\n'
    level, key, line = only(found(text))
    assert (level, key) == ("warning", "store.pool_bytes")
    assert "40.0 GiB of 64.0 GiB of memory, of which 32.0 GiB are free now" in line
    assert only(found(text, FakeMachine(total=40 * GIB)))[0] == "error"


@pytest.mark.usefixtures("held")
def test_what_the_node_that_runs_has_is_no_shortage(found):
    machine = FakeMachine(taken=TAKEN, available=GIB, rooms=[DeviceRoom("cuda:0", 70 * GIB, GIB)])
    assert found('[device]\nnames = ["cuda:0"]\n', machine) == []


def test_pool_and_cpu_devices_that_need_more_than_there_is_are_told(found):
    line = only(found('[device]\nmemory_bytes = "62GiB"\n'))
    assert line[:2] == ("warning", "device.memory_bytes")
    assert "66.0 GiB, more than there is" in line[2]


def test_the_limit_of_locked_memory_matters_for_gpus_only(found):
    machine = FakeMachine(lock_limit=1 << 20, rooms=[DeviceRoom("cuda:0", GIB, GIB)])
    assert found("", machine) == []
    line = only(found('[device]\nnames = ["cuda:0"]\n', machine))
    assert line[:2] == ("warning", "RLIMIT_MEMLOCK")


def test_a_gpu_that_is_not_there_is_an_error_and_too_little_room_a_warning(found):
    cuda = '[device]\nnames = ["cuda:0"]\n'
    line = only(found(cuda, FakeMachine(device_problem="there is no CUDA driver")))
    assert (line[0], "there is no CUDA driver" in line[2]) == ("error", True)
    line = only(found(cuda, FakeMachine(rooms=[DeviceRoom("cuda:0", 80 * GIB, 70 * GIB)])))
    assert line[:2] == ("warning", "device.names")
    assert "80.0 GiB asked, 70.0 GiB free; lower device.memory_bytes" in line[2]
    line = only(found(cuda, FakeMachine(rooms=[DeviceRoom("cuda:0", GIB // 4, GIB)])))
    assert "less than engine.kv_cache_bytes" in line[2]


def test_a_port_that_is_taken_is_an_error_that_says_how_to_find_who_has_it(found):
    level, _, line = only(found("", FakeMachine(taken=TAKEN)))
    assert (level, "('ss -ltnp' shows it)" in line) == ("error", True)


def test_keys_that_everybody_can_read_or_that_nobody_needs_are_warnings(found):
    keys = '[server]\nhost = "0.0.0.0"\napi_keys = ["a"]\n'
    lines = found(keys, mode=0o644)
    assert "LoadCredential= of the unit" in lines[0][2]
    assert [(level, key) for level, key, _ in lines] == [
        ("warning", "file"), ("warning", "server.admin_keys"),
    ]  # fmt: skip
    open_to_all = '[server]\nhost = "0.0.0.0"\nallow_unauthenticated_remote = true\n'
    assert only(found(open_to_all))[:2] == ("warning", "server.api_keys")


def test_the_key_of_a_remote_must_be_readable(found, tmp_path):
    line = only(found(f'[remotes.r]\nurl = "http://h/x"\nkey_file = "{tmp_path}/none"\n'))
    assert line[:2] == ("error", "remotes.r.key_file")


@pytest.fixture
def cluster(tmp_path):
    """Return what makes a cluster file and the config's tables for it."""

    def make(me="n1", key="0" * 64, mode=0o600):
        (tmp_path / "k").write_text(key)
        (tmp_path / "k").chmod(mode)
        file = tmp_path / "cluster.toml"
        file.write_text(
            '[[nodes]]\nid = "n1"\naddress = "10.0.0.1:8100"\n'
            '[[nodes]]\nid = "n2"\naddress = "10.0.0.2:8100"\n[trust]\nkey_file = "k"\n'
        )
        return f'[node]\nid = "{me}"\n[cluster]\nfile = "{file}"\n'

    return make


def test_a_node_in_order_in_its_cluster_is_well(found, cluster):
    assert found(cluster()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"me": "n9"}, "'n9' (node.id of this node's config) is missing; known: n1, n2"),
        ({"key": "short"}, "is not written in hexadecimal digits"),
        ({"mode": 0o644, "key": "short"}, "others can read or write it"),
    ],
)
def test_what_is_wrong_with_the_cluster_is_one_error_the_first_cause(found, cluster, options, said):
    level, key, line = only(found(cluster(**options)))
    assert (level, key) == ("error", "cluster.file")
    assert said in line


def test_an_address_that_is_not_of_this_machine_asks_for_cluster_listen(found, cluster):
    machine = FakeMachine(taken={8100: "cannot assign requested address"})
    level, key, line = only(found(cluster(), machine))
    assert (level, key) == ("error", "cluster.listen")
    assert 'cluster.listen, as in "0.0.0.0:8100"' in line
