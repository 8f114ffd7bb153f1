"""For other nodes: the checkpoints that lie here, to read and nothing else.

A file is given only by the name that a checkpoint's index, or our list of texts, has for it, so no
path that a client makes up ever reaches the file system. What is at a remote is not passed on.
"""

from aiohttp import web

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.index import INDEX_FILE, to_json
from sllm_node.core.errors import ModelNotFoundError, RouteError, SllmError
from sllm_node.core.types import ModelId
from sllm_node.server.models import json_response


class Peer:
    """The endpoints under /peer."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._digests: dict[ModelId, tuple[Checkpoint, str]] = {}

    async def list(self, _: web.Request) -> web.Response:
        """List the checkpoints, each with the digest of its index."""
        self._catalog.scan()
        found = [self._described(one) for one in map(self._local, self._catalog.models()) if one]
        return json_response({"checkpoints": found})

    async def file(self, http: web.Request) -> web.StreamResponse:
        """Send a file of a checkpoint, or the range of it that was asked for."""
        model, name = ModelId(http.match_info["id"]), http.match_info["file"]
        checkpoint = self._local(model)
        if checkpoint is None:
            raise ModelNotFoundError(model)
        shards = {shard.name for shard in checkpoint.index.shards}
        path = checkpoint.path / name
        if (name not in shards and name not in (INDEX_FILE, *TEXT_FILES)) or not path.is_file():
            raise RouteError(http.method, http.path, 404)
        return web.FileResponse(path)

    def _local(self, model: ModelId) -> Checkpoint | None:
        """Return the checkpoint if all of it is on this node."""
        try:
            checkpoint = self._catalog.get(model)
        except SllmError:  # damaged, or gone since the list was made
            return None
        return checkpoint if checkpoint.remote is None else None

    def _described(self, checkpoint: Checkpoint) -> dict[str, object]:
        known = self._digests.get(checkpoint.model)
        if known is None or known[0] is not checkpoint:
            digest = f"{chunk_digest(to_json(checkpoint.index)):016x}"
            known = self._digests[checkpoint.model] = (checkpoint, digest)
        return {"name": checkpoint.model, "bytes": checkpoint.index.size, "digest": known[1]}
