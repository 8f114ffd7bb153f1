"""How commands ask a running node: where it is, with which key, and for how long its answer is waited."""

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import Annotated, Any, Final

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
Target = tuple[str, str | None, Path | None]


def quoted(name: str) -> str:
    """Return a name as a part of a path."""
    from urllib.parse import quote

    return quote(name, safe="")


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
    return asyncio.run(_request(method, url.rstrip("/") + path, key, body, limit_s))


async def _request(
    method: str, url: str, key: str | None, body: dict[str, Any] | None, limit_s: float | None
) -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.request(method, url, json=body) as response,
        ):
            answer = await response.json(content_type=None)
            if not isinstance(answer, dict):
                fail(f"what answers at {url} is no sllm_node")
            if response.status == 401:
                fail(f"{_message(answer)} (--key, SLLM_NODE_KEY, or --config of the node)")
            if response.status >= 400:
                fail(_message(answer) or str(response.reason))
            return answer
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
    except ValueError:
        fail(f"what answers at {url} is no sllm_node")


def reason(error: OSError) -> str:
    """Return why nobody was reached; TLS and the resolver count their errors by numbers of their own."""
    if isinstance(error, ssl.SSLError | socket.gaierror):
        return error.strerror or str(error)
    number = error.errno or 0
    return os.strerror(number).lower() if number > 0 else str(error)


def _message(answer: dict[str, Any]) -> str:
    return str(answer.get("error", {}).get("message", ""))
