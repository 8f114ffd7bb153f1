"""GET /v1/models and /v1/models/{id}: OpenAI's fields, and what this node knows under `sllm`."""

from typing import Any

import orjson
from aiohttp import web

from sllm_node.core.types import LoadProgress, ModelId, ModelStatus
from sllm_node.server.service import GenerationService, Wishes


class Models:
    """The two endpoints."""

    def __init__(self, service: GenerationService, wishes: Wishes) -> None:
        self._service = service
        self._wishes = wishes

    async def list(self, _: web.Request) -> web.Response:
        """List the models of this node, or of its cluster, and behind them their other names."""
        found = {status.model: status for status in self._service.models()}
        data = [model_object(status) for status in found.values()]
        for name, model in self._wishes.aliases().items():
            if (status := found.get(ModelId(model))) is not None:
                data.append(model_object(status, name))
        return json_response({"object": "list", "data": data})

    async def retrieve(self, http: web.Request) -> web.Response:
        """Describe one model."""
        name = http.match_info["id"]
        status = self._service.status(self._wishes.resolve(name))
        return json_response(model_object(status, name))


def json_response(value: object, status: int = 200) -> web.Response:
    """Return `value` as a JSON response."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def model_object(status: ModelStatus, name: str | None = None) -> dict[str, Any]:
    """Return a model as OpenAI's clients read it; `name`: as it was asked for."""
    is_alias = name not in (None, status.model)
    return {
        "id": name or status.model,
        "object": "model",
        "created": status.created,
        "owned_by": "sllm_node",
        "sllm": {**described(status), **({"alias_of": status.model} if is_alias else {})},
    }


def described(status: ModelStatus) -> dict[str, Any]:
    """Return everything known of a model, JSON-able."""
    return {
        "state": status.state.value,
        "tier": status.tier.value,
        "devices": list(status.devices),
        "bytes": status.bytes_total,
        "bytes_by_tier": {tier.value: size for tier, size in status.bytes_by_tier.items()},
        "dtype": status.dtype,
        "architecture": status.architecture,
        "context_tokens": status.context_tokens,
        "pinned": status.pinned,
        "priority": status.priority,
        "running": status.running,
        "waiting": status.waiting,
        "keep_alive_until_s": status.keep_alive_until_s,
        "stalled_s": status.stalled_s,
        "progress": None if status.progress is None else _progress(status.progress),
    }


def _progress(progress: LoadProgress) -> dict[str, Any]:
    return {
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "elapsed_s": progress.elapsed_s,
        "eta_s": progress.eta_s,
        "source": progress.source.value,
    }
