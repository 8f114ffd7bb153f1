"""For operators: other names of models and desired replicas, set and unset on a running node."""

from dataclasses import asdict

import msgspec
from aiohttp import web

from sllm_node.cluster.records import Desired, Registration
from sllm_node.core.types import ModelId
from sllm_node.server.admin import NoFields, read_body
from sllm_node.server.models import json_response
from sllm_node.server.service import Wishes


class AliasRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of set."""

    model: str


class ScaleRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of scale."""

    minimum: int
    maximum: int
    keep_alive_s: float = 300.0


class RegisterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of register."""

    url: str


class WishRoutes:
    """The endpoints of wishes; each answers with the peers that do not know of it yet."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes

    async def show(self, _: web.Request) -> web.Response:
        """Show what operators have wished for."""
        desired = [asdict(wish) for wish in self._wishes.desired()]
        wishes = self._wishes
        return json_response(
            {"aliases": wishes.aliases(), "hidden": wishes.hidden(), "desired": desired}
        )

    async def scale(self, http: web.Request) -> web.Response:
        """Keep between so many replicas of a model in the cluster."""
        body = await read_body(http, ScaleRequest)
        model = ModelId(http.match_info["id"])
        wish = Desired(model, body.minimum, body.maximum, body.keep_alive_s)
        return json_response({**asdict(wish), "missed": await self._wishes.scale(wish)})

    async def unscale(self, http: web.Request) -> web.Response:
        """Desire no replicas of a model any more."""
        await read_body(http, NoFields)
        model = http.match_info["id"]
        return json_response({"model": model, "missed": await self._wishes.unscale(model)})

    async def register(self, http: web.Request) -> web.Response:
        """Let all nodes load a model from an address."""
        body = await read_body(http, RegisterRequest)
        registration = Registration(ModelId(http.match_info["id"]), body.url)
        await self._wishes.register(registration)
        return json_response(asdict(registration))

    async def unregister(self, http: web.Request) -> web.Response:
        """Let nodes do that no more."""
        await read_body(http, NoFields)
        model = http.match_info["id"]
        await self._wishes.unregister(model)
        return json_response({"model": model})

    async def set_alias(self, http: web.Request) -> web.Response:
        """Let clients ask for a model by another name."""
        body = await read_body(http, AliasRequest)
        name = http.match_info["id"]
        missed = await self._wishes.set_alias(name, body.model)
        return json_response({"alias": name, "model": body.model, "missed": missed})

    async def unset_alias(self, http: web.Request) -> web.Response:
        """Forget another name of a model."""
        await read_body(http, NoFields)
        name = http.match_info["id"]
        return json_response({"alias": name, "missed": await self._wishes.drop_alias(name)})
