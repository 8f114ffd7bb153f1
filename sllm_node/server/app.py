"""The HTTP server: routes, who may use them, and how errors leave.

Middlewares, outermost first: the request id and the access log; errors to statuses; who may come in.
What fails before there is a request (bytes that are no HTTP) is answered by `connection`.
"""

import asyncio
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from aiohttp import web

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core import log as logs
from sllm_node.core.clock import Clock
from sllm_node.core.config import ServerConfig
from sllm_node.core.errors import (
    BodyTooLargeError,
    ForbiddenOriginError,
    InternalError,
    ListenError,
    MalformedRequestError,
    RouteError,
    SllmError,
    UnauthorizedError,
)
from sllm_node.core.hosts import is_loopback
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import Stall
from sllm_node.server.admin import Admin, Probes
from sllm_node.server.bodies import expect, receive, without_unknown_expect
from sllm_node.server.completions import Completions, current_job
from sllm_node.server.connection import Connection, error_response
from sllm_node.server.models import Models
from sllm_node.server.peer import Peer
from sllm_node.server.service import GenerationService, Wishes
from sllm_node.server.wishes import WishRoutes

log = logging.getLogger(__name__)

Access = Literal["open", "client", "admin"]
Handler = Callable[[web.Request], Any]
KEEPALIVE_S: Final = 75.0
SHUTDOWN_S: Final = 1.0
"""For connections that are still open when the server closes; sessions were drained before."""
BACKLOG: Final = 1024
_QUIET: Final = ("/livez", "/readyz", "/health", "/metrics", "/peer/v1/checkpoints/{id}/{file}")
"""Routes that are asked too often to tell each time that all is well."""
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_shown_id: Final[ContextVar[str]] = ContextVar("shown_id", default="")
"""The request's id as its client is told: its own, if it sent one."""


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint; `access` says whose key it asks for."""

    method: str
    path: str
    access: Access


ROUTES: Final = (
    Route("POST", "/v1/chat/completions", "client"),
    Route("POST", "/v1/completions", "client"),
    Route("GET", "/v1/models", "client"),
    Route("GET", "/v1/models/{id}", "client"),
    Route("GET", "/livez", "open"),
    Route("GET", "/readyz", "open"),
    Route("GET", "/health", "open"),
    Route("GET", "/metrics", "open"),
    Route("GET", "/admin/status", "admin"),
    Route("GET", "/admin/placement", "admin"),
    Route("POST", "/admin/models/{id}/load", "admin"),
    Route("POST", "/admin/models/{id}/unload", "admin"),
    Route("POST", "/admin/models/{id}/pin", "admin"),
    Route("POST", "/admin/models/{id}/unpin", "admin"),
    Route("POST", "/admin/requests/{id}/cancel", "admin"),
    Route("POST", "/admin/sessions/{id}/move", "admin"),
    Route("POST", "/admin/drain", "admin"),
    Route("POST", "/admin/undrain", "admin"),
    Route("POST", "/admin/models/{id}/pull", "admin"),
    Route("GET", "/admin/wishes", "admin"),
    Route("POST", "/admin/models/{id}/scale", "admin"),
    Route("POST", "/admin/models/{id}/unscale", "admin"),
    Route("POST", "/admin/models/{id}/register", "admin"),
    Route("POST", "/admin/models/{id}/unregister", "admin"),
    Route("POST", "/admin/aliases/{id}/set", "admin"),
    Route("POST", "/admin/aliases/{id}/unset", "admin"),
    Route("GET", "/peer/v1/checkpoints", "admin"),
    Route("GET", "/peer/v1/checkpoints/{id}/{file}", "admin"),
)


@dataclass(frozen=True, slots=True)
class Edge:
    """What the server is made of."""

    service: GenerationService
    config: ServerConfig
    clock: Clock
    metrics: Metrics
    stalled: Callable[[], Stall | None]
    """Why the engines don't move, or None."""
    overview: Callable[[], dict[str, Any]]
    """Node, device, pool and bandwidth for /admin/status."""
    wishes: Wishes
    """Other names of models, and how many replicas are desired."""
    catalog: Catalog
    """What peers may read."""
    pull: Callable[[str], Coroutine[None, None, None]]
    """Bring a checkpoint from its remote onto NVMe."""
    explain: Callable[[str], dict[str, Any]] | None = None
    """Where a request for a model would go, and why; None: this node is in no cluster."""


