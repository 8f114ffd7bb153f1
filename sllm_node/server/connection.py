"""A client's connection: errors outside of a request look like all others, and who can't be served is dropped.

Whoever writes an answer waits while more bytes wait for the client than is good, for as long as it
takes. The connection watches that the client takes some, whatever the answer is: whole, streamed,
or the end of one whose request is done.

What a client sends behind a request that runs is read up to a limit of aiohttp's: some requests, or the
beginning of a body. Beyond it nothing is read, so that nobody would hear that the client has hung up;
who sends so much is dropped.
"""

import asyncio
import fcntl
import logging
import re
import secrets
import sys
import termios
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError
from typing_extensions import override

from sllm_node.core import log as logs
from sllm_node.core.errors import (
    InternalError,
    MalformedRequestError,
    SllmError,
    UnsupportedEncodingError,
)
from sllm_node.server.bodies import ENCODINGS
from sllm_node.server.faults import body_of, headers_of, status_of
from sllm_node.server.models import json_response

log = logging.getLogger(__name__)

_ENCODING: Final = re.compile(r"\((\w+)\)")
"""How aiohttp names an encoding for which it lacks a library: `brotli (br)`."""
HOLD_S: Final = 1.0
"""For so long a client may be unread behind one request."""


class _Lookout:
    """Looks at a client's connection every `limit_s`, from when it may have to be dropped until not."""

    def __init__(
        self,
        transport: asyncio.Transport,
        limit_s: float,
        call_later: Callable[..., asyncio.TimerHandle],
    ) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._call_later = call_later
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Look until there is nothing to look for."""
        if self._timer is None:
            self._wait()

    def end(self) -> None:
        """Look no more: the connection is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        """Set the timer if there is something to look for."""
        raise NotImplementedError


class Watch(_Lookout):
    """Drops a client that takes no bytes for `limit_s`."""

    @override
    def _wait(self) -> None:
        is_waiting = self._transport.get_write_buffer_size() > 0
        timer = self._call_later(self._limit_s, self._look, self._left()) if is_waiting else None
        self._timer = timer

    def _look(self, before: int) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size() == 0 or self._left() != before:
            self._wait()
            return
        log.warning("client takes no bytes, dropped", extra={"limit_s": self._limit_s})
        self._transport.abort()

    def _left(self) -> int:
        """Return how many bytes wait here and in the kernel.

        The kernel has megabytes, and asks for more when a third is gone: that takes minutes on a slow line.
        """
        return self._transport.get_write_buffer_size() + _unacknowledged(self._transport)


class Hold(_Lookout):
    """Drops a client that is not read from while one request runs, as it would not be seen to leave."""

    def __init__(
        self,
        transport: asyncio.Transport,
        limit_s: float,
        running: Callable[[], object | None],
        call_later: Callable[..., asyncio.TimerHandle],
    ) -> None:
        """`running` returns the request that runs and has come in whole, or None."""
        super().__init__(transport, limit_s, call_later)
        self._running = running

    @override
    def _wait(self) -> None:
        is_held = not (self._transport.is_reading() or self._transport.is_closing())
        timer = self._call_later(self._limit_s, self._look, self._running()) if is_held else None
        self._timer = timer

    def _look(self, before: object | None) -> None:
        self._timer = None
        if before is None or self._running() is not before or self._transport.is_reading():
            self._wait()
            return
        log.warning("client sends too much behind a running request, dropped")
        self._transport.abort()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel has that the client's has not confirmed; 0 if it does not tell."""
    connection = transport.get_extra_info("socket")
    count = bytearray(4)
    try:
        fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, count)
    except (OSError, AttributeError):
        return 0
    return int.from_bytes(count, sys.byteorder)


class Connection(web.RequestHandler):
    """aiohttp's connection, with a watch, and our error object where it would answer in plain text."""

    __slots__ = ("_hold", "_hold_s", "_watch", "_write_timeout_s")

    def __init__(
        self, manager: Any, *, write_timeout_s: float, hold_s: float = HOLD_S, **given: Any
    ) -> None:
        super().__init__(manager, **given)
        self._write_timeout_s = write_timeout_s
        self._hold_s = hold_s
        self._watch: Watch | None = None
        self._hold: Hold | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writing = cast(asyncio.Transport, transport)
        later = self._loop.call_later
        self._watch = Watch(writing, self._write_timeout_s, later)
        self._hold = Hold(writing, self._hold_s, self._running, later)
        super().connection_made(transport)

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        if self._watch is not None and self._hold is not None:
            self._watch.end()
            self._hold.end()
            self._watch = self._hold = None
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._hold is not None:
            self._hold.begin()

    def _running(self) -> web.BaseRequest | None:
        """Return the request that runs; None: there is none, or it has not come in whole."""
        request = self._current_request
        return request if request is not None and request.content.is_eof() else None

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        if self._watch is not None:
            self._watch.begin()

    @override
    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        found = await super().finish_response(request, resp, start_time)
        if self._watch is not None:
            self._watch.begin()  # of what is too little to wait for, the client may take none either
        return found

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        request_id = logs.request_id.get() or secrets.token_hex(8)
        fields = {"request_id": request_id, "remote": request.remote}
        if isinstance(exc, ConnectionError) and _is_gone(request):
            log.debug("client left while its answer was written", extra=fields)
            raise exc
        found: SllmError
        if status < 500:
            problem = (message or "it is no HTTP").splitlines()[0]
            log.info("no request", extra={**fields, "problem": problem})
            found = _refusal(exc, problem)
        else:
            log.error("request failed", exc_info=exc, extra=fields)
            found = InternalError(request_id)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        answer = error_response(found)
        answer.headers["x-request-id"] = request_id  # the app's own, if there is one, replaces it
        answer.force_close()
        return answer

    @override
    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a mistake of ours; what is wrong with a body was told to who sent it."""
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)


def _is_gone(request: web.BaseRequest) -> bool:
    """Return whether nobody takes an answer any more; the handler hears of it only later."""
    return request.transport is None or request.transport.is_closing()


def _refusal(exc: BaseException | None, problem: str) -> SllmError:
    """Return what is told of bytes that are no request, or of one whose body can't be undone."""
    if isinstance(exc, ContentEncodingError) and (named := _ENCODING.search(problem)) is not None:
        return UnsupportedEncodingError(named[1], ENCODINGS)
    return MalformedRequestError(problem)


def error_response(error: SllmError) -> web.Response:
    """Return an error as a client gets it."""
    answer = json_response(body_of(error), status_of(error))
    answer.headers.update(headers_of(error))
    return answer
