"""How commands ask a running node: where it is, with which key, and for how long its answer is waited."""

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from sllm_node.cli.output import fail
from sllm_node.core.config import load_config
from sllm_node.core.contradictions import has_control_characters

Url = Annotated[
    str, typer.Option(envvar="SLLM_NODE_URL", help="where the node listens", metavar="URL")
]
Key = Annotated[
    str | None, typer.Option(envvar="SLLM_NODE_KEY", help="an admin key", metavar="KEY")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="take address and key from the node's config instead")
]
DEFAULT_URL: Final = "http://127.0.0.1:8000"
ANSWER_S: Final = 60.0
"""For an answer that waits for no model."""
CONNECT_S: Final = 15.0
_WAITING: Final = ("load", "unload", "pull", "pin")
"""Acts on a model that end when it is loaded, fetched or free; only an operator knows when that is too late."""
_TOLD: Final = {
    "status": "node", "wishes": "aliases", "cancel": "cancelled", "move": "migration",
    "drain": "draining", "undrain": "draining", "register": "url", "unregister": "model",
    **dict.fromkeys(("load", "unload", "pull", "pin", "unpin"), "state"),
    **dict.fromkeys(("scale", "unscale", "set", "unset"), "missed"),
}  # fmt: skip
"""The last part of a path -> what every node tells there, and nothing else that may listen."""
Target = tuple[str, str | None, Path | None]


def quoted(name: str) -> str:
    """Return a name as a part of a path."""
    from urllib.parse import quote

    return quote(name, safe="", errors="surrogateescape")  # of an argument that is no UTF-8


def limit_of(path: str) -> float | None:
    """Return for how long the answer to a request for `path` is waited; None: until it is there."""
    is_waiting = path.startswith("/admin/models/") and path.endswith(
        tuple(f"/{verb}" for verb in _WAITING)
    )
    return None if is_waiting else ANSWER_S


def call(
    method: str,
    path: str,
    target: Target,
    body: dict[str, Any] | None = None,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """Return what a node answers; what it refuses ends the program with its words.

    `limit_s`: in the place of what `limit_of` says.
    """
    url, key, config_file = target
    if "://" not in url:
        url = f"http://{url}"
    if config_file is not None:
        config = load_config(config_file)
        host = config.server.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}"
        keys = config.server.admin_keys or config.server.api_keys
        key = key or (keys[0] if keys else None)
    key = key and key.strip()
    if key and has_control_characters(key):
        fail("the key has control characters, which no request can carry; see --key, SLLM_NODE_KEY")
    limit_s = limit_of(path) if limit_s is None else limit_s
    where = url.rstrip("/") + path
    status, answer = asyncio.run(_request(method, where, key, body, limit_s))
    if status >= 400 and (message := _message(answer)):
        hint = " (--key, SLLM_NODE_KEY, or --config of the node)" if status == 401 else ""
        fail(f"{message}{hint}")
    told = _TOLD[path.rpartition("/")[2]]
    if status >= 400 or not isinstance(answer, dict) or told not in answer:
        fail(
            f"what answers at {where} (status {status}) is no sllm_node; name the node's address: "
            "--url, SLLM_NODE_URL, or --config of the node"
        )
    return answer


async def _request(
    method: str, url: str, key: str | None, body: dict[str, Any] | None, limit_s: float | None
) -> tuple[int, object]:
    """Return the status of an answer, and what it says; None: no JSON."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.request(method, url, json=body) as response,
        ):
            raw = await response.read()
            try:
                return response.status, orjson.loads(raw)
            except orjson.JSONDecodeError:
                return response.status, None
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        fail(f"{url!r} is no URL; write http://HOST:PORT")
    except aiohttp.ClientConnectorError as error:
        why = reason(error.os_error)
        fail(f"no node answers at {url}: {why}; does it run, and is --url (or --config) right?")
    except aiohttp.ClientError as error:
        fail(f"no node answers at {url}: {error}")
    except TimeoutError:
        fail(
            f"no answer from {url} in {limit_s:g} s: the node hangs (its log says more), or something "
            "else listens there"
        )


def reason(error: OSError) -> str:
    """Return why nobody was reached; TLS and the resolver count their errors by numbers of their own."""
    if isinstance(error, ssl.SSLError | socket.gaierror):
        return error.strerror or str(error)
    number = error.errno or 0
    return os.strerror(number).lower() if number > 0 else str(error)


def _message(answer: object) -> str:
    """Return what a node says of its refusal; nothing: no node says that."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""
