"""What a folder allows, found out by trying: is it there, can it be made and written, does direct I/O work.

What is tried leaves nothing behind: the file has no name (O_TMPFILE), or is deleted at once.
"""

import errno
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sllm_node.core.units import PAGE

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Look:
    """What was found of a folder."""

    exists: bool
    place: Path
    """The folder itself, or the nearest one above it that is there."""
    problem: str | None = None
    """Why nothing can be written there."""
    is_fatal: bool = False
    """It is no folder, or can neither be read nor made."""
    is_full: bool = False
    """Nothing can be written because there is no room; what is there can be opened."""
    free: int | None = None
    is_direct: bool | None = None
    """Whether direct I/O works; None: it could not be tried."""


def look(path: Path) -> Look:
    """Look at a folder that may not be there yet."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    exists = place == path
    if not place.is_dir():
        what = f"{place} is no folder" if place.exists() else f"{place} leads nowhere"
        return Look(exists, place, what, is_fatal=True)
    free = shutil.disk_usage(place).free
    if exists and not os.access(path, os.R_OK | os.X_OK):
        return Look(exists, place, "can't be read", is_fatal=True, free=free)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            is_direct = _is_direct(file.fileno())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        problem = f"can't be written: {reason}"
        if not exists:
            problem = f"is not there and can't be made in {place}: {reason}"
        is_full = error.errno in _FULL
        return Look(exists, place, problem, is_fatal=not exists, is_full=is_full, free=free)
    return Look(exists, place, free=free, is_direct=is_direct)


def reading_problem(path: Path) -> str | None:
    """Return why a file can't be read; None: it can."""
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"can't be read: {(error.strerror or str(error)).lower()}"


def _is_direct(descriptor: int) -> bool:
    """Tell whether the file behind `descriptor` can be read past the page cache."""
    os.write(descriptor, bytes(PAGE))
    os.fsync(descriptor)
    with mmap.mmap(-1, PAGE) as page:
        try:
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            return os.preadv(again, [page], 0) == PAGE
        except OSError:
            return False
        finally:
            os.close(again)