class Server:
    """Listens from `start` to `close`."""

    def __init__(self, edge: Edge) -> None:
        self._config = edge.config
        self._completions = Completions(edge.service, edge.wishes.resolve, edge.config, edge.clock)
        self._runner = web.AppRunner(
            make_app(edge, self._completions),
            handler_cancellation=True,  # a client that goes away cancels its handler
            shutdown_timeout=SHUTDOWN_S,
        )
        self._listener: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen and return the URL.

        Raises:
            ListenError: the address can't be had.
        """
        host, port = self._config.host, self._config.port
        loop = asyncio.get_running_loop()
        await self._runner.setup()
        manager = self._runner.server
        assert manager is not None
        manager.request_factory = without_unknown_expect(manager.request_factory)

        def connection() -> Connection:
            return Connection(
                manager,
                loop=loop,
                access_log=None,  # none, as for AppRunner
                keepalive_timeout=KEEPALIVE_S,
                write_timeout_s=self._config.write_timeout_s,
            )

        try:
            self._listener = await loop.create_server(connection, host, port, backlog=BACKLOG)
        except OSError as error:
            await self.close()
            raise ListenError(host, port, error.strerror or str(error)) from error
        bound = self._listener.sockets[0].getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{bound}"

    async def close(self) -> None:
        """Stop listening and drop the connections that are left."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        self._completions.close()


def make_app(edge: Edge, completions: Completions) -> web.Application:
    """Return the application with all routes."""
    app = web.Application(
        client_max_size=edge.config.max_body_bytes,
        middlewares=[_ids_and_logs(edge), _errors(edge.config), _entrance(edge.config)],
    )
    admin = Admin(edge.service, edge.overview, edge.pull, edge.explain, edge.wishes.resolve)
    handlers = _handlers(edge, completions, admin)
    for route in ROUTES:
        # aiohttp's {id} stops at a slash; names of models may be asked for with one.
        path = route.path.replace("{id}", "{id:.+?}")
        handler = handlers[route.method, route.path]
        methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        for method in methods:
            app.router.add_route(method, path, handler, expect_handler=expect(edge.config))
    app.on_response_prepare.append(_name)
    app.on_cleanup.append(lambda _: admin.close())
    return app


