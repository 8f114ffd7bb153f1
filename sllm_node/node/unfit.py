"""Which checkpoints are in order, and still no request for them can be served with this node's config."""

from collections.abc import Iterable

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.errors import CheckpointFormatError, SllmError
from sllm_node.core.types import ModelId
from sllm_node.store.grouping import check_chunks


def unfit(
    catalog: Catalog, models: Iterable[ModelId], chunk_bytes: int
) -> dict[ModelId, SllmError]:
    """Return those of `models` whose chunks do not fit into the pool's, each with why and what to do."""
    found: dict[ModelId, SllmError] = {}
    for model in models:
        try:
            index = catalog.get(model).index
        except SllmError:
            continue  # gone since, or a problem of the catalog's
        try:
            check_chunks(index, chunk_bytes)
        except CheckpointFormatError as error:
            found[model] = error
    return found
