"""A client's connection: errors outside of a request look like all others."""

import logging
import re
import secrets
from typing import Any, Final

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


class Connection(web.RequestHandler):
    """aiohttp's connection, with our error object where it would answer in plain text."""

    __slots__ = ()

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
