"""Folders that library calls read and write: found, checked, and never replaced unasked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from os import PathLike, fspath
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from sllm_node.checkpoint.belongings import in_the_way
from sllm_node.checkpoint.catalog import (
    Catalog,
    Checkpoint,
    changed_shard,
    may_go,
    open_checkpoint,
)
from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import (
    ArgumentError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    SllmError,
)
from sllm_node.core.names import is_model_name
from sllm_node.core.types import ModelId
from sllm_node.core.units import parse_size

AnyPath = str | PathLike[str]
LoadP = ParamSpec("LoadP")
LoadedT = TypeVar("LoadedT")
_REPLACED_MAX: Final = 3
"""How often a load begins anew; who replaces a checkpoint takes longer than who opens it."""
Show = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def destination(directory: AnyPath, *, overwrite: bool) -> Path:
    """Return the folder that a checkpoint is to be written to.

    Raises:
        ArgumentError: something lies there that must not be replaced, or no node could name it.
    """
    path = Path(fspath(directory)).expanduser().absolute()
    if not is_model_name(path.name):
        raise ArgumentError(
            "directory",
            f"{path.name!r} is no name for a checkpoint: letters, digits, '.', '_', ':' and '-', "
            "at most 96, a letter or digit first",
        )
    if path.exists() and not may_go(path):
        raise ArgumentError("directory", f"{path} is there and no checkpoint; it is left alone")
    if path.exists():
        if (path / INDEX_FILE).exists() and not overwrite:
            raise ArgumentError("directory", f"{path} is a checkpoint; overwrite=True replaces it")
        if problem := in_the_way(path):
            raise ArgumentError("directory", f"{path} {problem}")
    return path


def find(source: AnyPath, store: AnyPath | None = None) -> Checkpoint:
    """Open the checkpoint in folder `source`, or the one of that name in the folder `store`.

    A folder goes before a name. It is known by its whole path from now on.

    Raises:
        CheckpointNotFoundError: there is neither.
        CheckpointFormatError: its index or a shard can't be used.
    """
    given = fspath(source)
    path = Path(given).expanduser()
    root = Path(fspath(StoreConfig().path if store is None else store)).expanduser()
    if not path.is_dir() and is_model_name(given):
        path = root / given
        if not path.is_dir():
            raise CheckpointNotFoundError(
                given, f"there is no such folder, and none in the store {root}{_listing(root)}"
            )
    if not path.is_dir():
        raise CheckpointNotFoundError(str(path), "there is no such folder")
    if not (path / INDEX_FILE).is_file():
        raise CheckpointNotFoundError(
            str(path),
            f"has no {INDEX_FILE}, so it is no checkpoint of ours; "
            "sllm_node.transformers.save_model makes one of a folder of safetensors",
        )
    path = path.resolve()
    return replace(open_checkpoint(path), model=ModelId(str(path)))


def begun_anew(load: Callable[LoadP, LoadedT]) -> Callable[LoadP, LoadedT]:
    """Make `load` begin anew when the checkpoint is replaced between its being found and opened."""

    @wraps(load)
    def load_again(*arguments: LoadP.args, **options: LoadP.kwargs) -> LoadedT:
        for _ in range(_REPLACED_MAX):
            with suppress(CheckpointChangedError):
                return load(*arguments, **options)
        return load(*arguments, **options)

    return load_again


@contextmanager
def unchanged(checkpoint: Checkpoint) -> Iterator[None]:
    """Make sure that files read by their names inside are those of `checkpoint`.

    Raises:
        CheckpointChangedError: it was replaced, so that they may be another one's; also instead of
            what that led to.
    """
    try:
        yield
    except SllmError:
        _check_same(checkpoint)
        raise
    _check_same(checkpoint)


def _check_same(checkpoint: Checkpoint) -> None:
    if shard := changed_shard(checkpoint):
        raise CheckpointChangedError(checkpoint.model, shard, "was replaced")


def pool_size(size: int | str | None) -> int | None:
    """Return the bytes of a pool as people write them.

    Raises:
        ArgumentError: it is no size.
    """
    if size is None:
        return None
    try:
        return parse_size(size)
    except (TypeError, ValueError) as error:
        raise ArgumentError("pool_bytes", str(error)) from error


@contextmanager
def shown(what: str, *, progress: bool) -> Iterator[Show | None]:
    """Give what shows progress on stderr, or None."""
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _listing(root: Path) -> str:
    catalog = Catalog(root)
    catalog.scan()
    found = catalog.models()
    return f"; there are: {', '.join(found[:20])}" if found else ""
