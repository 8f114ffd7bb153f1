"""Hidden folders in which checkpoints are made: how they are made, told from others' and swept.

Their names have a prefix that is ours alone. Who writes into one holds a lock on it, so that
whoever comes next can tell one that was left behind by a crash from one in use. Making one and taking
what was left exclude each other by a lock on the folder that they lie in; what was taken is deleted
when that lock is free again, under its own. An earlier prefix was `.tmp-`, which others have too: such
a folder is swept only if nothing is in it but a checkpoint, or some of one.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.index import INDEX_FILE

_PREFIX: Final = ".sllm-tmp-"
_NAME: Final = re.compile(r"\.sllm-tmp-.+-[0-9a-f]{8}")
_EARLIER_NAME: Final = re.compile(r"\.tmp-.+-[0-9a-f]{8}")
_SHARD_NAME: Final = re.compile(r"shard-[0-9]{5,}\.bin")


def temporary_path(store: Path, name: str) -> Path:
    """Return where in `store` something may be hidden that has, or had, the name `name`."""
    return store / f"{_PREFIX}{name}-{secrets.token_hex(4)}"


@contextmanager
def temporary_folder(store: Path, name: str) -> Iterator[Path]:
    """Make a locked hidden folder in `store`; what is left of it at the end is deleted.

    Folders that crashed writers left behind are deleted first.
    """
    store.mkdir(parents=True, exist_ok=True)
    with ExitStack() as own:
        with ExitStack() as taken:
            with _locked(store):
                left = _take(store, taken)
                folder = temporary_path(store, name)
                folder.mkdir()
                own.enter_context(_locked(folder))
            own.callback(shutil.rmtree, folder, ignore_errors=True)
            _delete(left)
        yield folder


def sweep(store: Path) -> list[str]:
    """Delete what crashed writers left in `store` and return the names; nothing if it is busy."""
    with ExitStack() as taken:
        try:
            with _locked_now(store):
                left = _take(store, taken)
        except OSError:
            return []
        return _delete(left)


@contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of `folder`, if it is a store's for moments only."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        try:
            yield
        finally:
            # To close is not enough: a process forked meanwhile has the descriptor, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _locked_now(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of `folder`; `BlockingIOError` if somebody else holds it."""
    return _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(store: Path, taken: ExitStack) -> list[Path]:
    """Lock, in `taken`, what crashed writers left in `store`, whose lock the caller holds.

    Of a link, which leads to what has other names, there is nothing to lock.
    """
    left = []
    for path in sorted(store.iterdir()):
        with suppress(OSError):
            if _is_ours(path):
                if not path.is_symlink():
                    taken.enter_context(_locked_now(path))
                left.append(path)
    return left


def _delete(left: list[Path]) -> list[str]:
    """Delete what was taken, which may take long; return the names of what is gone."""
    for path in left:
        if path.is_symlink():
            with suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left if not os.path.lexists(path)]


def _is_ours(path: Path) -> bool:
    if _NAME.fullmatch(path.name):
        return True
    return bool(_EARLIER_NAME.fullmatch(path.name)) and _is_some_checkpoint(path)


def _is_some_checkpoint(folder: Path) -> bool:
    """Tell whether files of a checkpoint are in `folder`, and no folder or link is."""
    found = list(folder.iterdir())
    if any(path.is_symlink() or not path.is_file() for path in found):
        return False
    return any(path.name == INDEX_FILE or _SHARD_NAME.fullmatch(path.name) for path in found)
