"""Request bodies on their way in: what is wrong with one is told as early as it can be known."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage

from sllm_node.core.config import ServerConfig
from sllm_node.core.errors import BodyTooLargeError, SlowRequestError, UnsupportedEncodingError

ENCODINGS: Final = ("gzip", "deflate")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_KNOWN: Final = "100-continue"
"""What a client may expect; anything else is ignored."""


async def receive(http: web.Request, config: ServerConfig) -> None:
    """Read the body; `http.read` gives it at once from then on.

    Raises:
        BodyTooLargeError: the headers say that it is larger than the limit.
        UnsupportedEncodingError: it can't be decoded here.
        SlowRequestError: it was not whole in time.
        web.HTTPRequestEntityTooLarge: it turned out to be larger than the limit.
        web.RequestPayloadError: it is not what its headers say.
    """
    if _is_too_large(http, config):
        raise BodyTooLargeError(config.max_body_bytes)
    encoding = http.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in (*ENCODINGS, "identity", ""):
        raise UnsupportedEncodingError(encoding, ENCODINGS)
    try:
        async with asyncio.timeout(config.read_timeout_s):
            await http.read()
    except TimeoutError as error:
        raise SlowRequestError(config.read_timeout_s) from error


def expect(config: ServerConfig) -> Callable[[web.Request], Awaitable[None]]:
    """Return what answers `Expect: 100-continue`: go on, unless the body is too large anyway."""

    async def answer(http: web.Request) -> None:
        if http.headers["Expect"].lower() == _KNOWN and not _is_too_large(http, config):
            await http.writer.write(_CONTINUE)
            http.writer.output_size = 0  # the answer proper has not begun

    return answer


def without_unknown_expect(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """Return what makes requests as `make` does, without an `Expect` that nobody knows.

    aiohttp refuses it, on paths without a route, before the application has seen the request.
    """

    def made(message: RawRequestMessage, *given: Any) -> web.BaseRequest:
        if message.headers.get("Expect", _KNOWN).lower() != _KNOWN:
            headers = message.headers.copy()
            headers.popall("Expect")
            message = message._replace(headers=type(message.headers)(headers))
        return make(message, *given)

    return made


def _is_too_large(http: web.Request, config: ServerConfig) -> bool:
    length = http.content_length
    return length is not None and length > config.max_body_bytes
