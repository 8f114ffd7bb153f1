"""Checkpoints whose shards are at a remote: the index and texts of each, and which bytes have come.

The *card* of a model is the folder `.remote/NAME` of the store. It holds the index and the texts,
`card.json` (which remote), and, as they come, the shards at their full size with holes, and
`fetched.bits`: one bit for each file chunk, set only after the chunk's bytes are on the disk. When
all bits are set, shards and texts are linked into a folder of their own, which becomes an ordinary
checkpoint by one rename. A link leaves the inode, and a shard has the index's time of change, so
the shards' identities stay and nothing that was loaded from the card is loaded again.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from sllm_node.checkpoint.catalog import (
    Checkpoint,
    ShardIdentity,
    identity_of,
)
from sllm_node.checkpoint.index import INDEX_FILE, TensorIndex, from_json
from sllm_node.checkpoint.output import DiskFiles, publish, write_all
from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.core.errors import CheckpointFormatError
from sllm_node.core.names import is_model_name
from sllm_node.core.types import ModelId

CARDS_FOLDER: Final = ".remote"
CARD_FILE: Final = "card.json"
PEERS: Final = ":peers"
"""The remote that is the other nodes of the cluster; no remote of the config has such a name."""
REGISTERED: Final = ":registered"
"""The remote that is the models of the cluster's directory, each with an address of its own."""
BITS_FILE: Final = "fetched.bits"
TEXT_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What can lie beside index and shards. No other name is asked of a remote, or given to a peer."""


class _Card(msgspec.Struct, frozen=True):
    remote: str


@dataclass(frozen=True, slots=True)
class _Opened:
    identity: ShardIdentity
    """Of the index: it changes when the card does."""
    checkpoint: Checkpoint


class Cards:
    """The cards of one store folder."""

    def __init__(self, store: Path, remotes: frozenset[str] | None = None) -> None:
        self.store = store
        self.root = store / CARDS_FOLDER
        self._remotes = remotes
        """Cards of others are not shown; None: all are."""
        self._opened: dict[ModelId, _Opened] = {}
        self._indexes: dict[ModelId, tuple[ShardIdentity, TensorIndex]] = {}
        self.offers: dict[str, Callable[[ModelId], bool]] = {}
        """Remotes that come and go, each with what tells whether a card of it is shown now."""

    def models(self) -> tuple[ModelId, ...]:
        """Return the names that have a card and no checkpoint of their own."""
        return tuple(sorted(name for name in self.all() if not (self.store / name).is_dir()))

    def all(self) -> tuple[ModelId, ...]:
        """Return the names of all cards."""
        if not self.root.is_dir():
            return ()
        names = (path.name for path in self.root.iterdir() if is_model_name(path.name))
        return tuple(ModelId(name) for name in sorted(names) if self._is_shown(name))

    def remote_of(self, model: str) -> str | None:
        """Return the remote that the card of `model` names; None: there is no card."""
        try:
            data = (self.root / model / CARD_FILE).read_bytes()
            return msgspec.json.decode(data, type=_Card).remote
        except (OSError, msgspec.MsgspecError):
            return None

    def index_of(self, model: ModelId) -> TensorIndex | None:
        """Return the index of a card, shown or not; None: there is none that can be used."""
        folder = self.root / model
        try:
            identity = identity_of((folder / INDEX_FILE).stat())
            known = self._indexes.get(model)
            if known is None or known[0] != identity:
                known = self._indexes[model] = (identity, read_index(folder))
        except (OSError, CheckpointFormatError):
            return None
        return known[1]

    def get(self, model: ModelId, *, is_hidden: bool = False) -> Checkpoint | None:
        """Return what the card of `model` tells, its shards made ready to take bytes.

        `is_hidden`: also if it is not shown now, of a load under way.

        Raises:
            CheckpointFormatError: the card can't be used.
        """
        folder = self.root / model
        try:
            identity = identity_of((folder / INDEX_FILE).stat())
        except OSError:
            return None
        remote = self.remote_of(model)
        if remote is None or not (is_hidden or self._is_shown(model)):
            return None
        known = self._opened.get(model)
        if known is not None and known.identity == identity and _has_shards(known.checkpoint):
            checkpoint = known.checkpoint
            if checkpoint.remote != remote:
                checkpoint = replace(checkpoint, remote=remote)
        else:
            index = read_index(folder)
            identities = _ready_shards(folder, index, identity.mtime_ns)
            checkpoint = Checkpoint(model, folder, index, identities, remote)
        self._opened[model] = _Opened(identity, checkpoint)
        return checkpoint

    def fetched(self, model: ModelId) -> tuple[int, int]:
        """Return how many bytes of `model` have come, and of how many."""
        folder = self.root / model
        index = read_index(folder)
        bits = read_bits(folder, index)
        sizes = chunk_sizes(index)
        return sum(
            size for size, is_here in zip(sizes, bits, strict=True) if is_here
        ), index.file_size

    def write(self, model: ModelId, remote: str, files: dict[str, bytes]) -> None:
        """Make a card, or put it in place of one whose bytes are of no use any more.

        Raises:
            OSError: the file system's own.
        """
        disk = DiskFiles()
        with temporary_folder(self.root, model) as folder:
            for name, data in {**files, CARD_FILE: msgspec.json.encode(_Card(remote))}.items():
                descriptor = disk.create(folder / name)
                try:
                    write_all(disk, descriptor, memoryview(data))
                finally:
                    os.close(descriptor)
            publish(folder, self.root / model, disk, replace=True)

    def move(self, model: ModelId, remote: str) -> None:
        """Let the card of `model` name another remote that has the same; its bytes stay.

        Raises:
            OSError: the file system's own.
        """
        new = self.root / model / (CARD_FILE + ".new")
        new.write_bytes(msgspec.json.encode(_Card(remote)))
        new.replace(self.root / model / CARD_FILE)

    def remove(self, model: ModelId) -> bool:
        """Delete the bytes that have come of `model`; False: none have."""
        has_come = self.has_come(model)
        clear(self.root / model)
        self._opened.pop(model, None)
        return has_come

    def has_come(self, model: ModelId) -> bool:
        """Tell whether bytes of `model` have come that are not an ordinary checkpoint by now."""
        return any(_has_data(path) for path in (self.root / model).glob("shard-*.bin"))

    def drop(self, model: ModelId) -> None:
        """Delete the card of `model` and the bytes that have come."""
        shutil.rmtree(self.root / model, ignore_errors=True)

    def _is_shown(self, name: str) -> bool:
        remote = self.remote_of(name)
        if self._remotes is None or remote in self._remotes:
            return True
        offers = self.offers.get(remote or "")
        return offers is not None and offers(ModelId(name))


def read_index(folder: Path) -> TensorIndex:
    """Read the index in `folder`.

    Raises:
        CheckpointFormatError: it is missing or unreadable.
    """
    path = folder / INDEX_FILE
    try:
        return from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointFormatError(str(path), f"can't be read: {error.strerror}") from error


def chunk_sizes(index: TensorIndex) -> tuple[int, ...]:
    """Return the size of each file chunk, shard after shard: the order of the bits."""
    return tuple(
        size
        for shard in index.shards
        for size in shard.stored or _raw_sizes(shard.size, index.chunk_bytes)
    )


def _raw_sizes(size: int, chunk_bytes: int) -> Iterator[int]:
    return (min(chunk_bytes, size - offset) for offset in range(0, size, chunk_bytes))


def _chunk_count(index: TensorIndex) -> int:
    return sum(len(shard.digests) for shard in index.shards)


def _bits_size(index: TensorIndex) -> int:
    return -(-_chunk_count(index) // 8)


def read_bits(folder: Path, index: TensorIndex) -> list[bool]:
    """Return for each file chunk whether its bytes are on the disk."""
    count = _chunk_count(index)
    if not _are_whole(folder, index):
        return [False] * count
    data = (folder / BITS_FILE).read_bytes()
    return [bool(data[i // 8] >> (i % 8) & 1) for i in range(count)]


def pack_bits(bits: list[bool]) -> bytes:
    """Return `bits` as they are stored."""
    data = bytearray(-(-len(bits) // 8))
    for i, is_here in enumerate(bits):
        data[i // 8] |= is_here << (i % 8)
    return bytes(data)


def clear(folder: Path) -> None:
    """Delete bits and shards of a card; the bits first, so that they never promise what is gone."""
    (folder / BITS_FILE).unlink(missing_ok=True)
    for path in folder.glob("shard-*.bin"):
        path.unlink(missing_ok=True)


def complete(checkpoint: Checkpoint, store: Path) -> None:
    """Make an ordinary checkpoint of a card whose bytes have all come.

    Raises:
        OSError: the file system's own, or the card was replaced; the card is as it was.
    """
    with temporary_folder(store, checkpoint.model) as folder:
        shards = {shard.name for shard in checkpoint.index.shards}
        for path in checkpoint.path.iterdir():
            if path.name in shards or path.name in TEXT_FILES:
                (folder / path.name).hardlink_to(path)
        # The last one: if it is that of the shards, so was all that was linked before it.
        (folder / INDEX_FILE).hardlink_to(checkpoint.path / INDEX_FILE)
        changed = (folder / INDEX_FILE).stat().st_mtime_ns
        if not _has_index(folder, checkpoint.index):
            raise FileNotFoundError(errno.ENOENT, "was replaced", str(checkpoint.path / INDEX_FILE))
        for shard, identity in zip(checkpoint.index.shards, checkpoint.identities, strict=True):
            os.utime(folder / shard.name, ns=(changed, changed))
            if identity_of((folder / shard.name).stat()) != identity:
                raise FileNotFoundError(errno.ENOENT, "was replaced", str(folder / shard.name))
        publish(folder, store / checkpoint.model, DiskFiles(), replace=False)
    with suppress(OSError):  # what is left here is a second name of the same bytes
        clear(checkpoint.path)


def _has_index(folder: Path, index: TensorIndex) -> bool:
    try:
        return read_index(folder) == index
    except CheckpointFormatError:
        return False


def _are_whole(folder: Path, index: TensorIndex) -> bool:
    """Tell whether bits and shards are there, at their full size."""
    wanted = {shard.name: shard.file_size for shard in index.shards}
    wanted[BITS_FILE] = _bits_size(index)
    try:
        return all((folder / name).stat().st_size == size for name, size in wanted.items())
    except OSError:
        return False


def _has_data(path: Path) -> bool:
    """Tell whether a file is more than one hole."""
    try:
        with path.open("rb") as file:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno not in (errno.ENXIO, errno.ENOENT)
    return True


def _has_shards(checkpoint: Checkpoint) -> bool:
    try:
        found = [(checkpoint.path / s.name).stat() for s in checkpoint.index.shards]
    except OSError:
        return False
    wanted = [(i.device, i.inode, i.size) for i in checkpoint.identities]
    return [(s.st_dev, s.st_ino, s.st_size) for s in found] == wanted


def _ready_shards(folder: Path, index: TensorIndex, changed: int) -> tuple[ShardIdentity, ...]:
    """Make the shards that are not there, and return the identities of all.

    They and the bits are files of holes: a full disk has room for them, and a load goes on.
    """
    try:
        if not _are_whole(folder, index):
            clear(folder)
            sizes = {shard.name: shard.file_size for shard in index.shards}
            # The last one: whoever holds it open never writes to shards of an earlier time.
            sizes[BITS_FILE] = _bits_size(index)
            for name, size in sizes.items():
                with (folder / name).open("xb") as file:
                    file.truncate(size)
        found = [(folder / shard.name).stat() for shard in index.shards]
    except OSError as error:
        problem = f"no room can be made for its shards: {error.strerror}"
        raise CheckpointFormatError(str(folder), problem) from error
    return tuple(ShardIdentity(s.st_dev, s.st_ino, changed, s.st_size) for s in found)
