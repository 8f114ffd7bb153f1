"""For other nodes: the checkpoints that lie here, to read and nothing else (`checkpoint.given`)."""

from aiohttp import web

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.given import Given, file_of
from sllm_node.core.errors import ModelNotFoundError, RouteError
from sllm_node.core.types import ModelId
from sllm_node.server.models import json_response


class Peer:
    """The endpoints under /peer."""

    def __init__(self, catalog: Catalog) -> None:
        self._given = Given(catalog)

    async def list(self, _: web.Request) -> web.Response:
        """List the checkpoints, each with the digest of its index."""
        found = [
            {"name": one.model, "bytes": one.index.size, "digest": self._given.digest(one)}
            for one in self._given.all()
        ]
        return json_response({"checkpoints": found})

    async def file(self, http: web.Request) -> web.StreamResponse:
        """Send a file of a checkpoint, or the range of it that was asked for."""
        model, name = ModelId(http.match_info["id"]), http.match_info["file"]
        checkpoint = self._given.checkpoint(model)
        if checkpoint is None:
            raise ModelNotFoundError(model)
        path = file_of(checkpoint, name)
        if path is None:
            raise RouteError(http.method, http.path, 404)
        return web.FileResponse(path)
