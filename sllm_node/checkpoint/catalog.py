"""The checkpoints that lie in a store folder, each opened once and opened anew when it changed."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from sllm_node.checkpoint.digest import weights_of
from sllm_node.checkpoint.index import INDEX_FILE, Shard, TensorIndex, from_json
from sllm_node.checkpoint.temporary import sweep, temporary_path
from sllm_node.core.errors import (
    CheckpointFormatError,
    ModelNotFoundError,
    SllmError,
    StorageWriteError,
)
from sllm_node.core.names import is_model_name
from sllm_node.core.types import ModelId, Weights

_INDEX_BYTES_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What tells a shard file from another one put in its place."""

    device: int
    inode: int
    mtime_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, as it was when it was opened."""

    model: ModelId
    path: Path = field(compare=False)
    """Of its folder; another one when the shards have come from a remote, which changes no byte."""
    index: TensorIndex
    identities: tuple[ShardIdentity, ...]
    """Of each shard, in the order of `index.shards`."""
    remote: str | None = field(default=None, compare=False)
    """Where shards, or parts of them, still are; None: all of it is here."""
    weights: Weights = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Take the digest of all digests once."""
        object.__setattr__(self, "weights", weights_of(self.index))


def may_go(path: Path) -> bool:
    """Tell whether the folder `path` is a checkpoint, damaged or not, or empty.

    Nothing else is ever replaced or deleted, whatever its name is.
    """
    try:
        return (path / INDEX_FILE).is_file() or not any(path.iterdir())
    except OSError:  # no folder, or none that we may look into
        return False


