"""How a checkpoint gets to disk whole or not at all.

Everything is written into a hidden temporary folder (see `temporary.py`), flushed, and made visible
by one rename.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from sllm_node.checkpoint.belongings import in_the_way
from sllm_node.checkpoint.catalog import may_go
from sllm_node.core.errors import StorageWriteError, StoreFullError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class OutputFiles(Protocol):
    """The system calls that writing a checkpoint is made of."""

    def create(self, path: Path) -> int:
        """Return a descriptor of a new file."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`, at least a byte, and return how many bytes."""

    def sync(self, descriptor: int) -> None:
        """Return when all bytes of the file, or all names in the folder, are on the disk."""

    def rename(self, source: Path, destination: Path) -> None:
        """Give the folder `source` the name `destination`, which no folder with files has."""

    def exchange(self, one: Path, other: Path) -> None:
        """Let two folders swap names, at no moment leaving either name without a folder."""

    def free_bytes(self, folder: Path) -> int:
        """Return the bytes that may be written to the file system of `folder`."""


class DiskFiles:
    """The calls as the system offers them."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, source: Path, destination: Path) -> None:
        source.rename(destination)

    def exchange(self, one: Path, other: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        result = library.renameat2(
            _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
        )
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(other))

    def free_bytes(self, folder: Path) -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


def write_all(files: OutputFiles, descriptor: int, data: memoryview) -> None:
    """Write all of `data`; one system call stops at 2,147,479,552 bytes, or earlier."""
    while data:
        data = data[files.write(descriptor, data) :]


@dataclass(slots=True)
class SpaceNeeded:
    """Bytes that a checkpoint takes, as soon as that is known."""

    size: int = 0

    def require(self, size: int, store: Path, files: OutputFiles) -> None:
        """Note that `size` bytes are needed, and check that they fit into `store`.

        Raises:
            StoreFullError: they don't.
        """
        self.size = size
        free = files.free_bytes(store)
        if size > free:
            raise StoreFullError(str(store), size, free)


@contextmanager
def write_errors_named(store: Path, needed: SpaceNeeded, files: OutputFiles) -> Iterator[None]:
    """Turn what the system says inside into our errors.

    Raises:
        StoreFullError: there is no room.
        StorageWriteError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFullError(str(store), needed.size, files.free_bytes(store)) from error
        problem = error.strerror or str(error)
        raise StorageWriteError(str(error.filename or store), problem) from error


def publish(folder: Path, destination: Path, files: OutputFiles, *, replace: bool) -> None:
    """Flush `folder` with its files and give it the name `destination`.

    With `replace` a folder of that name ends up under the name of `folder`, with all that is in it:
    `check_still_ours` before.
    """
    for path in sorted(folder.iterdir()):
        _sync_path(path, files)
    _sync_path(folder, files)
    if replace and destination.exists():
        files.exchange(folder, destination)
    else:
        files.rename(folder, destination)
    _sync_path(destination.parent, files)


def linked(destination: Path) -> Path:
    """Return where links lead that `destination` is, or lies behind.

    What is replaced is replaced there: to exchange a link would leave what it leads to.
    """
    return Path(os.path.realpath(destination))


def check_still_ours(destination: Path) -> None:
    """Make sure that what has the name `destination` by now may be replaced.

    Raises:
        StorageWriteError: it is no checkpoint, or has what is no part of one.
    """
    if not destination.exists():
        return
    problem = in_the_way(destination)
    if not may_go(destination):
        problem = "what was put there meanwhile is no checkpoint, and left alone; use another name"
    if problem is not None:
        raise StorageWriteError(str(destination), problem)


def _sync_path(path: Path, files: OutputFiles) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.sync(descriptor)
    finally:
        os.close(descriptor)