async def _name(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-request-id"] = _shown_id.get()


def _handlers(edge: Edge, completions: Completions, admin: Admin) -> dict[tuple[str, str], Handler]:
    models = Models(edge.service, edge.wishes)
    wishes = WishRoutes(edge.wishes)
    peer = Peer(edge.catalog)
    probes = Probes(edge.service, edge.stalled, edge.metrics.registry)
    found: Sequence[Handler] = (
        completions.chat, completions.complete, models.list, models.retrieve,
        probes.livez, probes.readyz, probes.health, probes.metrics,
        admin.status, admin.placement, admin.load, admin.unload, admin.pin, admin.unpin, admin.cancel, admin.move, admin.drain,
        admin.undrain, admin.pull,
        wishes.show, wishes.scale, wishes.unscale, wishes.register, wishes.unregister, wishes.set_alias, wishes.unset_alias,
        peer.list, peer.file,
    )  # fmt: skip
    keys = ((route.method, route.path) for route in ROUTES)
    return dict(zip(keys, found, strict=True))


def _route_of(http: web.Request) -> str:
    """Return the route's own path, for metrics and access: never what a client made up."""
    resource = http.match_info.route.resource
    return "none" if resource is None else resource.canonical


# --- middlewares ----------------------------------------------------------------------------------


def _ids_and_logs(edge: Edge) -> Any:
    @web.middleware
    async def middleware(http: web.Request, handler: Handler) -> web.StreamResponse:
        given = http.headers.get("x-request-id", "")
        if _REQUEST_ID.fullmatch(given):
            # Two requests may come with the same id; `schedule.stream.client_id_of` knows the suffix.
            request_id = f"{given}-{secrets.token_hex(4)}"
            _shown_id.set(given)
        else:
            request_id = secrets.token_hex(8)
            _shown_id.set(request_id)
        logs.request_id.set(request_id)
        logs.model_id.set(None)
        current_job.set(None)
        start = edge.clock.now()
        status = 499  # the client went away
        try:
            response: web.StreamResponse = await handler(http)
            status = response.status
            return response
        finally:
            route = _route_of(http)
            edge.metrics.requests.labels(route, str(status)).inc()
            _log_access(http, route, status, edge.clock.now() - start)

    return middleware


def _log_access(http: web.Request, route: str, status: int, seconds: float) -> None:
    quiet = route in _QUIET and status < 400
    fields: dict[str, Any] = {
        "method": http.method,
        "path": http.path,
        "status": status,
        "seconds": round(seconds, 4),
        "remote": http.remote,
    }
    job = current_job.get()
    if job is not None:
        fields["prompt_tokens"] = job.usage.prompt
        fields["completion_tokens"] = job.usage.completion
        fields["cached_tokens"] = job.usage.cached
        label = job.request.user or job.request.safety_identifier
        if label is not None:
            fields["user"] = label
    log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=fields)


def _errors(config: ServerConfig) -> Any:
    @web.middleware
    async def middleware(http: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(http)
        except SllmError as error:
            found = error
        except web.HTTPRequestEntityTooLarge:
            found = BodyTooLargeError(config.max_body_bytes)
        except web.HTTPException as error:
            allowed = error.headers.get("Allow")
            found = RouteError(http.method, http.path, error.status, allowed)
        except web.RequestPayloadError as error:
            found = MalformedRequestError(str(error).splitlines()[-1].strip())
        except ConnectionError:
            raise  # the client went away
        except Exception:
            log.exception("request failed", extra={"path": http.path})
            found = InternalError(logs.request_id.get() or "")
        else:
            return response
        return error_response(found)

    return middleware


def _entrance(config: ServerConfig) -> Any:
    client_keys = [key.encode() for key in config.api_keys]
    admin_keys = [key.encode() for key in config.admin_keys] or client_keys
    access = {route.path: route.access for route in ROUTES}

    @web.middleware
    async def middleware(http: web.Request, handler: Handler) -> web.StreamResponse:
        route = _route_of(http)
        wanted = access.get(route, "open")
        keys = {"open": [], "client": client_keys, "admin": admin_keys}[wanted]
        if keys:
            _check_key(http, keys, needs_admin=wanted == "admin" and bool(config.admin_keys))
        elif is_loopback(config.host) and not client_keys:
            _check_origin(http)
        if http.method == "POST" and route in access:
            await receive(http, config)
        response: web.StreamResponse = await handler(http)
        return response

    return middleware


def _check_key(http: web.Request, keys: Sequence[bytes], *, needs_admin: bool) -> None:
    scheme, _, key = http.headers.get("Authorization", "").partition(" ")
    given = key.strip().encode(errors="surrogateescape")  # as aiohttp makes text of any bytes
    matches = [hmac.compare_digest(given, known) for known in keys]  # all of them: constant time
    if scheme.lower() != "bearer" or not any(matches):
        raise UnauthorizedError(needs_admin=needs_admin)


def _check_origin(http: web.Request) -> None:
    """Refuse what a web page of another site sends to a node that asks for no key.

    A page can reach loopback from a browser, directly or by a name that it lets point there.
    """
    host = http.headers.get("Host", "localhost")
    if not _is_local(f"//{host}"):
        raise ForbiddenOriginError("Host", host)
    origin = http.headers.get("Origin")
    if origin is not None and not _is_local(origin):
        raise ForbiddenOriginError("Origin", origin)


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