def identity_of(status: os.stat_result) -> ShardIdentity:
    """Return the identity in the result of a stat call."""
    return ShardIdentity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def changed_shard(checkpoint: Checkpoint) -> str | None:
    """Return a shard that is gone or another one by now; None: the folder still holds this checkpoint.

    One is replaced whole, so a file that was opened by name before this was its own. Costs a stat call
    for each shard, in any thread: to read the index of a large model again takes its time.
    """
    for shard, identity in zip(checkpoint.index.shards, checkpoint.identities, strict=True):
        try:
            found = identity_of((checkpoint.path / shard.name).stat())
        except OSError:
            return shard.name
        if found != identity:
            return shard.name
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the index of the checkpoint in folder `path` and check that its shards are there.

    One that is replaced in that moment is the old one or the new one, never some of both.

    Raises:
        CheckpointFormatError: the index or a shard is missing, unreadable, of another size.
    """
    return _open_whole(path).checkpoint


def open_for_verify(path: Path) -> Checkpoint:
    """Read the index of the checkpoint in folder `path`, whose shards may be damaged or gone.

    Raises:
        CheckpointFormatError: the index is missing or unreadable.
    """
    return Checkpoint(ModelId(path.name), path, _read_index(path), ())


def _read_index(path: Path) -> TensorIndex:
    index_path = path / INDEX_FILE
    try:
        if index_path.stat().st_size > _INDEX_BYTES_MAX:
            raise CheckpointFormatError(str(index_path), "is too large for a tensor index")
        data = index_path.read_bytes()
    except OSError as error:
        raise CheckpointFormatError(str(index_path), f"can't be read: {error.strerror}") from error
    return from_json(data, str(index_path))


def _shard_identity(folder: Path, shard: Shard) -> ShardIdentity:
    path = folder / shard.name
    try:
        identity = identity_of(path.stat())
    except OSError as error:
        problem = f"can't be read: {error.strerror}; convert it again, or remove it"
        raise CheckpointFormatError(str(path), problem) from error
    if identity.size != shard.file_size:
        raise CheckpointFormatError(
            str(path), f"has {identity.size} bytes, the index says {shard.file_size}; convert again"
        )
    return identity


class Elsewhere(Protocol):
    """The checkpoints whose shards are at a remote."""

    def models(self) -> tuple[ModelId, ...]: ...

    def get(self, model: ModelId) -> Checkpoint | None: ...

    def remove(self, model: ModelId) -> bool:
        """Delete what has come of `model`; False: nothing has."""


@dataclass(frozen=True, slots=True)
class _Opened:
    checkpoint: Checkpoint
    index_identity: ShardIdentity


class Catalog:
    """The checkpoints of one store folder."""

    def __init__(self, root: Path, elsewhere: Elsewhere | None = None) -> None:
        self.root = root
        self._elsewhere = elsewhere
        self.problems: dict[str, SllmError] = {}
        """Folders that hold no usable checkpoint, as of the last look at each."""
        self._opened: dict[ModelId, _Opened] = {}

    def scan(self) -> None:
        """Look at the whole folder; what can't be opened goes to `problems`."""
        names = {path.name for path in self._folders()}
        self.problems = {}
        for gone in self._opened.keys() - names:
            del self._opened[gone]
        for name in sorted(names):
            try:
                self.get(ModelId(name))
            except SllmError as error:
                self.problems[name] = error

    def models(self) -> tuple[ModelId, ...]:
        """Return the names of the usable checkpoints known so far, in order."""
        remote = self._elsewhere.models() if self._elsewhere is not None else ()
        return tuple(sorted(self._opened.keys() | set(remote)))

    def get(self, model: ModelId) -> Checkpoint:
        """Return the checkpoint of `model` as it is on disk now, or else at a remote.

        Costs a stat call for each of its files while nothing changed.

        Raises:
            ModelNotFoundError: there is none.
            CheckpointFormatError: there is one that can't be used.
        """
        known = self._opened.get(model)
        if known is not None and _is_unchanged(known):
            return known.checkpoint
        self._opened.pop(model, None)
        if (remote := self._remote(model)) is not None:
            return remote
        opened = self._opened[model] = _open_whole(self._folder(model))
        self.problems.pop(model, None)
        return opened.checkpoint

    def remove(self, name: str) -> Path | None:
        """Delete the checkpoint `name`, a damaged one too, and what crashed writers left.

        Of a link only the link is deleted, as its bytes may have other names; where they stay is
        returned.

        Raises:
            ModelNotFoundError: there is none.
            CheckpointFormatError: the folder of that name is something else.
            StorageWriteError: the system refuses.
        """
        sweep(self.root)
        if self._remove_partial(ModelId(name)):
            return None
        path = self._folder(ModelId(name))
        if not may_go(path):
            problem = f"has no {INDEX_FILE}, so it is no checkpoint of ours; it is left alone"
            raise CheckpointFormatError(
                str(path), f"{problem}: delete it by hand if nobody needs it"
            )
        stays = path.resolve() if path.is_symlink() else None
        hidden = temporary_path(self.root, name)
        try:
            if stays is not None:
                path.unlink()
            else:
                path.rename(hidden)  # out of sight at once, so that nobody opens half of it
        except OSError as error:
            raise StorageWriteError(str(path), error.strerror or str(error)) from error
        self._opened.pop(ModelId(name), None)
        self.problems.pop(name, None)
        shutil.rmtree(hidden, ignore_errors=True)
        return stays

    def _remote(self, model: ModelId) -> Checkpoint | None:
        """Return what is known of `model` at a remote; one that is here goes before."""
        if self._elsewhere is None or not is_model_name(model) or (self.root / model).is_dir():
            return None
        found = self._elsewhere.get(model)
        return None if (self.root / model).is_dir() else found  # completed in between

    def _remove_partial(self, model: ModelId) -> bool:
        """Delete what has come of a remote's checkpoint; False: nothing has, or it is none."""
        if self._elsewhere is None or not is_model_name(model) or (self.root / model).is_dir():
            return False
        try:
            return self._elsewhere.remove(model)
        except OSError as error:
            path = str(error.filename or self.root / model)
            raise StorageWriteError(path, error.strerror or str(error)) from error

    def _folder(self, model: ModelId) -> Path:
        path = self.root / model
        if not is_model_name(model) or not path.is_dir():
            raise ModelNotFoundError(model, self.models())
        return path

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [path for path in self.root.iterdir() if is_model_name(path.name) and path.is_dir()]


def _open_whole(path: Path) -> _Opened:
    """Open the checkpoint in folder `path`, once more if it is replaced in that moment.

    Index and shards are found by name, one after another. Shards of the next checkpoint may well
    have the sizes that the index of this one says, so that nothing was wrong does not tell.
    """
    while True:
        before = _index_identity(path)
        try:
            index = _read_index(path)
            identities = tuple(_shard_identity(path, shard) for shard in index.shards)
        except CheckpointFormatError:
            if _index_identity(path) == before:
                raise
        else:
            if _index_identity(path) == before:
                return _Opened(Checkpoint(ModelId(path.name), path, index, identities), before)


def _index_identity(path: Path) -> ShardIdentity:
    try:
        return identity_of((path / INDEX_FILE).stat())
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
        raise CheckpointFormatError(str(path / INDEX_FILE), problem) from error


def _is_unchanged(opened: _Opened) -> bool:
    path = opened.checkpoint.path / INDEX_FILE
    try:
        is_same = identity_of(path.stat()) == opened.index_identity
    except OSError:
        return False
    return is_same and changed_shard(opened.checkpoint) is None
