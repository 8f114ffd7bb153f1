import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from sllm_node.cluster.journal import MIGRATIONS, SET_ASIDE_MAX, Journal, _named
from sllm_node.cluster.records import (
    Alias,
    Desired,
    Drop,
    KnownPeer,
    Pin,
    Put,
    Registration,
    Wished,
)
from sllm_node.core.errors import (
    InvalidRequestError,
    JournalDamagedError,
    JournalError,
    JournalVersionError,
)
from sllm_node.core.types import ModelId, NodeId

M, N = ModelId("m"), ModelId("n")
ALL = (
    Pin(M),
    Alias("latest", M),
    Registration(M, "s3://bucket/models"),
    Desired(M, 1, 3, 60.0),
    KnownPeer(NodeId("b"), "10.0.0.2:8100"),
    Wished("alias latest", 1_700_000_000_000, NodeId("b")),
)
CHILD = """
import asyncio, sys
from pathlib import Path
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.records import Alias, Pin, Put

async def main():
    journal = await Journal.open(Path(sys.argv[1]))
    for i in range(100_000):
        await journal.write(Put(Pin(f"m{i}")), Put(Alias(f"a{i}", f"m{i}")))
        print(i, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal.sqlite"


async def reopened(path, journal):
    await journal.close()
    return await Journal.open(path)


async def test_every_kind_of_record_is_there_after_a_restart(path):
    journal = await Journal.open(path)
    await journal.write(*(Put(record) for record in ALL))
    journal = await reopened(path, journal)
    kinds = (type(record) for record in ALL)
    assert [next(iter(journal.records.of(kind).values())) for kind in kinds] == list(ALL)
    assert journal.damage is None
    await journal.close()


async def test_a_later_record_replaces_and_a_drop_removes(path):
    journal = await Journal.open(path)
    await journal.write(Put(Desired(M, 0, 1)), Put(Pin(M)), Put(Pin(N)))
    await journal.write(Put(Desired(M, 2, 4)), Drop(Pin, "m"), Drop(Pin, "unknown"))
    journal = await reopened(path, journal)
    assert journal.records.desired == {"m": Desired(M, 2, 4)}
    assert list(journal.records.pins) == ["n"]
    await journal.close()


@pytest.mark.parametrize(
    "record",
    [
        Pin(ModelId("")),
        Alias("m", M),
        Registration(M, "ftp://x"),
        Desired(M, 3, 2),
        Desired(M, -1, 2),
        Desired(M, 0, 1, float("nan")),
        KnownPeer(NodeId("b"), ""),
    ],
)
async def test_nonsense_is_refused_and_nothing_of_its_write_stays(path, record):
    journal = await Journal.open(path)
    with pytest.raises(InvalidRequestError):
        await journal.write(Put(Pin(N)), Put(record))
    assert journal.records.pins == {}
    await journal.close()


async def test_a_cancelled_writer_leaves_memory_and_disk_agreeing(path):
    journal = await Journal.open(path)
    writer = asyncio.create_task(journal.write(Put(Pin(M))))
    await asyncio.sleep(0)
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    await journal.write(Put(Pin(N)))
    before = journal.records
    journal = await reopened(path, journal)
    assert journal.records == before
    assert set(before.pins) == {"m", "n"}
    await journal.close()


@pytest.mark.parametrize("acknowledged", [1, 7, 60])
async def test_a_killed_node_keeps_what_was_acknowledged_and_a_prefix_of_the_rest(
    path, acknowledged
):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    seen = [int(child.stdout.readline()) for _ in range(acknowledged)]
    os.kill(child.pid, signal.SIGKILL)
    seen += [int(line) for line in child.stdout if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    journal = await Journal.open(path)
    count = len(journal.records.pins)
    assert journal.damage is None
    assert seen == list(range(len(seen)))
    assert count in (len(seen), len(seen) + 1)
    assert set(journal.records.pins) == {f"m{i}" for i in range(count)}
    assert set(journal.records.aliases) == {f"a{i}" for i in range(count)}, "all of a write or none"
    await journal.close()


async def test_a_second_process_is_told_that_the_file_is_taken(path):
    journal = await Journal.open(path)
    with pytest.raises(JournalError, match="another process has it"):
        await Journal.open(path)
    await journal.write(Put(Pin(M)))
    await journal.close()


def spoil_header(path):
    path.write_bytes(b"not a database at all" * 100)


def spoil_pages(path):
    content = bytearray(path.read_bytes())
    content[4096 : len(content)] = os.urandom(len(content) - 4096)
    path.write_bytes(bytes(content))


def foreign(path):
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.execute("PRAGMA application_id = 7")
    connection.close()


def lost_table(path):
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE aliases")
    connection.close()


@pytest.mark.parametrize("spoil", [spoil_header, spoil_pages, foreign, lost_table])
async def test_a_damaged_file_is_set_aside_and_the_node_starts(path, spoil):
    journal = await Journal.open(path)
    await journal.write(*(Put(record) for record in ALL))
    await journal.close()
    spoil(path)
    content = path.read_bytes()
    journal = await Journal.open(path)
    assert isinstance(journal.damage, JournalDamagedError)
    assert journal.records.pins == {}
    aside = path.parent / "journal.sqlite.damaged-1"
    assert aside.read_bytes()[4096:] == content[4096:]
    assert str(aside) in str(journal.damage)
    await journal.write(Put(Pin(M)))
    journal = await reopened(path, journal)
    assert (journal.damage, list(journal.records.pins)) == (None, ["m"])
    await journal.close()


async def test_damaged_files_do_not_pile_up(path):
    path.parent.mkdir()
    for i in range(SET_ASIDE_MAX + 3):
        path.write_bytes(b"%04d" % i * 1000)
        await (await Journal.open(path)).close()
    left = sorted(file.name for file in path.parent.glob("*.damaged-?"))
    assert len(left) == SET_ASIDE_MAX
    last = path.parent / f"journal.sqlite.damaged-{SET_ASIDE_MAX}"
    assert last.read_bytes()[:4] == b"%04d" % (SET_ASIDE_MAX + 2)


async def test_a_newer_releases_file_is_refused_and_left_as_it_is(path):
    await (await Journal.open(path, (*MIGRATIONS, ("CREATE TABLE more (x)",)))).close()
    with pytest.raises(JournalVersionError):
        await Journal.open(path)
    assert [file.name for file in path.parent.iterdir()] == ["journal.sqlite"]


async def test_an_older_file_is_migrated_and_keeps_its_records(path):
    journal = await Journal.open(path)
    await journal.write(*(Put(record) for record in ALL))
    await journal.close()
    newer = (*MIGRATIONS, ("ALTER TABLE pins ADD COLUMN why TEXT", "CREATE TABLE more (x)"))
    journal = await Journal.open(path, newer)
    assert list(journal.records.pins) == ["m"]
    await journal.close()
    await (await Journal.open(path, newer)).close()


async def test_aliases_of_the_first_release_with_a_journal_are_read(path):
    old = await Journal.open(path)
    await old.write(Put(Alias("latest", M)))
    await old.close()
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("DROP TABLE wished")
        file.execute("PRAGMA user_version = 1")
    journal = await Journal.open(path)
    assert (journal.damage, dict(journal.records.wished)) == (None, {})
    assert journal.records.aliases == {"latest": Alias("latest", M)}
    await journal.close()


async def test_a_migration_that_fails_changes_nothing(path):
    journal = await Journal.open(path)
    await journal.write(Put(Pin(M)))
    await journal.close()
    with pytest.raises(JournalError):
        await Journal.open(path, (*MIGRATIONS, ("CREATE TABLE more (x)", "nonsense")))
    journal = await Journal.open(path)
    assert (journal.damage, list(journal.records.pins)) == (None, ["m"])
    await journal.close()


async def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="folder"):
        await Journal.open(tmp_path / "file" / "journal.sqlite")


def test_a_full_disk_is_told_with_what_to_do_about_it(tmp_path):
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("CREATE TABLE x (y)")
    told = str(_named(tmp_path / "j", caught.value))
    assert "make room there, or set node.journal to a file on another disk" in told
