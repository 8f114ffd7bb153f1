"""What other nodes may read of the checkpoints here: which files, and of which version.

A file is given only by the name that a checkpoint's index, or our list of texts, has for it, so no
path that somebody makes up ever reaches the file system. What is at a remote is not passed on.
"""

from pathlib import Path

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.index import INDEX_FILE, TensorIndex, to_json
from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId


class Given:
    """The files of one store folder that may be read from outside."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._digests: dict[ModelId, tuple[Checkpoint, str]] = {}

    def all(self) -> list[Checkpoint]:
        """Return the checkpoints of which all is here, as the store folder is now."""
        self._catalog.scan()
        return [one for one in map(self.checkpoint, self._catalog.models()) if one is not None]

    def checkpoint(self, model: ModelId) -> Checkpoint | None:
        """Return the checkpoint if all of it is on this node."""
        try:
            checkpoint = self._catalog.get(model)
        except SllmError:  # damaged, or gone since the list was made
            return None
        return checkpoint if checkpoint.remote is None else None

    def digest(self, checkpoint: Checkpoint) -> str:
        """Return the digest of its index: two checkpoints with the same one have the same bytes."""
        known = self._digests.get(checkpoint.model)
        if known is None or known[0] is not checkpoint:
            known = self._digests[checkpoint.model] = (checkpoint, index_digest(checkpoint.index))
        return known[1]


def index_digest(index: TensorIndex) -> str:
    """Return the digest that tells versions of a checkpoint apart."""
    return f"{chunk_digest(to_json(index)):016x}"


def file_of(checkpoint: Checkpoint, name: str) -> Path | None:
    """Return where the file `name` of a checkpoint lies; None: it has none that may be given."""
    is_shard = any(shard.name == name for shard in checkpoint.index.shards)
    if not is_shard and name not in (INDEX_FILE, *TEXT_FILES):
        return None
    path = checkpoint.path / name
    return path if path.is_file() else None
