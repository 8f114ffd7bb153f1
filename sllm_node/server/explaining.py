"""Why a request went where it went, told with its answer to a client that asks: `x-sllm-explain: 1`.

The answer has headers, one value for each choice, joined by commas: the node that serves it, the way it
started there, and the milliseconds until it ran; of one that went on elsewhere, the nodes before, too. A stream's headers go out before all of that is sure (a
model may still load; a session may move), so it ends with a comment that says it once more, as JSON.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import orjson
from aiohttp import web

from sllm_node.core.types import Startup
from sllm_node.server.service import Stream

WISH: Final = "x-sllm-explain"


def is_wished(http: web.Request) -> bool:
    """Tell whether the client wants to know."""
    return http.headers.get(WISH, "0") not in ("", "0", "false")


def headers(streams: Sequence[Stream]) -> dict[str, str]:
    """Return what is known now as headers; what is not known of any choice has none."""
    startups = [stream.startup() for stream in streams]
    found: dict[str, list[str | None]] = {
        "x-sllm-node": [startup.node for startup in startups],
        "x-sllm-way": [startup.way for startup in startups],
        "x-sllm-startup-ms": [_milliseconds(startup) for startup in startups],
        "x-sllm-expected-ms": [_expected(startup) for startup in startups],
        "x-sllm-earlier-nodes": ["+".join(stay.node for stay in s.earlier) for s in startups],
    }
    return {
        name: ", ".join(value or "-" for value in values)
        for name, values in found.items()
        if any(values)
    }


def comment(streams: Sequence[Stream]) -> str:
    """Return all that is known, one object for each choice."""
    told = [_shown(stream.startup()) for stream in streams]
    return f"sllm {orjson.dumps(told).decode()}"


def _shown(startup: Startup) -> dict[str, Any]:
    """Return what is known; of one that ran at one node only, nothing of others."""
    told = asdict(startup)
    if not startup.earlier:
        del told["earlier"]
    return told


def _milliseconds(startup: Startup) -> str | None:
    return None if startup.startup_s is None else f"{1e3 * startup.startup_s:.1f}"


def _expected(startup: Startup) -> str | None:
    return None if startup.expected_s is None else f"{1e3 * startup.expected_s:.1f}"
