"""For operators: status, load, unload, pin, unpin, cancel, drain, undrain, pull; and the probes and metrics.

A model may be named by an alias: what is done is done to the model, whatever the alias says later, and the
answer names it.
"""

from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import Stall
from sllm_node.server.models import described, json_response
from sllm_node.server.parsing import ValueT, parse
from sllm_node.server.pinning import Pinning
from sllm_node.server.service import GenerationService


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of unload."""

    force: bool = False


class MoveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of move."""

    to: str
    """A node of the cluster."""


class NoFields(msgspec.Struct, forbid_unknown_fields=True):
    """Body of the acts that take nothing."""


class Admin:
    """The endpoints under /admin."""

    def __init__(
        self,
        service: GenerationService,
        overview: Callable[[], dict[str, Any]],
        pull: Callable[[str], Coroutine[None, None, None]],
        explain: Callable[[str], dict[str, Any]] | None = None,
        resolve: Callable[[str], str] = str,
    ) -> None:
        """`resolve` returns the model behind a name."""
        self._service = service
        self._pinning = Pinning(service)
        self._resolve = resolve
        self._explain = explain
        self._pull = pull
        self._overview = overview
        """What the node knows and the service doesn't: node, device, pool, bandwidth."""

    async def close(self) -> None:
        """End what goes on without who asked for it."""
        await self._pinning.close()

    async def status(self, _: web.Request) -> web.Response:
        """Show the whole node."""
        models = [{"id": s.model, **described(s)} for s in self._service.models()]
        sessions = [asdict(session) for session in self._service.sessions()]
        return json_response({**self._overview(), "models": models, "sessions": sessions})

    async def placement(self, http: web.Request) -> web.Response:
        """Tell where a request for the model `?model=` would go now, with all estimates."""
        model = http.query.get("model")
        if not model:
            raise InvalidRequestError("name a model: /admin/placement?model=NAME", param="model")
        if self._explain is None:
            raise InvalidRequestError("this node is in no cluster (cluster.file in its config)")
        model = self._resolve(model)
        self._service.status(model)
        return json_response(self._explain(model))

    async def load(self, http: web.Request) -> web.Response:
        """Bring a model onto the device; answers when it serves."""
        await read_body(http, NoFields)
        model = self._model(http)
        await self._service.load(model)
        return self._state_of(model)

    async def unload(self, http: web.Request) -> web.Response:
        """Take a model off the device; answers when its memory is free."""
        body = await read_body(http, UnloadRequest)
        model = self._model(http)
        await self._service.unload(model, force=body.force)
        return self._state_of(model)

    async def pin(self, http: web.Request) -> web.Response:
        """Keep a model on the device, and bring it there; if it can't come, it is not pinned."""
        await read_body(http, NoFields)
        model = self._model(http)
        await self._pinning.pin(model)
        return self._state_of(model)

    async def unpin(self, http: web.Request) -> web.Response:
        """Let a model be evicted again."""
        await read_body(http, NoFields)
        model = self._model(http)
        await self._service.unpin(model)
        return self._state_of(model)

    async def cancel(self, http: web.Request) -> web.Response:
        """End the sessions of one request, or of all that came with this id."""
        await read_body(http, NoFields)
        return json_response({"cancelled": self._service.cancel_request(http.match_info["id"])})

    async def move(self, http: web.Request) -> web.Response:
        """Begin to move a session to another node; status tells how it goes."""
        body = await read_body(http, MoveRequest)
        return json_response(self._service.move(http.match_info["id"], body.to))

    async def drain(self, http: web.Request) -> web.Response:
        """Take no new requests; what runs moves to peers, or is ended after `node.drain_s`."""
        await read_body(http, NoFields)
        self._service.drain()
        return json_response({"draining": True})

    async def undrain(self, http: web.Request) -> web.Response:
        """Take new requests again; sessions that have moved away stay where they are."""
        await read_body(http, NoFields)
        self._service.undrain()
        return json_response({"draining": False})

    async def pull(self, http: web.Request) -> web.Response:
        """Bring a model from its remote onto NVMe; answers when all of it is there."""
        await read_body(http, NoFields)
        model = self._model(http)
        await self._pull(model)
        return self._state_of(model)

    def _model(self, http: web.Request) -> str:
        """Return the model that is meant: once, so that all of one act is done to the same."""
        return self._resolve(http.match_info["id"])

    def _state_of(self, model: str) -> web.Response:
        status = self._service.status(model)
        return json_response({"id": status.model, **described(status)})


async def read_body(http: web.Request, kind: type[ValueT]) -> ValueT:
    """Read a body that may be absent."""
    body = await http.read()
    return parse(body.strip() or b"{}", kind)


class Probes:
    """What machines ask: is it alive, does it take requests, do its engines move, metrics."""

    def __init__(
        self,
        service: GenerationService,
        stalled: Callable[[], Stall | None],
        registry: CollectorRegistry,
    ) -> None:
        self._service = service
        self._stalled = stalled
        self._registry = registry

    async def livez(self, _: web.Request) -> web.Response:
        """The process answers."""
        return json_response({"status": "ok"})

    async def readyz(self, _: web.Request) -> web.Response:
        """New requests are taken."""
        if self._service.is_draining:
            return json_response({"status": "draining"}, status=503)
        return json_response({"status": "ok"})

    async def health(self, _: web.Request) -> web.Response:
        """The engines move."""
        if (stall := self._stalled()) is not None:
            fields = {"reason": stall.reason, "models": list(stall.models)}
            return json_response({"status": "stalled", **fields}, status=503)
        return json_response({"status": "ok"})

    async def metrics(self, _: web.Request) -> web.Response:
        """Show the metrics in Prometheus' text format."""
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
