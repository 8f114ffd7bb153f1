"""What must survive a restart, on this node's disk: one SQLite file behind one thread.

Theory of operation. `write` returns when its changes are on the disk (write-ahead log, synchronised
with every commit), all of them or none; then, and only then, `records` has them. So a node that is
killed comes back with all that was acknowledged, and of what was not with a prefix. One process at a
time has the file (an exclusive lock). Everything is read at start and kept in memory: nothing that
serves waits for this file.

A damaged file never keeps a node from starting: it is set aside beside itself, and `damage` says so.
One that a newer release wrote is refused, because what it holds is not lost.
"""

import asyncio
import fcntl
import logging
import os
import sqlite3
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path
from typing import Final

from sllm_node.cluster.records import FIELDS, RECORDS_MAX, Change, Drop, Put, Record, Records, check
from sllm_node.core.errors import (
    JournalDamagedError,
    JournalError,
    JournalFullError,
    JournalVersionError,
)

log = logging.getLogger(__name__)

APPLICATION_ID: Final = 0x534C4C4D
"""In the file's header: it is ours."""
SET_ASIDE_MAX: Final = 9
"""Damaged files that are kept; another one takes the place of the last."""
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FLOCK: Final = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux."""
_OFD_GETLK: Final = 36
_SHARED_RANGE: Final = (0x40000002, 510)
"""The bytes of a database that SQLite locks for whoever reads it (sqlite3's os.h, SHARED_FIRST)."""
TAKEN: Final = (
    "another process has it: a node of this id runs here already; nodes that share a store need ids of "
    "their own (node.id)"
)
_LOCKED: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_BESIDE: Final = ("", "-wal", "-shm", "-journal")

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "CREATE TABLE pins (model TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID",
        "CREATE TABLE aliases (name TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE registrations (model TEXT PRIMARY KEY NOT NULL, url TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE desired (model TEXT PRIMARY KEY NOT NULL, minimum INTEGER NOT NULL,
        maximum INTEGER NOT NULL, keep_alive_s REAL NOT NULL,
        CHECK (0 <= minimum AND minimum <= maximum AND keep_alive_s >= 0)) WITHOUT ROWID""",
        "CREATE TABLE peers (node TEXT PRIMARY KEY NOT NULL, address TEXT NOT NULL) WITHOUT ROWID",
    ),
    (
        """CREATE TABLE wished (what TEXT PRIMARY KEY NOT NULL, at_ms INTEGER NOT NULL,
        node TEXT NOT NULL) WITHOUT ROWID""",
    ),
)
"""Statements from each version of the schema to the next; a file's version is how many it has seen."""


