"""Texts of peers' models on this node's disk: a folder each, written whole, read again after a restart.

Beside the texts lies what tells that they are all there, and undamaged. What an earlier release or a
crash left has no such file: it counts as not being here. A folder's time is that of its last use.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.core.errors import StorageWriteError

LIST_FILE: Final = "texts.json"
_NEW: Final = ".new"
_NAME: Final = re.compile(r"[0-9a-f]{32}(\.new)?")


class _Text(msgspec.Struct, frozen=True):
    name: str
    size: int
    digest: int


class _List(msgspec.Struct, frozen=True):
    context_tokens: int
    texts: tuple[_Text, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that is there."""

    name: str
    size: int
    used_ns: int


def write(folder: Path, context_tokens: int, files: dict[str, bytes]) -> None:
    """Write the texts whole or not at all; what lies there is the same checkpoint's.

    Raises:
        StorageWriteError: the file system's own.
    """
    texts = tuple(_Text(name, len(data), chunk_digest(data)) for name, data in files.items())
    told = msgspec.json.encode(_List(context_tokens, texts))
    temporary = folder.with_name(folder.name + _NEW)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in {**files, LIST_FILE: told}.items():
            (temporary / name).write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        path = str(error.filename or folder)
        raise StorageWriteError(path, error.strerror or str(error)) from error


def read(folder: Path) -> int | None:
    """Return the limit of tokens that came with the texts, and note the use; None: they are not all here."""
    try:
        told = msgspec.json.decode((folder / LIST_FILE).read_bytes(), type=_List)
        is_whole = all(_is_whole(folder, text) for text in told.texts)
    except (OSError, msgspec.MsgspecError):  # there is none, or it is damaged
        return None
    with suppress(OSError):  # a disk that takes nothing any more can still be read
        os.utime(folder)
    return told.context_tokens if is_whole else None


def look(root: Path) -> list[Found]:
    """Return the folders of texts in `root`, half written ones too; what else lies there is not ours."""
    found = []
    with suppress(OSError):
        for path in root.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    found.append(Found(path.name, size, path.stat().st_mtime_ns))
    return found


def surplus(
    found: Iterable[Found], recent: Sequence[str], busy: Collection[str], limit: int
) -> list[str]:
    """Return which folders go so that the rest have `limit` bytes at most: those used longest ago.

    `recent` were used in this life, the last one last. Those that are `busy` stay, whatever they have.
    """
    left = [one for one in found if one.name.removesuffix(_NEW) not in busy]
    gone = [one.name for one in left if one.name.endswith(_NEW)]
    rank = {name: place for place, name in enumerate(recent)}
    total = sum(one.size for one in found if one.name not in gone)
    for one in sorted(left, key=lambda one: (rank.get(one.name, -1), one.used_ns)):
        if total > limit and one.name not in gone:
            gone.append(one.name)
            total -= one.size
    return gone


def remove(folder: Path) -> None:
    """Delete a folder; what can't be deleted stays."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path, text: _Text) -> bool:
    data = (folder / text.name).read_bytes()
    return len(data) == text.size and chunk_digest(data) == text.digest