class Journal:
    """The records of one node. `await Journal.open(path)`, then `records` and `write`."""

    def __init__(self, file: "_File", thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._thread = thread
        self._records = file.records
        self._is_open = True

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> "Journal":
        """Open or make the journal.

        Raises:
            JournalError: another process has it, the disk refuses, or a newer release wrote it.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        try:
            file = await asyncio.get_running_loop().run_in_executor(
                thread, lambda: _open(path, migrations)
            )
        except BaseException:
            thread.shutdown(wait=False)
            raise
        if file.damage is not None:
            log.warning("journal set aside", extra={"problem": str(file.damage)})
        return cls(file, thread)

    @property
    def records(self) -> Records:
        """All that is on the disk."""
        return self._records

    @property
    def damage(self) -> JournalDamagedError | None:
        """What was found damaged at start, and where it lies now."""
        return self._file.damage

    async def write(self, *changes: Change) -> None:
        """Make `changes`, all or none; when this returns, they survive.

        A caller that is cancelled meanwhile does not undo them.

        Raises:
            InvalidRequestError: a record that no operator can have meant.
            JournalFullError: too many records of a kind.
            JournalError: the disk refuses.
        """
        assert self._is_open, "write before close"
        for change in changes:
            if isinstance(change, Put):
                check(change.record)
        loop = asyncio.get_running_loop()
        written = loop.run_in_executor(self._thread, self._file.write, changes)
        written.add_done_callback(self._take)
        await asyncio.shield(written)

    async def close(self) -> None:
        """Finish what is being written, and give the file back."""
        if not self._is_open:
            return
        self._is_open = False
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close)
        self._thread.shutdown(wait=False)

    def _take(self, written: asyncio.Future[Records]) -> None:
        if not written.cancelled() and written.exception() is None:
            self._records = written.result()


class _File:
    """The database, used by one thread; what it holds is in `records`, too."""

    def __init__(
        self, path: Path, migrations: Sequence[Sequence[str]], damage: JournalDamagedError | None
    ) -> None:
        self._path = path
        self._connection, self.records = _connect(path, migrations)
        self.damage = damage

    def write(self, changes: Sequence[Change]) -> Records:
        records = self.records
        for change in changes:
            records = records.after(change)
        for kind in FIELDS:
            if len(records.of(kind)) > RECORDS_MAX:
                raise JournalFullError(str(self._path), FIELDS[kind], RECORDS_MAX)
        try:
            _in_transaction(self._connection, lambda: self._execute(changes))
        except sqlite3.Error as error:
            raise _named(self._path, error) from error
        self.records = records
        return records

    def close(self) -> None:
        self._connection.close()

    def _execute(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._connection.execute(*_statement(change))


def _statement(change: Change) -> tuple[str, tuple[object, ...]]:
    match change:
        case Put(record):
            names = [field.name for field in fields(record)]
            marks = ", ".join("?" for _ in names)
            table = FIELDS[type(record)]
            columns = ", ".join(names)
            # Names of ours, no input: the values go by marks.
            return f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})", astuple(record)  # noqa: S608
        case Drop(kind, key):
            first = fields(kind)[0].name
            return f"DELETE FROM {FIELDS[kind]} WHERE {first} = ?", (key,)  # noqa: S608


def _open(path: Path, migrations: Sequence[Sequence[str]]) -> _File:
    """Open the file; if it is damaged, set it aside and begin a new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(str(path), f"its folder can't be made: {error.strerror}") from error
    try:
        return _File(path, migrations, None)
    except sqlite3.Error as error:
        if not _is_damage(error):
            raise _named(path, error) from error
        damage = JournalDamagedError(str(path), str(error), str(_set_aside(path)))
    try:
        return _File(path, migrations, damage)
    except sqlite3.Error as error:
        raise _named(path, error) from error


def _connect(path: Path, migrations: Sequence[Sequence[str]]) -> tuple[sqlite3.Connection, Records]:
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path, migrations)
        return connection, _read(connection)
    except BaseException:
        connection.close()
        raise


def _prepare(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]
) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application not in (0, APPLICATION_ID) or (application == 0) != (version == 0):
        raise _damaged("is a database of another program")
    if version > len(migrations):
        raise JournalVersionError(str(path), version, len(migrations))
    found = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    if found != ["ok"]:
        raise _damaged("; ".join(found))
    for number, statements in enumerate(migrations[version:], version + 1):
        _in_transaction(connection, lambda n=number, s=statements: _migrate(connection, s, n))  # type: ignore[misc]


def _migrate(connection: sqlite3.Connection, statements: Sequence[str], version: int) -> None:
    for statement in statements:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")


def _in_transaction(connection: sqlite3.Connection, act: Callable[[], None]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        act()
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _read(connection: sqlite3.Connection) -> Records:
    records: dict[str, dict[str, Record]] = {}
    for kind, table in FIELDS.items():
        columns = ", ".join(field.name for field in fields(kind))
        try:
            rows = connection.execute(f"SELECT {columns} FROM {table}")  # noqa: S608 - names of ours
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
                raise _damaged(str(error)) from error  # its version says that the table is there
            raise
        made = [kind(*row) for row in rows]
        records[table] = {record.key: record for record in made}
    return Records(**records)  # type: ignore[arg-type]  # by kind, as FIELDS says


def _set_aside(path: Path) -> Path:
    """Move the file, and what belongs to it, to a free name beside it; return that."""
    names = [Path(f"{path}.damaged-{i}") for i in range(1, SET_ASIDE_MAX + 1)]
    aside = next((name for name in names if not name.exists()), names[-1])
    for suffix in _BESIDE:
        try:
            Path(f"{path}{suffix}").replace(f"{aside}{suffix}")
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"is damaged, and can't be set aside: {error.strerror}"
            raise JournalError(str(path), problem) from error
    return aside


def _damaged(problem: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(problem)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_taken(path: Path) -> bool:
    """Tell whether another process has the journal, by its lock: opening it could leave files beside it."""
    try:
        with path.open("rb") as file:
            asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, *_SHARED_RANGE, 0)
            answer = fcntl.fcntl(file, _OFD_GETLK, asked)
    except OSError:
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _is_damage(error: sqlite3.Error) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGE


def _named(path: Path, error: sqlite3.Error) -> JournalError:
    code: int = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in _LOCKED:
        return JournalError(str(path), TAKEN)
    if code & 0xFF == sqlite3.SQLITE_FULL:
        problem = f"{error}; make room there, or set node.journal to a file on another disk"
        return JournalError(str(path), problem)
    return JournalError(str(path), str(error))
